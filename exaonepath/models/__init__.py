"""The encoders as Hugging Face models, and their registration with the Auto classes."""

from transformers import AutoConfig, AutoModel

from exaonepath.models.composite import ExaonePathModel
from exaonepath.models.configuration import (
    ExaonePathConfig,
    ExaonePathPatchEncoderConfig,
    ExaonePathSlideEncoderConfig,
)
from exaonepath.models.patch_encoder import ExaonePathPatchEncoderModel
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

# transformers prefers a class registered locally over the repository's own code, with or without trust_remote_code.
for _config, _model in (
    (ExaonePathPatchEncoderConfig, ExaonePathPatchEncoderModel),
    (ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel),
    (ExaonePathConfig, ExaonePathModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
