"""Checks whether the parameters of a model may be read without a call of the modules that own them.

The fast paths (`inference`, `prepared`, the last block in `patch_encoder`) cast weights once, split matrices and work
in place. They read a parameter from its module, but do not call the module. This is correct only if the call does
nothing else. Hooks, a `forward` replaced on an instance, adapters, quantised, parametrised or offloaded weights,
tracing and function transforms all act through the call. If one of them may be present, the encoder only calls its
modules.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

C = TypeVar("C", bound=type[nn.Module])

# The classes that the fast paths implement, and their `forward` at the import of this package.
_OWN: dict[type[nn.Module], Any] = {cls: cls.forward for cls in (nn.Conv2d, nn.Dropout, nn.Identity)}
_OWN[nn.ModuleList] = nn.ModuleList.forward  # never called: a container

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def own(cls: C) -> C:
    """Class decorator: states that the fast paths compute exactly the same as this class."""
    _OWN[cls] = cls.forward
    return cls


def is_unmodified(model: nn.Module) -> bool:
    """Whether each module in `model` computes exactly the `forward` of its class, and all parameters have values."""
    if is_transformed() or any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return False
    devices: set[torch.device] = set()
    for module in model.modules():
        if not _is_plain_module(module):
            return False
        for parameter in module._parameters.values():
            if parameter is not None:
                if not is_plain_tensor(parameter):
                    return False
                devices.add(parameter.device)
    # Offloading libraries leave parameters on the "meta" device, which has no values. Then there are two devices.
    return len(devices) <= 1


def execution_device(model: nn.Module) -> torch.device:
    """The device on which a model computes; accelerate's hooks state it if the weights are offloaded."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


def is_transformed() -> bool:
    """Whether torch is tracing, compiling, exporting, or inside a function transform or forward-mode AD."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether it is a strided tensor of torch's own class: a subclass may compute in another way."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _is_plain_module(module: nn.Module) -> bool:
    cls = type(module)
    if cls not in _OWN or cls.forward is not _OWN[cls] or any(getattr(module, name, None) for name in _HOOKS):
        return False
    # Attributes of the instance hide those of the class: accelerate and others set their own `forward` this way.
    return not any(name in module.__dict__ for name in _CALLS)
