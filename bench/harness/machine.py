"""What a row of results has to say about where it was measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

import exaonepath

ROOT = Path(__file__).resolve().parents[2]


def facts() -> dict[str, Any]:
    """Machine, versions and code of this process; `load` is the one-minute load average of this moment."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**_fixed(), "date": time.strftime("%Y-%m-%d"), "load": None if load is None else round(load, 2)}


@cache
def _fixed() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "commit": commit(),
        "source": source_hash(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def commit() -> str | None:
    """Short hash of the checkout, with "+" after it where tracked files differ; EXAONEPATH_BENCH_COMMIT where a copy of
    the tree came without its history."""
    if commit := os.environ.get("EXAONEPATH_BENCH_COMMIT"):
        return commit
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return None
    return head + (
        "+" if _git("status", "--porcelain", "--untracked-files=no", "exaonepath", "kernels", "csrc") else ""
    )


@cache
def source_hash() -> str:
    """Hash of the Python code under measurement: it distinguishes two states of one commit, and needs no git."""
    package = Path(exaonepath.__file__).parent
    kernels = package / "kernels" if (package / "kernels").is_dir() else ROOT / "kernels"
    digest = hashlib.sha256()
    for base in (package, kernels):
        for path in sorted(base.rglob("*.py")):
            if base == package and kernels in path.parents:
                continue
            digest.update(f"{path.relative_to(base)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def computes_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 in hardware. Other CPUs emulate it, at a sixth of float32's speed."""
    return device != "cpu" or bool({"avx512_bf16", "amx_bf16", "avx10", "svebf16", "bf16"} & _cpu_flags())


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    found = re.search(r"(?:flags|Features)\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return set(found[1].split()) if found else set()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
