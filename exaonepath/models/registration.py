"""Registration with transformers' Auto classes, so that published repositories build our classes."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig

from exaonepath.models.composite import ExaonePathModel
from exaonepath.models.multimodal.alignment import ExaonePathAlignmentModel
from exaonepath.models.multimodal.omics import ExaonePathOmicsEncoderModel
from exaonepath.models.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.models.slide_encoder import ExaonePathSlideEncoderModel

_MODELS = (
    ExaonePathModel,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderModel,
    ExaonePathOmicsEncoderModel,
    ExaonePathAlignmentModel,
)
# From here on transformers itself prefers a locally registered class over a repository's own code.
_PREFERS_LOCAL_CODE = (5, 23)


def register() -> None:
    """Register configurations and models; may be called again."""
    for model in _MODELS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _PREFERS_LOCAL_CODE and not hasattr(AutoConfig.from_pretrained, "__wrapped__"):
        AutoConfig.from_pretrained = classmethod(_prefer_ours(AutoConfig.from_pretrained.__func__))


def _prefer_ours(original: Any) -> Any:
    """Older transformers run a repository's code wherever trust_remote_code=True, registered class or not.

    Only for our own model types is that turned off; everything else is passed through as it came.
    """
    ours = {model.config_class.model_type for model in _MODELS}

    @functools.wraps(original)
    def from_pretrained(cls: Any, name: Any, **kwargs: Any) -> Any:
        if kwargs.get("trust_remote_code"):
            config, _ = PretrainedConfig.get_config_dict(
                name, **{k: v for k, v in kwargs.items() if k not in ("trust_remote_code", "return_unused_kwargs")}
            )
            if config.get("model_type") in ours:
                kwargs["trust_remote_code"] = False
        return original(cls, name, **kwargs)

    return from_pretrained
