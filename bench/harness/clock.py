"""Times of several candidates, taken in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

# More than the L2 cache of any card so far (H200 and RTX 50: 50 to 128 MB).
_FLUSH_BYTES = 256 << 20
# More cycles a second than any GPU has: a wait of so many cycles for each second of the host is never too short.
_CYCLES = 2.5e9
_LONGEST_WAIT = 5e-3

Step = Callable[[int], object]


@dataclass
class Timed:
    """One candidate: steps that run one after the other (forward, backward), each timed on its own.

    A step is called with the number of the input set and what the step before it returned.
    """

    name: str
    steps: Sequence[Callable[..., object]]
    seconds: list[list[float]] = field(default_factory=list)
    # The longest time that the host needed to start all steps, which is not part of `seconds`.
    host_seconds: float = 0.0

    def quantiles(self, step: int | None = None) -> tuple[float, float, float]:
        """20, 50 and 80 per cent of the seconds of one step, or of all steps together."""
        times = np.array(self.seconds)
        times = times.sum(1) if step is None else times[:, step]
        low, middle, high = np.quantile(times, (0.2, 0.5, 0.8))
        return float(low), float(middle), float(high)


def time_once(candidate: Timed, inputs: int, device: str, *, flush: bool = True) -> float:
    """Run all steps of a candidate once, keep their seconds, return the sum.

    `flush` empties a GPU's cache first; it takes 256 MB, and work of seconds has no need of it.
    """
    times = _cuda(candidate, inputs, flush) if device == "cuda" else _cpu(candidate, inputs)
    candidate.seconds.append(times)
    return sum(times)


def rounds_for(seconds: float, budget: float, most: int = 20, least: int = 3) -> int:
    """How often to repeat what takes this long."""
    return int(min(most, max(least, budget / max(seconds, 1e-9))))


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock_name(device: str) -> str:
    """What times are of: "events" of a GPU, "wall", or "cpu" (EXAONEPATH_BENCH_CLOCK=cpu, for shared machines).

    Time of the processor is what a quiet machine would show only while one thread works, so it is refused with more.
    """
    if device == "cuda":
        return "events"
    name = os.environ.get("EXAONEPATH_BENCH_CLOCK", "wall")
    if name not in ("wall", "cpu"):
        raise ValueError(f"EXAONEPATH_BENCH_CLOCK is wall or cpu, not {name!r}")
    if name == "cpu" and torch.get_num_threads() != 1:
        raise ValueError("EXAONEPATH_BENCH_CLOCK=cpu needs OMP_NUM_THREADS=1")
    return name


def host_clock(device: str) -> Callable[[], float]:
    """The clock that goes with `clock_name`, in seconds; wall time where a GPU works."""
    return time.process_time if clock_name(device) == "cpu" else time.perf_counter


def _cpu(candidate: Timed, inputs: int) -> list[float]:
    now = host_clock("cpu")
    out: object = None
    times = []
    for step in candidate.steps:
        start = now()
        out = step(inputs, out)
        times.append(now() - start)
    return times


def _cuda(candidate: Timed, inputs: int, flush: bool) -> list[float]:
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(candidate.steps) + 1)]
    if flush:
        torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()  # so that no input is in the cache
    if candidate.host_seconds:
        # The GPU waits until the host has queued all launches. Otherwise a short kernel would seem to take as long as
        # the Python code around it.
        torch.cuda._sleep(int(1.5 * candidate.host_seconds * _CYCLES))
    begin = time.perf_counter()
    events[0].record()
    out: object = None
    for step, event in zip(candidate.steps, events[1:], strict=True):
        out = step(inputs, out)
        event.record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    # An operation that waits for the GPU (a copy to the host, say) makes the host's time useless, and longer each time.
    candidate.host_seconds = max(candidate.host_seconds, min(host, _LONGEST_WAIT))
    return [one.elapsed_time(two) / 1e3 for one, two in pairwise(events)]
