"""A pytest plugin (`-p harness.outcomes`): the outcome of every test, written as soon as it is known.

A session that is cut off keeps what it saw. A process that lost its CUDA context fails all tests that it would still
run, so it ends after it has written the first of them, and pytest-xdist starts another one.
"""

from __future__ import annotations

import json
import os

from . import table

_LOST = ("CUDA error", "cudaErrorIllegalAddress", "misaligned address", "device-side assert")
_KEPT_LINES = 25


_writes = _is_worker = False


def pytest_configure(config) -> None:
    """With pytest-xdist, only the processes that run tests write: the one that distributes them sees reports twice."""
    global _writes, _is_worker
    _is_worker = hasattr(config, "workerinput")
    _writes = _is_worker or not getattr(config.option, "numprocesses", None)


def pytest_runtest_logreport(report) -> None:
    """One line a test in ${OUT}/tests.jsonl."""
    if not _writes or not (report.when == "call" or report.outcome != "passed"):
        return
    text = report.longreprtext if report.failed else ""
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
    row["reason"] = "\n".join(text.splitlines()[-_KEPT_LINES:])
    table.folder().mkdir(parents=True, exist_ok=True)
    with (table.folder() / "tests.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if _is_worker and any(sign in text for sign in _LOST):
        os._exit(86)
