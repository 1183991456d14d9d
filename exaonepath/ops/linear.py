"""Float32 matrix products on the CPU through oneDNN, if possible.

torch computes float32 products with MKL, which uses only its AVX2 code on AMD processors: 180 GFLOP/s on two Zen 5
cores. oneDNN, which torch also contains and uses for bfloat16 and convolutions, reaches 340 to 450 with AVX-512. On
Intel processors, both are equally fast. Only inference uses oneDNN: the operator has no gradient.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from exaonepath.ops.plain import are_plain_float32

logger = logging.getLogger(__name__)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; if no gradient is needed, the faster of torch's two float32 libraries is used.

    Args:
        x: [..., K]. weight: [M, K]. bias: [M] or None.

    Returns:
        [..., M]
    """
    if _use_onednn(x, weight, bias):
        return _onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _use_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        are_plain_float32(*(tensor for tensor in (x, weight, bias) if tensor is not None))
        and x.numel() > 0
        and weight.numel() > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None))
        and onednn_available()
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def onednn_available() -> bool:
    """Whether this torch has the operator and it computes in full float32 (a process can set a lower precision)."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    # Not torch's default dtype and device, which the caller may have changed.
    x = torch.randn(8, 64, generator=generator, dtype=torch.float32, device="cpu")
    weight = torch.randn(16, 64, generator=generator, dtype=torch.float32, device="cpu")
    try:
        out = _onednn_linear(x, weight, None)
    except (AttributeError, RuntimeError, NotImplementedError) as exc:
        logger.debug("oneDNN linear is not available (%s); using torch's default", exc)
        return False
    exact = x.double() @ weight.double().T
    # float32 has an error of about 1e-7 of the norm; internal bf16 or tf32 would give an error of about 1e-3.
    return bool((out - exact).norm() <= 1e-6 * exact.norm())
