"""Whether code that torch does not know of may compute a result: on plain tensors, outside of every transformation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Modes of torch in which an operation is recorded or imitated. Other dispatch modes only observe, for example memory.
_TRACING = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def are_plain_float32(*tensors: Tensor, ignore_autocast: bool = False) -> bool:
    """Whether all are plain float32 tensors on the CPU, in eager mode: subclasses, tracing, compilation, autocast,
    forward-mode derivatives and function transforms need torch's own operations.

    `ignore_autocast`: for a backward pass, whose dtypes were chosen in the forward pass.
    """
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be part of a graph
        and all(_is_plain(tensor) for tensor in tensors)
        and (ignore_autocast or not torch.is_autocast_enabled("cpu"))
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and (torch._C._len_torch_dispatch_stack() == 0 or all(torch._C._get_dispatch_mode(m) is None for m in _TRACING))
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and not tensor._is_zerotensor()  # zeros without memory
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of autograd.grad(is_grads_batched=True)
    )
