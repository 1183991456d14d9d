"""How a run works, and what its exit status is."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from exaonepath.errors import OutputError
from exaonepath.slides.cohort.batch_system import Shard
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.job import READ_AHEAD_BYTES
from exaonepath.slides.cohort.lease import STALE_AFTER, Leases
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.schedule import POLL
from exaonepath.slides.outputs import CLAIMS, output_paths
from exaonepath.slides.stages import EncodeSettings

logger = logging.getLogger(__name__)

EXIT_FINISHED, EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 0, 1, 3, 130


@dataclass(frozen=True)
class RunOptions:
    """How a run works; nothing of it changes a result.

    Attributes:
        shard: where in the list of slides this process begins.
        stage: folder on a local disk to which slides are copied before they are read; None: no copies.
        retry_failed: try slides again that failed three times.
        stale_after: seconds after which a claim that was not renewed may be taken over.
        poll: seconds until a slide that another process holds is looked at again: at first, and at most.
        read_ahead_bytes: images of one slide that wait for the device at most.
    """

    shard: Shard = field(default_factory=Shard)
    stage: Path | None = None
    retry_failed: bool = False
    stale_after: float = STALE_AFTER
    poll: tuple[float, float] = POLL
    read_ahead_bytes: int = READ_AHEAD_BYTES


class RunStatus:
    """The exit status of a run: 0 finished, 3 finished with unreadable patches, 1 some failed, 130 interrupted.

    Attributes:
        ended: all slides are done.
    """

    def __init__(self) -> None:
        self.ended = False
        self._worst = EXIT_FINISHED

    def add(self, outcome: SlideOutcome) -> None:
        """Count a slide."""
        if outcome.outcome == "failed":
            self._worst = EXIT_FAILED
        elif outcome.outcome == "unreadable" and self._worst == EXIT_FINISHED:
            self._worst = EXIT_UNREADABLE

    @property
    def exit_status(self) -> int:
        """What the process exits with, as far as the slides decide it."""
        return self._worst if self.ended else EXIT_INTERRUPTED


def open_leases(
    root: Path, slides: Iterable[CohortSlide], run: str, settings: EncodeSettings, options: RunOptions
) -> Leases | None:
    """The claims on an output folder; None if it cannot be written, and everything in it seems to be finished.

    Raises:
        OutputError: the folder of claims cannot be written, and slides are left to do.
    """
    try:
        return Leases(root / CLAIMS, run=run, stale_after=options.stale_after)
    except OutputError as exc:
        if settings.overwrite or not all(output_paths(root, slide.id).embedding.exists() for slide in slides):
            raise
        logger.info("%s; all slides are finished, so none is claimed", exc)
        return None
