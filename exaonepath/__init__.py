"""Whole-slide pathology images to slide embeddings: a fast, exact, drop-in EXAONE Path 2.5 encoder.

Importing this package registers the encoders with `transformers.AutoModel`, so that code written for the published
checkpoints builds these classes.
"""

from exaonepath.encoders.composite import ExaonePathModel
from exaonepath.encoders.configuration import (
    ExaonePathConfig,
    ExaonePathPatchEncoderConfig,
    ExaonePathSlideEncoderConfig,
)
from exaonepath.encoders.loading import load_patch_encoder, load_slide_encoder
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import ExaonePathError
from exaonepath.files.features import read_features
from exaonepath.slides.encode import encode_slide, read_embedding
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import patchfy
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
