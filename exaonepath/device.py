"""Conversion of the names of devices and dtypes that users type to those of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from exaonepath.errors import DeviceError, DeviceMemoryError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" (CUDA if a usable GPU exists, else CPU), "cpu", "cuda", "cuda:N" or "mps" to an existing device.

    Raises:
        DeviceError: the name is unknown, or this machine has no such device.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise DeviceError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps") from exc
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "this torch build has no CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver"
            raise DeviceError(f"device {name!r} was requested, but {built}; use --device cpu, or install a CUDA torch")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"device {name!r} was requested, but this machine has {torch.cuda.device_count()} GPU(s)")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device 'mps' was requested, but it is not available here; use --device cpu")
    elif device.type != "cpu":
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" (bfloat16 on CUDA devices that support it, float32 elsewhere), a name, or a dtype, to the dtype.

    Raises:
        DeviceError: the dtype is not one of float32, bfloat16, float16.
    """
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if half else torch.float32
    dtype = name if isinstance(name, torch.dtype) else _DTYPES.get(name)
    if dtype not in set(_DTYPES.values()):
        raise DeviceError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16")
    return dtype


@contextmanager
def inference(device: torch.device, dtype: torch.dtype, what: str, advice: str = "") -> Iterator[None]:
    """Inference mode with autocast to `dtype`; an out-of-memory error becomes a `DeviceMemoryError` that names `what`.

    Raises:
        DeviceError: the dtype is not one of float32, bfloat16, float16.
        DeviceMemoryError: the device's memory is exhausted.
    """
    resolve_dtype(dtype, device)
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield
    except torch.OutOfMemoryError as exc:
        raise DeviceMemoryError(f"{what} does not fit into the memory of {device}{advice}: {exc}") from exc


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the `with` block; afterwards every submodule has the mode that it had before.

    `module.train(was_training)` would put frozen parts of a model that is being trained into training mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
