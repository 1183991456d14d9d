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


def pytest_runtest_logreport(report) -> None:
    """One line a test in ${OUT}/tests.jsonl; only processes that run tests write."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT") is None and worker is None
    if not (worker or alone) or not (report.when == "call" or report.outcome != "passed"):
        return
    text = report.longreprtext if report.failed else ""
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
    row["reason"] = "\n".join(text.splitlines()[-_KEPT_LINES:])
    table.folder().mkdir(parents=True, exist_ok=True)
    with (table.folder() / "tests.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if worker and any(sign in text for sign in _LOST):
        os._exit(86)
