"""One benchmark session: where its rows go, what time is left, what it leaves out, what an earlier one already did."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from typing import Any

import pytest
import torch

from exaonepath.errors import ExaonePathError

from . import table
from .clock import clock_name
from .machine import computes_bfloat16, facts, source_hash

try:
    from triton.errors import TritonError
except ImportError:  # a torch build without Triton
    TritonError = RuntimeError
try:
    from torch._dynamo.exc import FailOnRecompileLimitHit
except ImportError:  # torch of another day
    FailOnRecompileLimitHit = RuntimeError

# What a candidate may raise and become a row instead of ending the run.
FAILURES = (
    TritonError,
    FailOnRecompileLimitHit,
    subprocess.CalledProcessError,
    ExaonePathError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    LookupError,
    MemoryError,
    OSError,
)
LOST_DEVICE = 86  # exit status: the CUDA context is gone, run again without the candidate that was named

_SHOWN = 200
_SECONDS = 270  # the case that is running then ends within five minutes


def reason(error: BaseException) -> str:
    """First line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_SHOWN]


class Session:
    """Rows measured so far; with EXAONEPATH_BENCH_SAVE=1 each is appended to its table at once.

    EXAONEPATH_BENCH_SECONDS ends the session softly: what would start later skips. With the small sizes it is five
    minutes, shared among the files. EXAONEPATH_BENCH_RESUME=1 skips what rows of the same code and device already
    answer. EXAONEPATH_BENCH_WITHOUT names candidates to leave out, by commas.
    EXAONEPATH_BENCH=full asks for the large sizes; "short" for them too, with the strongest peers and few repetitions.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self._start = time.monotonic()
        self._until = float("inf")
        self._save = os.environ.get("EXAONEPATH_BENCH_SAVE") == "1"
        asked = os.environ.get("EXAONEPATH_BENCH")
        self.full = asked in ("full", "short")
        self.short = asked == "short"
        self._seconds = float(os.environ.get("EXAONEPATH_BENCH_SECONDS", "inf" if self.full else _SECONDS))
        self.without = set(filter(None, os.environ.get("EXAONEPATH_BENCH_WITHOUT", "").split(",")))

    @staticmethod
    def new_run() -> str:
        """A name that ties together the rows of candidates measured in turns."""
        return uuid.uuid4().hex[:8]

    def record(self, name: str, row: dict[str, Any]) -> None:
        """Complete a row with this machine's facts, keep it, and save it where asked to."""
        row = {**row, "clock": clock_name(row["device"]), **facts()}
        if wrong := table.problems_of(name, row):
            raise ValueError(f"row for {name} {'; '.join(wrong)}: {row}")
        self.rows.append((name, row))
        if self._save:
            table.append(name, row)

    def share_time(self, files_left: int) -> None:
        """Give the file of benchmarks that begins now its part of the time left; what it does not use, others get."""
        now = time.monotonic()
        self._until = now + max(0.0, self._start + self._seconds - now) / files_left

    def need_time(self) -> None:
        """Skip the test where the session's time, or the part of it for this file, is spent."""
        if time.monotonic() > min(self._until, self._start + self._seconds):
            pytest.skip("out of time: EXAONEPATH_BENCH_SECONDS is spent, or this file's part of it")

    def need_dtype(self, device: str, dtype: str) -> None:
        """Skip half precision on a CPU without instructions for it, unless all sizes are asked for."""
        if dtype != "float32" and not self.full and not computes_bfloat16(device):
            pytest.skip(f"this CPU emulates {dtype}; EXAONEPATH_BENCH=full runs this case")

    def skip_if_done(self, name: str, **columns: Any) -> None:
        """Skip the test where EXAONEPATH_BENCH_RESUME=1 and saved rows have these columns, this code, this device."""
        if os.environ.get("EXAONEPATH_BENCH_RESUME") != "1":
            return
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        wanted = {**columns, "source": source_hash(), "gpu": gpu}
        for row in table.read(name, *{table.RESULTS, table.folder()}):
            if all(row.get(key) == value for key, value in wanted.items()):
                pytest.skip("already measured: EXAONEPATH_BENCH_RESUME=1")


def check_device(candidate: str) -> None:
    """After a failure: end the process where the CUDA context did not survive it, naming who to leave out."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as exc:
        out = table.folder()
        out.mkdir(parents=True, exist_ok=True)
        with (out / "lost_device.txt").open("a", encoding="utf-8") as file:
            file.write(candidate + "\n")
        pytest.exit(f"{candidate} lost the CUDA context ({reason(exc)}); leave it out and resume", LOST_DEVICE)
