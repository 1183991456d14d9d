"""One slide of a cohort: its file, its id, and what is known of it besides the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CohortSlide:
    """One slide of a cohort.

    Attributes:
        path: the slide file.
        id: names the outputs; unique in a cohort. By default the stem of the file.
        patient: the patient, as the manifest states it; stored with the slide's vector.
        mpp: pixel size of level 0 in micrometres, in place of what the file states.
        mask: file of tissue regions, of this slide only.
        weights: weights of both encoders, in place of those of the run.
    """

    path: Path
    id: str
    patient: str | None = None
    mpp: float | None = None
    mask: Path | None = None
    weights: str | None = None
