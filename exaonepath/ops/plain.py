"""Whether code that torch does not know of may compute a result: on plain tensors, outside of every transformation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def are_plain_float32(*tensors: Tensor) -> bool:
    """Whether all are plain float32 tensors on the CPU, in eager mode: subclasses, tracing, compilation, autocast,
    forward-mode derivatives and function transforms need torch's own operations.
    """
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be part of a graph
        and all(_is_plain(tensor) for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of autograd.grad(is_grads_batched=True)
    )
