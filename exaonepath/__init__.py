"""Whole-slide pathology images to slide embeddings: a fast, exact, drop-in EXAONE Path 2.5 encoder.

Importing this package registers the encoders with `transformers.AutoModel`, so that code written for the published
checkpoints builds these classes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaonepath.errors import ExaonePathError
from exaonepath.version import __version__

if TYPE_CHECKING:
    from exaonepath.encoders.composite import ExaonePathModel
    from exaonepath.encoders.configuration import (
        ExaonePathConfig,
        ExaonePathPatchEncoderConfig,
        ExaonePathSlideEncoderConfig,
    )
    from exaonepath.encoders.loading import load_patch_encoder, load_slide_encoder
    from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
    from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
    from exaonepath.files.features import read_features
    from exaonepath.slides.encode import encode_slide, read_embedding
    from exaonepath.slides.features.extract import extract_features
    from exaonepath.slides.image import SlideImage
    from exaonepath.slides.patches.pipeline import patchfy

_MODULES = {
    "exaonepath.feature_extraction": "extract_features read_features",
    "exaonepath.models": "ExaonePathConfig ExaonePathModel ExaonePathPatchEncoderConfig "
    "ExaonePathPatchEncoderModel ExaonePathSlideEncoderConfig ExaonePathSlideEncoderModel",
    "exaonepath.encoders.loading": "load_patch_encoder load_slide_encoder",
    "exaonepath.patches": "SlideImage patchfy",
    "exaonepath.slides.encode": "encode_slide read_embedding",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def _load(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


if not TYPE_CHECKING:
    __getattr__ = _load  # to a type checker, any name would be one of ours


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def _is_command() -> bool:
    """Whether this process is the `exaonepath` command: it imports what it needs, and nobody else is in it."""
    started = Path(sys.argv[0]) if getattr(sys, "argv", None) else Path()
    if started.name == "-m":
        arguments = sys.orig_argv
        return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == ["exaonepath"]
    return started.name.lower() in ("exaonepath", "exaonepath.exe")


# Imported at once elsewhere: code written for `AutoModel` never asks this package for anything. The command looks at
# its tables first, and tells what is wrong with them before what takes seconds is imported.
if not _is_command():
    for _name in _HOME:
        _load(_name)

__all__ = [
    "ExaonePathConfig",
    "ExaonePathError",
    "ExaonePathModel",
    "ExaonePathPatchEncoderConfig",
    "ExaonePathPatchEncoderModel",
    "ExaonePathSlideEncoderConfig",
    "ExaonePathSlideEncoderModel",
    "SlideImage",
    "__version__",
    "encode_slide",
    "extract_features",
    "load_patch_encoder",
    "load_slide_encoder",
    "patchfy",
    "read_embedding",
    "read_features",
]
