"""Report the versions of this installation, and the selected backends with the reasons."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

import torch

from exaonepath.ops.attention.triton import unsupported_device
from exaonepath.ops.extension import load_extension, why_no_cublas, why_no_cuda_half
from exaonepath.ops.linear import onednn_available
from exaonepath.version import __version__

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "h5py",
    "openslide-python",
    "openslide-bin",
    "imagecodecs",
    "simplejpeg",
    "opencv-python-headless",
    "pillow",
    "transformers",
    "huggingface_hub",
    "safetensors",
)
_EXTRAS = {"viz": ("matplotlib",), "synthetic": ("tifffile",)}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is None for a fact that is no check."""

    topic: str
    name: str
    value: str
    ok: bool | None = None


def examine() -> list[Finding]:
    """Examine versions, devices, the compiled extension, and the backends that would be selected."""
    findings = [
        Finding("versions", "exaonepath", __version__),
        Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}"),
        *(_package(name) for name in _PACKAGES),
    ]
    findings += _devices()
    findings += [_extension(), _attention(), _linear()]
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        value = f"missing {', '.join(missing)}: pip install 'exaonepath[{extra}]'" if missing else "installed"
        findings.append(Finding("extras", extra, value, not missing))
    return findings


def _package(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "triton":
            return Finding("versions", name, "not installed (this torch build does not need it)")
        # opencv and openslide exist under several distribution names, so the import is checked too.
        module = {"opencv-python-headless": "cv2", "openslide-bin": "openslide_bin"}.get(name, name)
        found = importlib.util.find_spec(module) is not None
        return Finding("versions", name, "from another distribution" if found else "not installed", found or None)
    return Finding("versions", name, version)


def _devices() -> list[Finding]:
    cores = os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    findings = [Finding("devices", "cpu", f"{cores} cores, {torch.get_num_threads()} torch threads, {capability}")]
    if not torch.cuda.is_available():
        why = "torch build without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver"
        findings.append(Finding("devices", "cuda", f"none ({why})"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        findings.append(
            Finding(
                "devices",
                f"cuda:{index}",
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.1f} GiB",
                True,
            )
        )
    return findings


def _extension() -> Finding:
    extension, reason = load_extension()
    if extension is None:
        return Finding("backends", "C++ extension", f"{reason}; until then the torch backends are used", False)
    info = extension.build_info()
    if not info["cuda"]:
        cuda = f"without CUDA ({why_no_cuda_half()})" if torch.cuda.is_available() else "without CUDA"
        return Finding("backends", "C++ extension", f"{extension.cpu_isa()}, compiler {info['compiler']}, {cuda}", True)
    cuda = f"CUDA {info['cuda']}"
    devices = extension.cuda_devices()
    cuda += f", finds {len(devices)} GPU(s)"
    if len(devices) != (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        cuda += f", but torch finds {torch.cuda.device_count()}: check driver and CUDA_VISIBLE_DEVICES"
    if torch.cuda.is_available() and (reason := why_no_cublas()):
        cuda += f"; the sigmoid loss runs in torch: {reason}"
    return Finding("backends", "C++ extension", f"{extension.cpu_isa()}, compiler {info['compiler']}, {cuda}", True)


def _attention() -> Finding:
    if not torch.cuda.is_available():
        return Finding("backends", "attention", "auto resolves to sdpa on cpu (triton needs a CUDA device)", True)
    chosen = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        reason = unsupported_device(device)
        chosen.append(f"{'triton' if reason is None else f'sdpa ({reason})'} on {device}")
    return Finding("backends", "attention", f"auto resolves to {', '.join(chosen)}; sdpa on cpu", True)


def _linear() -> Finding:
    if onednn_available():
        return Finding("backends", "CPU float32", "oneDNN products and tiled attention (inference)", True)
    return Finding("backends", "CPU float32", "torch's default library (oneDNN is not usable here)")
