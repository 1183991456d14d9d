"""Whole-slide pathology images to slide embeddings: a fast, exact, drop-in EXAONE Path 2.5 encoder.

Importing this package registers the encoders with `transformers.AutoModel`, so that code written for the published
checkpoints builds these classes.
"""

from exaonepath.errors import ExaonePathError
from exaonepath.models import (
    ExaonePathConfig,
    ExaonePathModel,
    ExaonePathPatchEncoderConfig,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderConfig,
    ExaonePathSlideEncoderModel,
)
from exaonepath.version import __version__

__all__ = [
    "ExaonePathConfig",
    "ExaonePathError",
    "ExaonePathModel",
    "ExaonePathPatchEncoderConfig",
    "ExaonePathPatchEncoderModel",
    "ExaonePathSlideEncoderConfig",
    "ExaonePathSlideEncoderModel",
    "__version__",
]
