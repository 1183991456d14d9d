"""`aten._cudnn_attention_forward` with cumulative lengths. Forward only: its varlen backward read past its buffers in
torch releases up to mid 2026 (pytorch pull request 186142)."""

from __future__ import annotations

import torch
from harness.problems import Problem

from .base import Attend, Peer, half_only, needs_cuda, offsets


def _why_not(problem: Problem, backward: bool) -> str | None:
    unsafe = "forward only: the varlen backward is not safe in released versions" if backward else None
    return needs_cuda(problem) or half_only(problem) or unsafe


def _build(problem: Problem) -> Attend:
    ends, longest = offsets(problem), max(problem.lengths)
    forward = torch.ops.aten._cudnn_attention_forward.default
    return lambda q, k, v: forward(q, k, v, None, ends, ends, longest, longest, True)[0]


PEER = Peer("cudnn_varlen", _why_not, _build)
