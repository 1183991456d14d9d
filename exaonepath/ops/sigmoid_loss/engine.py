"""Selects the backend for a device and dtype, and gives the reason why another one cannot be used."""

from __future__ import annotations

import logging

import torch

from exaonepath.errors import BackendError, SettingsError
from exaonepath.log_once import warn_once
from exaonepath.ops.extension import load_extension, why_no_cublas, why_no_cuda_half
from exaonepath.ops.sigmoid_loss.cuda_sweep import CUDA_TILE, OVERLAPPED, CudaSweep
from exaonepath.ops.sigmoid_loss.sweep import CPU_TILE, Engine, Tile, TileLoop, cpu_pass, torch_pass

logger = logging.getLogger(__name__)

SIGMOID_BACKENDS = ("auto", "cuda", "cpu", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The torch pass needs about six copies of a tile: 96 MB.
_CUDA_TORCH_TILE = Tile(2048, 2048)


def choose_engine(backend: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine for embeddings of `dtype` on `device`.

    On the CPU, half precision is computed in float32. On CUDA, products take half-precision operands and return
    float32. The products of the gradients take bfloat16 operands, also for float16 embeddings: float16 has the range
    6e-8 to 65504, but the gradient of a negative at bias -17 is smaller, and that of a balanced pair is larger.

    Raises:
        BackendError: the requested backend does not support this device and dtype; the message gives the reason.
    """
    if backend not in SIGMOID_BACKENDS:
        raise SettingsError(f"unknown sigmoid loss backend {backend!r}; choose one of {', '.join(SIGMOID_BACKENDS)}")
    if backend == "auto":
        backend = _best_available(device, dtype)
    elif backend != "torch":
        reason = why_not(backend, device, dtype)
        if reason:
            raise BackendError(f'{reason}; or use the backend "torch"')
    half = dtype in (torch.float16, torch.bfloat16)
    if dtype == torch.float64:
        operand = gradient = accumulator = torch.float64
    elif half and device.type == "cuda":
        operand, gradient, accumulator = dtype, torch.bfloat16, torch.float32
    else:
        operand = gradient = accumulator = torch.float32
    if backend == "cuda":
        return Engine(CudaSweep(CUDA_TILE, OVERLAPPED), operand, gradient, accumulator)
    tile = CPU_TILE if device.type == "cpu" else _CUDA_TORCH_TILE
    return Engine(TileLoop(cpu_pass if backend == "cpu" else torch_pass, tile), operand, gradient, accumulator)


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The reason why "cuda" or "cpu" does not support embeddings of `dtype` on `device`, or "" if it does."""
    if device.type != backend:
        return f"the {backend} backend cannot take tensors on {device}"
    if dtype == torch.float64:
        return f"the {backend} backend computes in float32, and the embeddings are float64"
    return (why_no_cuda_half() or why_no_cublas()) if backend == "cuda" else load_extension()[1]


def _best_available(device: torch.device, dtype: torch.dtype) -> str:
    if device.type not in ("cpu", "cuda") or dtype == torch.float64:
        return "torch"
    reason = why_not(device.type, device, dtype)
    if reason:
        warn_once(logger, "the sigmoid loss runs in plain torch: %s", reason)
        return "torch"
    return device.type
