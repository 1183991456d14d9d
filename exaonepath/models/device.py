"""Names of devices and dtypes, as users type them, to torch's own."""

from __future__ import annotations

import torch

from exaonepath.errors import DeviceError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" (CUDA where there is a usable one, else CPU), "cpu", "cuda", "cuda:N", "mps" to a device that exists.

    Raises:
        DeviceError: unknown name, or no such device on this machine.
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
            raise DeviceError(f"device {name!r} was asked for, but {built}; use --device cpu, or install a CUDA torch")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"device {name!r} was asked for, but this machine has {torch.cuda.device_count()} GPU(s)")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device 'mps' was asked for, but it is not available here; use --device cpu")
    elif device.type != "cpu":
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" (bfloat16 on CUDA, float32 elsewhere) or a dtype's name to the dtype.

    Raises:
        DeviceError: unknown name, or a dtype the device cannot compute in.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise DeviceError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16")
    return _DTYPES[name]
