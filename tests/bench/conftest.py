"""The benchmarks' helpers are in the folder of the benchmarks, outside any package."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


class _Rounds:
    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


@pytest.fixture
def fake_benchmark():
    """Of pytest-benchmark's fixture what ours calls."""
    return _Rounds()


@pytest.fixture
def session(monkeypatch):
    """A session that nothing in the environment changes."""
    from harness.session import Session

    for name in ("SAVE", "RESUME", "WITHOUT", "SECONDS"):
        monkeypatch.delenv(f"EXAONEPATH_BENCH_{name}", raising=False)
    return Session()


@pytest.fixture
def problem():
    """A problem small enough for a dense reference: three fragments, one of a single token."""
    from harness.problems import Problem

    made = Problem(40, 3, "lognormal", torch.float32, "cpu", heads=2, head_dim=8)
    made.__dict__["lengths"] = [27, 1, 12]
    return made


@pytest.fixture
def measured():
    """A row of the attention table, as measured; keyword arguments change its columns."""
    from harness.machine import facts

    def make(**changes):
        row = {
            **facts(),
            **{"run": "r1", "status": "ok", "reason": None, "direction": "forward", "device": "cpu"},
            **{"dtype": "float32", "n": 1000, "fragments": 1, "spread": "equal", "seed": 0, "sum_l2": 10**6},
            **{
                "clock": "wall",
                "rounds": 5,
                "ms": 2.0,
                "ms_p20": 1.5,
                "ms_p80": 3.0,
                "first_call_s": 0.1,
                "peak_mb": 10.0,
            },
            **{"impl": "exaonepath", "rotation": "own", "heads": 12, "head_dim": 64, "tflops": 0.1, "build_ms": 0.2},
            **{"error_norm": 1e-6, "error_max": 1e-5},
        }
        return {**row, **changes}

    return make


@pytest.fixture
def encoded(measured):
    """The same for the encoder's table."""

    def make(**changes):
        row = measured()
        for name in ("rotation", "heads", "head_dim", "tflops", "build_ms", "error_max"):
            del row[name]
        row.update(
            compiled=False, checkpointing=False, memory_limit_gb=None, reserved_mb=None, shares={"attention": 1.0}
        )
        return {**row, **changes}

    return make
