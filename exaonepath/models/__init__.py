"""The encoders as Hugging Face models, and their registration with the Auto classes."""

from exaonepath.models.composite import ExaonePathModel
from exaonepath.models.configuration import (
    ExaonePathConfig,
    ExaonePathPatchEncoderConfig,
    ExaonePathSlideEncoderConfig,
)
from exaonepath.models.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.models.registration import register
from exaonepath.models.slide_encoder import ExaonePathSlideEncoderModel, SlideEncoderOutput

__all__ = [
    "ExaonePathConfig",
    "ExaonePathModel",
    "ExaonePathPatchEncoderConfig",
    "ExaonePathPatchEncoderModel",
    "ExaonePathSlideEncoderConfig",
    "ExaonePathSlideEncoderModel",
    "SlideEncoderOutput",
]

register()
