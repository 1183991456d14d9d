"""`aten._efficient_attention_forward` with cumulative lengths: torch's only varlen kernel that takes float32."""

from __future__ import annotations

import torch
from harness.problems import Problem

from .base import Attend, Peer, needs_cuda, offsets

_NO_MASK = 0


def _why_not(problem: Problem, backward: bool) -> str | None:
    # The number of fragments is a grid dimension.
    many = "more than 65,535 fragments" if problem.fragments > 65_535 else None
    return needs_cuda(problem) or many


def _build(problem: Problem) -> Attend:
    ends, longest = offsets(problem), max(problem.lengths)
    forward = torch.ops.aten._efficient_attention_forward.default

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with_grad = torch.is_grad_enabled() and q.requires_grad
        out = forward(q[None], k[None], v[None], None, ends, ends, longest, longest, 0.0, _NO_MASK, with_grad)
        return out[0][0]

    return attend


PEER = Peer("efficient_varlen", _why_not, _build)
