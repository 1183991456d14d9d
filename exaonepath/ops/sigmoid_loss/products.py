"""Matrix products of the sigmoid loss, float32 (or float64) out, by the fastest library that torch carries.

A tile takes three products: dots = U V^T, dU = G V and dV = G^T U. Each is asked for in the orientation its library is
fastest in. oneDNN wants both operands with their long dimension last, so the CPU keeps transposed copies of U and V and
gathers dV transposed: 390 to 440 GFLOP/s for all three on two Zen 5 cores, where G^T U asked for plainly gets 110
to 260, and MKL (torch.mm) 160 to 200. On CUDA, half-precision operands give float32 products (`out_dtype`), so that
logits near 100 are not rounded by 0.25.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exaonepath.ops import linear


def product_nt(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [n, k]^T in float32 (float64 for float64)."""
    if a.device.type == "cpu":
        return linear.linear(a, b)
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return torch.mm(a, b.t())


def product_nn(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] in float32 (float64 for float64)."""
    return product_nt(a, b.t())


def product_tn(a: Tensor, b: Tensor) -> Tensor:
    """a [k, m]^T @ b [k, n] in float32 (float64 for float64)."""
    return product_nt(a.t(), b.t())
