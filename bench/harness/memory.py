"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # glibc's mallopt


def peak_mb(work: Callable[[], object], device: str, *, tidy: bool = True) -> float | None:
    """Growth of `device`'s memory during `work`, in MB; None where the system does not tell.

    `tidy` keeps glibc's allocator from making the figure depend on what ran before; it costs time, so a timed run
    goes without.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_reserved() - before) / 1e6, 1)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what earlier work freed but glibc kept would hide growth
    if tidy and hasattr(libc, "mallopt"):
        # The size from which blocks are given back at once grows with use: set it, until this is measured.
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    try:
        reset.write_text("5")  # resets the kernel's own high-water mark
    except OSError:
        return None
    before = _kilobytes("VmRSS", status)
    try:
        work()
    finally:
        if tidy and hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return round((_kilobytes("VmHWM", status) - before) * 1024 / 1e6, 1)


def free_bytes(device: str) -> int:
    """Memory of `device` that new tensors could take."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else 4 << 30


def _kilobytes(name: str, status: Path) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])
