"""The whole slide encoder over the number of patches: forward and training step, compared with the dense mask, in 12
GB.

Default: a slide of seconds. EXAONEPATH_BENCH=full: to 1,000,000 patches on a GPU (most valuable first), to 8,000 on a
CPU.
"""

from __future__ import annotations

import pytest
import torch
from harness.encoder import hold
from harness.problems import Problem

# device, dtype, patches, fragments, training, compiled, checkpointing, only with EXAONEPATH_BENCH=full
_CASES = [
    ("cpu", "float32", 200, 6, False, False, False, False),
    ("cpu", "float32", 200, 6, True, False, False, False),
    ("cuda", "bfloat16", 200, 6, False, False, False, False),
    ("cuda", "bfloat16", 200, 6, True, False, False, False),
    ("cuda", "bfloat16", 100_000, 100, False, False, False, True),
    ("cuda", "bfloat16", 100_000, 100, True, False, True, True),
    ("cuda", "bfloat16", 16_000, 20, False, True, False, True),
    ("cuda", "bfloat16", 16_000, 20, True, True, False, True),
    ("cuda", "float32", 43_000, 40, False, False, False, True),
    ("cuda", "bfloat16", 250_000, 200, False, False, False, True),
    ("cuda", "bfloat16", 250_000, 200, True, False, True, True),
    *[("cuda", "bfloat16", n, 20, training, False, False, True) for n in (4_000, 32_000) for training in (False, True)],
    ("cuda", "bfloat16", 1_000, 4, False, False, False, True),
    ("cuda", "bfloat16", 1_000_000, 1_000, False, False, False, True),
    *[
        ("cpu", "float32", n, 8, training, False, False, True)
        for n in (1_000, 2_000, 4_000, 8_000)
        for training in (False, True)
    ],
]


def _param(case: tuple) -> pytest.param:
    device, dtype, n, fragments, training, compiled, checkpointing, _ = case
    words = [device, dtype, f"n{n}", f"f{fragments}", "training" if training else "forward"]
    words += ["compiled"] * compiled + ["checkpointing"] * checkpointing
    return pytest.param(*case, id="-".join(words), marks=[pytest.mark.gpu] if device == "cuda" else [])


@pytest.mark.parametrize(
    ("device", "dtype", "n", "fragments", "training", "compiled", "checkpointing", "large"),
    [_param(case) for case in _CASES],
)
def test_encoder_scaling(benchmark, session, device, dtype, n, fragments, training, compiled, checkpointing, large):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if large and not session.full:
        pytest.skip("EXAONEPATH_BENCH=full runs this size")
    benchmark.group = f"encoder {device}"
    problem = Problem(n, fragments, "lognormal", getattr(torch, dtype), device)
    budget = 6.0 if large else 0.5
    hold(problem, training, session, benchmark, compiled=compiled, checkpointing=checkpointing, budget=budget)
