"""Patch features of patients, read where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from exaonepath.alignment.data.slides import Slide
from exaonepath.alignment.training.data import TrainingData


class Bag(Protocol):
    """Patch features of a patient, read where they are needed; an array [N, C] is one."""

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, rows: np.ndarray | slice, /) -> np.ndarray:
        """[n, C] of these rows."""
        ...


@dataclass(frozen=True)
class PatientBag:
    """Patches of all slides of a patient, one slide after the other; rows come from the cache, or from the files.

    A cohort's patches together may need terabytes, so that they are never all in memory.
    """

    data: TrainingData
    slides: tuple[Slide, ...]

    def __len__(self) -> int:
        return sum(slide.n_patches for slide in self.slides)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """float32 [n, C] of rising rows.

        Raises:
            DataFileError: a features file cannot be read.
        """
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        found, first = [], 0
        for slide in self.slides:
            own = rows[(rows >= first) & (rows < first + slide.n_patches)] - first
            first += slide.n_patches
            if len(own) == slide.n_patches:
                found.append(self.data.slide_features(slide))
            elif len(own):
                found.append(self.data.cache.read(slide, partial(_chosen, own)).features.numpy())
        return np.concatenate(found) if found else np.zeros((0, self.slides[0].dim), np.float32)


def _chosen(rows: np.ndarray, _coords: np.ndarray, _contours: np.ndarray) -> np.ndarray:
    return rows


def bags_of(data: TrainingData, patients: Sequence[str]) -> dict[str, PatientBag]:
    """The bag of each patient who has a slide."""
    wanted = set(patients)
    slides: dict[str, list[Slide]] = {}
    for slide in data.cohort.slides.slides:
        if slide.patient in wanted:
            slides.setdefault(slide.patient, []).append(slide)
    return {patient: PatientBag(data, tuple(found)) for patient, found in slides.items()}
