"""Where the patches of a slide are found and read: in the process that encodes them, or elsewhere."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from exaonepath.slides.cohort.schedule import Task
from exaonepath.slides.features.extraction import ImageEncoder
from exaonepath.slides.features.reader import PatchBatch
from exaonepath.slides.stages import SlideStages


class BatchReader(Protocol):
    """The batches of a slide that are to be encoded, in order (see `PatchReader`)."""

    def __iter__(self) -> Generator[PatchBatch, None, None]:
        """Read all batches."""

    def cancel(self) -> None:
        """Stop as soon as possible; called from any thread. The batches that still come are not complete."""


class Reading:
    """Slides are read in this process. Subclasses have them read elsewhere, with the same results."""

    def find_patches(self, task: Task, stages: SlideStages) -> int:
        """Compute the patches of the slide, or take the stored ones; returns their number."""
        return stages.find_patches()

    def reader(self, task: Task, stages: SlideStages, encoder: ImageEncoder) -> BatchReader:
        """A reader of the patches that are to be encoded; only after `stages.prepare` returned True."""
        return stages.reader(encoder)
