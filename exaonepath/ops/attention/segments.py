"""Attention of equally long segments: in plain products ("eager", for tests and for derivatives that fused kernels do
not have, as those of forward mode), and through torch's own kernels ("sdpa").
"""

from __future__ import annotations

import torch
from torch import Tensor

_VECTOR = 32  # at least as many float32 as a vector register of any CPU holds


def eager_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v for a batch of equally long segments.

    One segment's tokens are never in a product with another's, not even with probability 0: 0 * NaN is NaN.

    Args:
        q: [B, H, R, D] queries.
        k, v: [B, H, L, D].
        scale: factor on the scores, which are kept in float32 or better.

    Returns:
        [B, H, R, D] in v's dtype.
    """
    scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores.softmax(-1).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same through torch's `scaled_dot_product_attention`."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    if q.device.type == "cpu" and k.shape[2] < _VECTOR:
        # torch's CPU kernel looks for a row's largest score one by one where they do not fill a vector, misses NaN in
        # doing so, and takes a row of nothing but NaN for one without keys, whose result is 0.
        out = out + (q.detach() * 0).sum(-1, keepdim=True)
    return out
