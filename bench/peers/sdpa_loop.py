"""Public SDPA, fragment by fragment (equal lengths as one batch), by whatever kernel torch picks or by a pinned one.

With one fragment this is plain dense attention, where torch's fastest kernels are at home.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from harness.problems import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .base import Attend, Peer, half_only, needs_cuda

_BATCH = 65_535 // 16  # batch x heads is a grid dimension of some of these kernels
_CUDNN_LENGTHS = 16  # cuDNN makes a plan for every new length, half a second each


def _why_not(backend: SDPBackend | None, problem: Problem, backward: bool) -> str | None:
    picks_cudnn = backend in (None, SDPBackend.CUDNN_ATTENTION) and problem.device == "cuda"
    if picks_cudnn and len(set(problem.lengths)) > _CUDNN_LENGTHS:
        return f"cuDNN would make a plan for each of {len(set(problem.lengths))} lengths, half a second each"
    if backend is None:
        return None
    if backend != SDPBackend.EFFICIENT_ATTENTION and (reason := half_only(problem)):
        return reason
    return needs_cuda(problem)


def _build(backend: SDPBackend | None, problem: Problem) -> Attend:
    lengths = problem.lengths
    equal = len(set(lengths)) == 1 and len(lengths) <= _BATCH

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            if equal:
                shape = (len(lengths), lengths[0], *q.shape[1:])
                q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
                return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, *shape[2:])
            parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
            return torch.cat([scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in parts])

    return attend


def _peer(name: str, backend: SDPBackend | None) -> Peer:
    return Peer(name, partial(_why_not, backend), partial(_build, backend))


PEERS = (
    _peer("sdpa_loop", None),
    _peer("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    _peer("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    _peer("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
)
