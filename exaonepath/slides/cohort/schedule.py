"""Which slide comes next: new ones in order; those that another process holds are looked at again later."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.lease import Leases
from exaonepath.slides.cohort.outcome import SlideOutcome

POLL = (1.0, 10.0)  # seconds until a busy slide is looked at again: at first, and at most


@dataclass(frozen=True)
class Task:
    """A slide that is to be worked on.

    Attributes:
        slide: the slide.
        stale: content of the lease of an earlier owner that was found to be stale, if there is one.
        alone: nothing else is to be worked on at the same time: a process ended while it worked on several slides, and
            this was one of them.
    """

    slide: CohortSlide
    stale: bytes | None = None
    alone: bool = False


@dataclass
class _Waiting:
    task: Task
    interval: float
    due: float


class Schedule:
    """The slides of a run that are not done; safe to use from several threads.

    Args:
        slides: in the order in which they are worked on.
        leases: shows whether a slide that was busy is free now; None: there are no claims.
        poll: see `POLL`.
    """

    def __init__(
        self, slides: Iterable[CohortSlide], leases: Leases | None = None, poll: tuple[float, float] = POLL
    ) -> None:
        self._new = deque(Task(slide) for slide in slides)
        self._waiting: list[_Waiting] = []
        self._intervals: dict[str, float] = {}
        self._in_hand: set[str] = set()
        self._leases, self._poll = leases, poll
        self._changed = threading.Condition()
        self._stopped = False

    @property
    def unclaimed(self) -> int:
        """Number of slides that wait, without those that another process was seen to hold."""
        with self._changed:
            return len(self._new)

    @property
    def empty(self) -> bool:
        """Whether all slides are done."""
        with self._changed:
            return not (self._new or self._waiting or self._in_hand)

    def next(self) -> Task | float | None:
        """A slide; or the seconds until there may be one (infinite: not before a slide is returned); None: all done."""
        with self._changed:
            if self._stopped:
                return None
            if self._new:
                return self._handed_out(self._new.popleft())
            now = time.monotonic()
            for waiting in sorted(self._waiting, key=lambda waiting: waiting.due):
                if waiting.due > now:
                    return waiting.due - now
                state, claim = ("free", None) if self._leases is None else self._leases.look(waiting.task.slide.id)
                if state != "held":
                    self._waiting.remove(waiting)
                    stale = claim.content if claim is not None else None
                    return self._handed_out(Task(waiting.task.slide, stale, waiting.task.alone))
                self._wait_longer(waiting)
            if self._waiting:
                return max(0.0, min(waiting.due for waiting in self._waiting) - now)
            return math.inf if self._in_hand else None

    def take(self) -> Task | None:
        """As `next`, but waits; None: all done, or stopped."""
        while True:
            found = self.next()
            if not isinstance(found, float):
                return found
            with self._changed:
                if not self._stopped:
                    self._changed.wait(None if found == math.inf else found)

    def busy(self, task: Task) -> None:
        """Return a slide that another process holds: it is looked at again after a while."""
        with self._changed:
            self._in_hand.discard(task.slide.id)
            waiting = _Waiting(task, 0.0, 0.0)
            self._wait_longer(waiting)
            self._waiting.append(waiting)
            self._changed.notify_all()

    def again(self, task: Task) -> None:
        """Return a slide that is to be worked on again at once."""
        with self._changed:
            self._in_hand.discard(task.slide.id)
            self._new.appendleft(task)
            self._changed.notify_all()

    def done(self, task: Task, outcome: SlideOutcome | None = None) -> None:
        """A slide is finished, or has failed."""
        with self._changed:
            self._in_hand.discard(task.slide.id)
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing any more, and wake up who waits in `take`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _handed_out(self, task: Task) -> Task:
        self._in_hand.add(task.slide.id)
        return task

    def _wait_longer(self, waiting: _Waiting) -> None:
        least, most = self._poll
        name = waiting.task.slide.id
        interval = self._intervals[name] = min(most, 2 * self._intervals.get(name, least / 2))
        waiting.interval, waiting.due = interval, time.monotonic() + interval
