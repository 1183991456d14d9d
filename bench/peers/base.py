"""What a way of computing fragment attention has to offer to be measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.problems import Problem
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A function of torch that can do the same work.

    Attributes:
        name: as in the results table.
        why_not: the reason it cannot take a problem (with gradients, if the second argument is true), or None.
        build: everything that is paid once per batch of slides (offsets, masks, schedules); timed apart. What it
            returns maps q, k, v [T, H, D], each contiguous, to [T, H, D].
    """

    name: str
    why_not: Callable[[Problem, bool], str | None]
    build: Callable[[Problem], Attend]


def needs_cuda(problem: Problem) -> str | None:
    """Reason for kernels that exist for CUDA only."""
    return None if problem.device == "cuda" else "CUDA only"


def half_only(problem: Problem) -> str | None:
    """Reason for kernels without float32."""
    return None if problem.dtype in (torch.float16, torch.bfloat16) else "float16 and bfloat16 only"


def offsets(problem: Problem) -> Tensor:
    """int32 [S + 1] on the device, as every varlen interface takes them."""
    ends = list(itertools.accumulate(problem.lengths, initial=0))
    return torch.tensor(ends, dtype=torch.int32, device=problem.device)
