"""Attention of segments of equal length: with plain products ("eager", for tests and for derivatives that fused kernels
do not support, such as forward mode), and with torch's own kernels ("sdpa", and "cudnn" for that library alone).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On Hopper torch prefers FlashAttention 2, at two thirds of the speed of cuDNN. The others follow in case that cuDNN
# does not take an input.
_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_VECTOR = 32  # no CPU has more float32 values in a vector register


def eager_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v for a batch of segments of equal length.

    Tokens of one segment are never multiplied with those of another, not even with probability 0: 0 * NaN is NaN.

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
        # If the scores of a row do not fill a vector, torch's CPU kernel searches the largest one by one and ignores
        # NaN. A row that is all NaN then counts as a row without keys, with result 0. The product below is 0 for finite
        # queries and NaN otherwise, so the sum restores the NaN.
        out = out + (q.detach() * 0).sum(-1, keepdim=True)
    return out


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same through cuDNN, which torch would not choose by itself. Half precision on a GPU.

    cuDNN makes a plan for every new shape. Its backward pass gives other roundings at each call.
    """
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


# The function of each backend that attends segment by segment.
ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "sdpa": sdpa_attention,
    "eager": eager_attention,
    "cudnn": cudnn_attention,
}
