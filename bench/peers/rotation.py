"""The cheapest rotation for an attention without one: one compiled pass over queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from harness.problems import Problem
from torch import Tensor

from exaonepath.ops.attention.rotary import apply_rotation

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rotation(q, cos, sin), apply_rotation(k, cos, sin)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    # Dynamic: every slide has its own number of patches.
    return torch.compile(_both, dynamic=True)


def separate_rotation(problem: Problem) -> Rotate:
    """q, k [T, H, D] to the same, rotated; differentiable."""
    cos, sin = problem.rotation.cos_sin(torch.float32)
    return lambda q, k: _compiled()(q, k, cos, sin)
