"""Matrix products of the sigmoid loss, with float32 (or float64) results, by the fastest library in torch.

A tile needs three products: dots = U V^T, dU = G V and dV = G^T U. Each is computed in the orientation that is fastest
in its library. oneDNN is fastest if the long dimension of both operands is last. So the CPU uses transposed copies of U
and V, and sums the transpose of dV: 390 to 440 GFLOP/s for all three products on two Zen 5 cores. A direct G^T U
reaches 110 to 260, and MKL (torch.mm) 160 to 200. On CUDA, half-precision operands give float32 products (`out_dtype`);
in half precision, logits near 100 would have a rounding error of 0.25.
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
