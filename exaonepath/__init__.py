"""Whole-slide pathology images to slide embeddings: a fast, exact, drop-in EXAONE Path 2.5 encoder.

Importing this package registers the encoders with `transformers.AutoModel`, so that code written for the published
checkpoints builds these classes.
"""

from exaonepath.errors import ExaonePathError
from exaonepath.feature_extraction import extract_features, read_features
from exaonepath.models import (
    ExaonePathConfig,
    ExaonePathModel,
    ExaonePathPatchEncoderConfig,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderConfig,
    ExaonePathSlideEncoderModel,
)
from exaonepath.models.loading import load_patch_encoder, load_slide_encoder
from exaonepath.patches import SlideImage, patchfy
from exaonepath.pipeline import encode_slide, read_embedding
from exaonepath.version import __version__

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
