"""Attention inside fragments: our kernels compared with every peer in torch, forward and with gradients.

Default: sizes of seconds. EXAONEPATH_BENCH=full: 1,000 to 1,000,000 tokens in 1 to 5,000 fragments on a GPU, most
valuable first; up to 16,000 on a CPU. docs/benchmarks.md describes what is measured, and how.
"""

from __future__ import annotations

import pytest
import torch
from harness.contest import hold
from harness.problems import Problem

HEAVY = ("flash_varlen", "cudnn_varlen")

_GPU_FULL = [
    # The targets: one long segment, and what fragments cost against it.
    *[(16_384, 1, "equal"), (100_000, 1, "equal"), (100_000, 100, "equal"), (100_000, 1_000, "lognormal")],
    *[(100_000, f, "equal") for f in (10, 500, 5_000)],
    *[(n, 1, "equal") for n in (1_000, 4_000, 32_000)],
    *[(100_000, f, "lognormal") for f in (10, 100, 5_000)],
    *[(16_384, f, "lognormal") for f in (8, 100)],
    (100_000, 1_000, "zipf"),
    (100_000, 1_000, "equal"),
    (1_000_000, 5_000, "lognormal"),
    (1_000_000, 100, "equal"),
    (250_000, 1, "equal"),
]
_CPU_FULL = [
    *[(n, 1, "equal") for n in (1_000, 2_000, 4_000, 8_000, 16_000)],
    *[(4_000, f, "lognormal") for f in (4, 16, 64, 512)],
    (4_000, 64, "equal"),
]
_SMALL = [(512, 1, "equal"), (768, 6, "lognormal")]


def _cases() -> list[pytest.param]:
    """(device, dtype, n, fragments, spread, backward), most valuable first; `full` ones marked by the last field."""
    cases = [("cpu", "float32", *shape, grad, False) for shape in _SMALL for grad in (False, True)]
    cases += [("cuda", "bfloat16", *shape, grad, False) for shape in _SMALL for grad in (False, True)]
    cases += [("cuda", "bfloat16", *shape, grad, True) for shape in _GPU_FULL[:4] for grad in (False, True)]
    # Error against dtype, and the one peer that takes float32.
    for dtype in ("float16", "float32"):
        cases += [("cuda", dtype, 16_384, f, "equal", grad, True) for f in (1, 100) for grad in (False, True)]
    cases += [("cuda", "bfloat16", *shape, grad, True) for shape in _GPU_FULL[4:] for grad in (False, True)]
    cases.append(("cuda", "bfloat16", 1_000_000, 1, "equal", False, True))
    cases += [("cpu", "float32", *shape, grad, True) for shape in _CPU_FULL for grad in (False, True)]
    cases += [("cpu", "bfloat16", 4_000, f, "equal", grad, True) for f in (1, 8) for grad in (False, True)]
    params = []
    for device, dtype, n, fragments, spread, grad, full in cases:
        name = f"{device}-{dtype}-n{n}-f{fragments}-{spread}-{'backward' if grad else 'forward'}"
        marks = [pytest.mark.gpu] if device == "cuda" else []
        params.append(pytest.param(device, dtype, n, fragments, spread, grad, full, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("device", "dtype", "n", "fragments", "spread", "backward", "large"), _cases())
def test_fragment_attention(benchmark, session, device, dtype, n, fragments, spread, backward, large):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if large and not session.full:
        pytest.skip("EXAONEPATH_BENCH=full runs this size")
    benchmark.group = f"fragment attention {device}"
    problem = Problem(n, fragments, spread, getattr(torch, dtype), device)
    # Seconds for one call even on the fastest card: only who may win, and without separate rotations.
    heavy = HEAVY if device == "cuda" and problem.sum_l2 > 5e10 else ()
    hold(problem, backward, session, benchmark, budget=4.0 if large else 0.5, only=heavy)
