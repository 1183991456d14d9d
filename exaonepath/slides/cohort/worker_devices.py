"""Which worker processes a run has: one for each device, or several."""

from __future__ import annotations

import torch

from exaonepath.device import resolve_device
from exaonepath.errors import DeviceError, SettingsError


def worker_devices(devices: str | None, device: str = "auto", jobs: int = 1) -> list[str]:
    """The devices of the worker processes, one each; a single one means that no other process is needed.

    Args:
        devices: "all" (every CUDA device), or names with commas between them ("cuda:0,cuda:1"); None: `device` alone.
        device: as for `resolve_device`.
        jobs: processes for each device.

    Raises:
        DeviceError: a device does not exist, or is named twice.
        SettingsError: both `devices` and `device` are given, or `jobs` is not positive.
    """
    if jobs < 1:
        raise SettingsError(f"the number of processes must be positive, not {jobs}")
    if devices is None:
        return [str(resolve_device(device))] * jobs
    if device != "auto":
        raise SettingsError("name either one device (--device) or several (--devices), not both")
    if devices.strip() == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise DeviceError("all devices were requested, but there is no usable GPU; on processors, use --jobs N")
        names = [f"cuda:{index}" for index in range(count)]
    else:
        names = [str(resolve_device(name.strip())) for name in devices.split(",")]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DeviceError(f"{', '.join(twice)} is named twice in {devices!r}; --jobs N runs N processes on each")
    return [name for name in names for _ in range(jobs)]
