"""Loads the compiled extension of the package, or gives the reason why it cannot be used."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from exaonepath.errors import BackendError
from exaonepath.version import __version__

# Version of the functions' signatures. An extension that was built from older sources has another number.
_INTERFACE = 5


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and the reason: not built, built for another machine, or of another version."""
    try:
        module = importlib.import_module("exaonepath._C")
    except ImportError as exc:
        return None, f"the C++ extension cannot be loaded ({exc}); reinstall exaonepath with a C++ compiler"
    info = module.build_info()
    if info["version"] != __version__:
        return None, f"the C++ extension was built for version {info['version']}, this is {__version__}; reinstall"
    if info.get("interface") != _INTERFACE:
        return None, "the C++ extension was built from other sources of this version; reinstall"
    return module, ""


def require_extension() -> ModuleType:
    """The extension.

    Raises:
        BackendError: the extension cannot be used; the message gives the reason.
    """
    module, reason = load_extension()
    if module is None:
        raise BackendError(reason)
    return module


def why_no_cuda_half() -> str:
    """The reason why the extension does not support CUDA tensors, or "" if it does."""
    module, reason = load_extension()
    if module is None:
        return reason
    if not hasattr(module, "sigmoid_sweep_cuda"):
        return "the C++ extension was built without CUDA; reinstall with nvcc on the PATH"
    return ""


def why_no_cublas() -> str:
    """The reason why the CUDA half of the extension cannot call the cuBLAS that torch has loaded, or "" if it can."""
    return str(require_extension().cublas_reason())
