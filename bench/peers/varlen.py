"""`torch.nn.attention.varlen.varlen_attn` (torch 2.10 and later): torch's public attention over packed tokens."""

from __future__ import annotations

import importlib.util

from harness.problems import Problem

from .base import Attend, Peer, half_only, needs_cuda, offsets


def _why_not(problem: Problem, backward: bool) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen"
    return needs_cuda(problem) or half_only(problem)


def _build(problem: Problem) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = offsets(problem), max(problem.lengths)
    return lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest)


PEER = Peer("varlen_attn", _why_not, _build)
