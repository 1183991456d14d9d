"""The compiled half of the package, or the reason why it cannot serve."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from exaonepath.errors import BackendError
from exaonepath.version import __version__

# Number of the functions' signatures: an extension left over from an earlier state of the sources has another.
_INTERFACE = 1


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and why: not built, built for another machine, or of another version."""
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
        BackendError: it cannot serve; the message says why.
    """
    module, reason = load_extension()
    if module is None:
        raise BackendError(reason)
    return module


def why_no_cuda_half() -> str:
    """Why the extension cannot serve CUDA tensors, or "" where it can."""
    module, reason = load_extension()
    if module is None:
        return reason
    if not hasattr(module, "sigmoid_pass_cuda"):
        return "the C++ extension was built without its CUDA half; reinstall where nvcc is on the PATH"
    return ""
