"""Profiles of patients as plain arrays: standardised values of a modality, or the mean of the patch features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.training.data import TrainingData

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class CohortPart:
    """Patients of a part of a split, and the cohort that they are of."""

    data: TrainingData
    patients: tuple[str, ...]


def parts_of(data: TrainingData, test: CohortPart | None = None) -> dict[str, CohortPart]:
    """The parts of a split; `test`: test patients of another cohort in place of those of the split."""
    parts = {name: CohortPart(data, tuple(data.split[name])) for name in PARTS}
    return parts if test is None else {**parts, "test": test}


@dataclass(frozen=True)
class Profiles:
    """One row per patient that has the modality.

    Attributes:
        patients: their ids.
        values: float32 [n, F].
    """

    patients: tuple[str, ...]
    values: np.ndarray

    @staticmethod
    def common(left: Profiles, right: Profiles) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the patients with both modalities, in the order of the left one."""
        place = {patient: at for at, patient in enumerate(right.patients)}
        rows = [(at, place[patient]) for at, patient in enumerate(left.patients) if patient in place]
        return left.values[[a for a, _ in rows]], right.values[[b for _, b in rows]]


def read_profiles(data: TrainingData, patients: Sequence[str], modality: str) -> Profiles:
    """Profiles of those of the patients who have the modality, in their order.

    For the slide, the mean over the patches of each slide, then over the slides of the patient: that part of the slide
    embedding which needs no encoder.

    Raises:
        DataFileError: a features file cannot be read.
    """
    if modality == WSI:
        return _pooled(data, patients)
    place = {patient: row for row, patient in enumerate(data.cohort.modalities[modality].patients)}
    found = tuple(patient for patient in patients if patient in place)
    rows = data.standardized_rows(modality).rows([place[patient] for patient in found])
    return Profiles(found, rows)


def _pooled(data: TrainingData, patients: Sequence[str]) -> Profiles:
    slides: dict[str, list[np.ndarray]] = {}
    wanted = set(patients)
    for slide in data.cohort.slides.slides:
        if slide.patient in wanted:
            mean = data.slide_features(slide).mean(0, dtype=np.float64)
            slides.setdefault(slide.patient, []).append(mean)
    found = tuple(patient for patient in patients if patient in slides)
    values = np.array([np.mean(slides[patient], axis=0) for patient in found], np.float32)
    return Profiles(found, values.reshape(len(found), data.cohort.slides.dim or 0))
