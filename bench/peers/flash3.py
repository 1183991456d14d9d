"""FlashAttention 3, forward only (Hopper), from the package fa3-fwd, which is no part of torch."""

from __future__ import annotations

import importlib.util

import torch
from harness.problems import Problem

from .base import Attend, Peer, half_only, needs_cuda, offsets


def _why_not(problem: Problem, backward: bool) -> str | None:
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return "fa3-fwd is not installed"
    if backward:
        return "fa3-fwd has no backward pass"
    if problem.dtype != torch.bfloat16:
        return "fa3-fwd is built for bfloat16"
    return needs_cuda(problem) or half_only(problem)


def _build(problem: Problem) -> Attend:
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

    if problem.fragments == 1:
        return lambda q, k, v: _first(flash_attn_func(q[None], k[None], v[None]))[0]
    ends, longest = offsets(problem), max(problem.lengths)
    return lambda q, k, v: _first(flash_attn_varlen_func(q, k, v, ends, ends, longest, longest))


def _first(result: object) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


PEER = Peer("flash3", _why_not, _build)
