"""Open questions as studies: the variants of settings to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exaonepath.alignment.modalities import WSI
from exaonepath.errors import SettingsError


@dataclass(frozen=True)
class Variant:
    """One set of settings of a study.

    Attributes:
        name: label in the figure.
        overrides: "section.key" -> value; they override the base settings.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A question that is answered by training.

    Attributes:
        name: name for the command and for files.
        question: one line.
        variants: the first is the base.
    """

    name: str
    question: str
    variants: tuple[Variant, ...]


def _frope(modalities: Sequence[str]) -> Study:
    _need_slides("frope", modalities)
    return Study(
        "frope",
        "Does the slide encoder need fragment-wise rotary positions?",
        (
            Variant("F-RoPE"),
            Variant("no rotation", {"model.rope_mode": "no_rotation"}),
            Variant("no fragment mask", {"model.rope_mode": "no_fragments"}),
            Variant("neither", {"model.rope_mode": "off"}),
            Variant("shuffled positions", {"model.rope_mode": "shuffled"}),
        ),
    )


def _loss(modalities: Sequence[str]) -> Study:
    _need_slides("loss", modalities)
    return Study(
        "loss",
        "Sigmoid over all pairs, over pairs with the slide only, or a softmax?",
        (
            Variant("sigmoid, all pairs"),
            Variant("sigmoid, slide-anchored", {"loss.pairs": "wsi"}),
            Variant("softmax (CLIP), all pairs", {"loss.kind": "softmax"}),
        ),
    )


def _frozen(modalities: Sequence[str]) -> Study:
    _need_slides("frozen", modalities)
    omics = [name for name in modalities if name != WSI]
    return Study(
        "frozen",
        "Which encoders have to be trained, and which may keep their random initial weights?",
        (
            Variant("all trained"),
            Variant("slide encoder frozen", {"model.frozen": [WSI]}),
            Variant("omics encoders frozen", {"model.frozen": omics}),
            Variant("only projections trained", {"model.frozen": [WSI, *omics]}),
        ),
    )


def _modalities(modalities: Sequence[str]) -> Study:
    if len(modalities) < 3:
        raise SettingsError(f"modalities: with {' and '.join(modalities)} alone, none can be left out")
    return Study(
        "modalities",
        "What does each modality add to the training of the others?",
        (
            Variant(f"all {len(modalities)}"),
            *(
                Variant(f"without {name}", {"data.modalities": [m for m in modalities if m != name]})
                for name in modalities
            ),
        ),
    )


# Name of a study -> the study for a cohort with these modalities; raises `SettingsError` if it is not possible.
STUDIES: dict[str, Callable[[Sequence[str]], Study]] = {
    "frope": _frope,
    "loss": _loss,
    "frozen": _frozen,
    "modalities": _modalities,
}


def _need_slides(study: str, modalities: Sequence[str]) -> None:
    if WSI not in modalities:
        raise SettingsError(f"{study}: the question is about slides, and the cohort has {', '.join(modalities)} only")
