"""SDPA with a dense [T, T] boolean mask: what the published encoder does, and the wall this project removes."""

from __future__ import annotations

import torch
from harness.memory import free_bytes
from harness.problems import Problem
from torch.nn.functional import scaled_dot_product_attention

from .base import Attend, Peer

# On the CPU a shared machine must not be driven into swapping.
_CPU_BYTES = 3 << 30


def wraps_around(tokens: int, device: str) -> str | None:
    """Why a mask of this size cannot be trusted: torch's kernel forms its offsets in 32 bits (pytorch issue 187227)."""
    if device == "cuda" and tokens**2 > 1 << 32:
        return "more than 2^32 pairs: torch's masked kernel reads the mask at wrapped offsets"
    return None


def _why_not(problem: Problem, backward: bool) -> str | None:
    if reason := wraps_around(problem.n, problem.device):
        return reason
    # The mask as bool and, since SDPA adds it, once more in the scores' dtype.
    per_pair = 1 + torch.finfo(problem.dtype).bits // 8
    needed = problem.n**2 * per_pair
    limit = min(free_bytes(problem.device), _CPU_BYTES if problem.device == "cpu" else 1 << 62)
    return f"the mask alone takes {needed / 1e9:.1f} GB" if needed > limit else None


def _build(problem: Problem) -> Attend:
    ids = problem.segments().ids()
    mask = ids[:, None] == ids

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attend


PEER = Peer("dense_mask", _why_not, _build)
