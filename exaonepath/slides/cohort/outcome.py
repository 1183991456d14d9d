"""What became of a slide in a run, and how long each stage took."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import Literal

from exaonepath.errors import ExaonePathError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.stages import EncodeResult

Outcome = Literal["finished", "unreadable", "empty", "reused", "failed", "busy"]
StageName = Literal["patches", "features", "slide"]


class FailedBeforeError(ExaonePathError):
    """A slide that is not tried: it failed too often, or it has just failed in another process."""


class ElsewhereError(ExaonePathError):
    """An error of a worker process that cannot be sent as it is; the message is kept."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of one slide, as the run log states it.

    Attributes:
        stage: "patches", "features" or "slide".
        seconds: time that the stage took. Stages of different slides overlap.
        patches: patches that the stage dealt with.
        failures: those of them that could not be read.
        reused: a finished result was found and left as it is.
        reader: name of the slide's reader.
        device: where the stage ran.
        peak_memory: bytes, since the process began: of the device for CUDA, otherwise of the process.
    """

    stage: StageName
    seconds: float
    patches: int
    failures: int
    reused: bool
    reader: str
    device: str
    peak_memory: int


@dataclass(frozen=True)
class SlideOutcome:
    """What became of a slide.

    Attributes:
        slide: the slide.
        outcome: "finished"; "unreadable": finished, without the patches that could not be read; "empty": finished, no
            patch; "reused": everything was finished before; "failed"; "busy": another process works on it.
        seconds: from the claim to the end.
        result: the result, unless the slide failed or is busy.
        error: why it failed.
        stages: the stages that ran.
    """

    slide: CohortSlide
    outcome: Outcome
    seconds: float = 0.0
    result: EncodeResult | None = None
    error: Exception | None = None
    stages: tuple[StageRecord, ...] = ()

    def sendable(self) -> SlideOutcome:
        """The outcome with an error that another process can receive."""
        return replace(self, error=None if self.error is None else sendable(self.error))


def sendable(error: Exception) -> Exception:
    """The error itself, without its traceback; or its message, if it cannot be pickled."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301  its own bytes
            return error
    except Exception:  # noqa: BLE001  whatever a library's exception does when it is pickled
        pass
    return ElsewhereError(f"{type(error).__name__}: {error}")
