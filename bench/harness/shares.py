"""Where the time of an encoder goes: attention, matrix products, norms, and the rest (gates, residuals, copies)."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from exaonepath import kernels
from exaonepath.encoders import block, inference

_RANGE = "bench: attention"
_FLASH = ("flash", "fmha", "sdpa", "attention")
_PRODUCTS = ("gemm", "cutlass", "cublas", "nvjet", "xmma", "triton_tem", "splitk", "mm", "linear")
_NORMS = ("layer_norm", "layernorm", "rowwisemoments", "rms_norm", "rmsnorm")


def time_shares(work: Callable[[], object], device: str) -> dict[str, float]:
    """Shares of the device's busy time during `work`, adding up to 1.

    On a GPU every kernel counts once, classified by its name. On the CPU every operator's own time does, and what runs
    inside our attention is attention; work in autograd's own thread is not recorded, so only forward passes make
    sense.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with _attention_marked() if device == "cpu" else _nothing(), profile(activities=activities) as recorded:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    times = dict.fromkeys(("attention", "matrix products", "norms", "other"), 0.0)
    ours = tuple(_kernel_names())
    for event in recorded.events():
        if device == "cuda":
            if event.device_type == DeviceType.CUDA:
                times[_kind(event.name, ours)] += event.self_device_time_total
        elif event.device_type == DeviceType.CPU:
            inside = any(parent.name == _RANGE for parent in _line(event))
            times["attention" if inside else _kind(event.name, ours)] += event.self_cpu_time_total
    total = sum(times.values())
    return {name: round(value / total, 3) for name, value in times.items()} if total else {}


def _kind(name: str, ours: tuple[str, ...]) -> str:
    low = name.lower()
    if name in ours or any(part in low for part in _FLASH):
        return "attention"
    if any(part in low for part in _NORMS):
        return "norms"
    if any(part in low for part in _PRODUCTS):
        return "matrix products"
    return "other"


def _kernel_names() -> Iterator[str]:
    """Names of our Triton kernels, in whatever files they live."""
    try:
        from triton.runtime import JITFunction
    except ImportError:
        return
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        yield from (name for name, value in vars(module).items() if isinstance(value, JITFunction))


def _line(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _attention_marked() -> Iterator[None]:
    """Every attention function of ours that the layers call, inside a named range."""
    rooms = ("exaonepath.ops.attention.fragment_attention", "exaonepath.ops.attention.rows")
    kept = [
        (module, name, value)
        for module in (block, inference)
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ in rooms
    ]

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_RANGE):
                return function(*args, **kwargs)

        return call

    for module, name, value in kept:
        setattr(module, name, marked(value))
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
