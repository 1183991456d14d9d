"""Import path of version 0.1. The code is in `exaonepath.encoders` and `exaonepath.alignment.model`."""

from exaonepath.encoders.composite import ExaonePathModel
from exaonepath.encoders.configuration import (
    ExaonePathConfig,
    ExaonePathPatchEncoderConfig,
    ExaonePathSlideEncoderConfig,
)
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel, SlideEncoderOutput

__all__ = [
    "ExaonePathConfig",
    "ExaonePathModel",
    "ExaonePathPatchEncoderConfig",
    "ExaonePathPatchEncoderModel",
    "ExaonePathSlideEncoderConfig",
    "ExaonePathSlideEncoderModel",
    "SlideEncoderOutput",
]
