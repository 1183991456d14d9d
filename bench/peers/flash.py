"""`aten._flash_attention_forward` with cumulative lengths: FlashAttention-2 as torch carries it, with its backward."""

from __future__ import annotations

import torch
from harness.problems import Problem

from .base import Attend, Peer, half_only, needs_cuda, offsets


def _why_not(problem: Problem, backward: bool) -> str | None:
    return needs_cuda(problem) or half_only(problem)


def _build(problem: Problem) -> Attend:
    ends, longest = offsets(problem), max(problem.lengths)
    forward = torch.ops.aten._flash_attention_forward.default
    return lambda q, k, v: forward(q, k, v, ends, ends, longest, longest, 0.0, False, False)[0]


PEER = Peer("flash_varlen", _why_not, _build)
