"""Slides of held-out patients that find each other: by label, and of the same patient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exaonepath.alignment.analyses.context import Context
from exaonepath.alignment.baselines.profiles import read_profiles
from exaonepath.alignment.metrics.intervals import bootstrap_mean
from exaonepath.alignment.metrics.probe_rows import is_missing
from exaonepath.alignment.metrics.slide_search import SlideSearch, search_label, search_patient
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.probing import column
from exaonepath.alignment.subject import Subject
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError
from exaonepath.files.features import read_features

OURS, MEAN_PATCHES = "slide embedding", "mean patch features"
_MOST_SLIDES = 5000


def slide_search(context: Context) -> dict[str, Any]:
    """Search among the slides of the test patients (of all held-out ones if there are none)."""
    subject = context.subject
    if WSI not in subject.modalities:
        raise SettingsError("the cohort has no slides that the model reads")
    part = "test" if "test" in context.parts else "held-out"
    patients = subject.data.split["test"] or subject.held_out
    slides = subject.slides_of(patients)
    if len(slides) < 2:
        raise SettingsError(f"the {part} patients have {len(slides)} slides; two are needed")
    if len(slides) > _MOST_SLIDES:
        raise SettingsError(f"the {part} patients have {len(slides)} slides, more than {_MOST_SLIDES}; name a split")
    embedded = subject.embed_slides(patients)
    owner_of = dict(slides)
    owners = np.array([owner_of[slide] for slide in embedded.patients])
    values = {
        OURS: _ours(subject, embedded, context.parts.get("train")),
        MEAN_PATCHES: _mean_patches(subject, embedded.patients),
    }
    out: dict[str, Any] = {"part": part, "slides": len(owners), "patients": len(set(owners)), "labels": {}}
    for label in context.labels:
        names = column(subject, owners.tolist(), label)
        known = np.array([not is_missing(name) for name in names], bool)
        try:
            found = {
                name: search_label(x[known], owners[known], names[known].astype(str), seed=context.seed)
                for name, x in values.items()
            }
        except SettingsError as exc:
            context.note(label, exc)
            continue
        out["labels"][label] = _compared(found, owners[known], context.seed)
    try:
        found = {name: search_patient(x, owners, seed=context.seed) for name, x in values.items()}
        out["same_patient"] = _compared(found, owners, context.seed)
    except SettingsError as exc:
        context.note("other slides of the same patient", exc)
    return out


def _compared(found: dict[str, SlideSearch], owners: np.ndarray, seed: int) -> dict[str, Any]:
    ours, theirs = found[OURS], found[MEAN_PATCHES]
    return {
        "queries": len(ours.query),
        "ours": {name: value.as_dict() for name, value in ours.estimates(owners, seed).items()},
        "baseline": {name: value.as_dict() for name, value in theirs.estimates(owners, seed).items()},
        "difference": {
            name: bootstrap_mean(ours.measures[name] - theirs.measures[name], owners[ours.query], seed=seed).as_dict()
            for name in ours.measures
        },
        "chance": ours.chance,
    }


def _ours(subject: Subject, embedded: EmbeddedPatients, train: EmbeddedPatients | None) -> np.ndarray:
    """The slide's embedding [n, D], centred by the training patients: a common direction would hide the others."""
    known = embedded.fused
    if train is not None and train.available[WSI].any():
        known = subject.fuse(train, (WSI,))[train.available[WSI]]
    return np.asarray(embedded.fused - known.mean(0))


def _mean_patches(subject: Subject, slides: Sequence[str]) -> np.ndarray:
    """Mean patch features [n, C] of slides, in deviations of the training patients (of these slides if there are
    none)."""
    wanted = set(slides)
    found = {
        slide.slide: read_features(slide.features, expected_dim=slide.dim).features.mean(0, dtype=np.float64)
        for slide in subject.cohort.slides.slides
        if slide.slide in wanted
    }
    values = np.stack([found[slide] for slide in slides])
    known = read_profiles(subject.data, subject.data.split["train"], WSI).values
    known = known if len(known) > 1 else values
    scale = known.std(0)
    return np.asarray((values - known.mean(0)) / np.where(scale > 0, scale, 1))
