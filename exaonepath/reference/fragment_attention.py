"""Fragment attention with the dense mask written out: O(T²) memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, periods: Tensor) -> Tensor:
    """Rotate [T, H, D] by angles 2 pi u / period, x axis first; positions [T, 2] in patches, periods [D/4]."""
    angles = (2 * math.pi * positions.double()[:, :, None] / periods.double()).flatten(1)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def dense_fragment_attention(
    q: Tensor, k: Tensor, v: Tensor, segment: Tensor, scale: float, key_segment: Tensor | None = None
) -> Tensor:
    """Attention of [T, H, D] in which token i attends to token j if segment[i] == segment[j]; segment is integer [T].

    With `key_segment` [K], queries and keys are different tokens: `segment` is that of the queries alone.
    """
    key_segment = segment if key_segment is None else key_segment
    scores = torch.einsum("ihd,jhd->hij", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores.masked_fill(segment[:, None] != key_segment, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).to(v.dtype), v)
