"""What a manifest states about single slides, merged with the settings of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exaonepath.errors import SettingsError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.patches.tissue import check_source

_SOURCE = ("segmenter", "mask", "mask_class", "exclude", "exclude_class", "remove", "geojson_origin")


def patching_of(slide: CohortSlide, patching: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `patchfy` for one slide: its pixel size and its mask take the place of the run's.

    Args:
        slide: a slide of the cohort.
        patching: the arguments for the whole run.
    """
    merged = dict(patching)
    if slide.mpp is not None:
        merged["mpp"] = slide.mpp
    if slide.mask is not None:
        merged["mask"] = slide.mask
        if merged.get("segmenter") == "exaone":  # the default, written out
            merged["segmenter"] = None
    elif merged.get("mask") is None:
        merged["mask_class"] = ()  # a class of the masks of other slides
    return merged


def check_patching(slides: Sequence[CohortSlide], patching: Mapping[str, Any]) -> None:
    """Check, before any slide is opened, where the tissue of the slides comes from.

    Raises:
        SettingsError: the arguments contradict each other or a mask of a slide, or one mask is given for several
            slides.
        MaskError: a file or folder of regions does not exist.
    """
    given = {name: patching[name] for name in _SOURCE if name in patching}
    if not any(slide.mask for slide in slides):
        check_source(**given)
    for slide in _one_of_each_kind(slides):
        check_source(**{name: value for name, value in patching_of(slide, given).items() if name in _SOURCE})
    without = sum(slide.mask is None for slide in slides)
    for path, count in ((patching.get("mask"), without), (patching.get("exclude"), len(slides))):
        if path is not None and count > 1 and not Path(path).is_dir():
            raise SettingsError(f"{path} is one file for {count} slides; name a folder with a file for each slide")


def by_weights(slides: Iterable[CohortSlide], default: str) -> list[CohortSlide]:
    """The slides with those of equal weights next to each other, so that each encoder is loaded once.

    The order is otherwise the given one; the weights that are needed first come first.
    """
    groups: dict[str, list[CohortSlide]] = {}
    for slide in slides:
        groups.setdefault(slide.weights or default, []).append(slide)
    return [slide for group in groups.values() for slide in group]


def _one_of_each_kind(slides: Sequence[CohortSlide]) -> list[CohortSlide]:
    """A slide with a mask and one without, if there are any: the arguments are the same for all others."""
    kinds: dict[bool, CohortSlide] = {}
    for slide in slides:
        kinds.setdefault(slide.mask is not None, slide)
    return list(kinds.values())
