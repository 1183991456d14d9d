"""Registration with transformers' Auto classes, so that published repositories build our classes."""

from __future__ import annotations

import functools
import os
from typing import Any

from transformers import AutoConfig, AutoModel

from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.omics import ExaonePathOmicsEncoderModel
from exaonepath.encoders.base_configuration import read_config
from exaonepath.encoders.composite import ExaonePathModel
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.repository import HubError, Repository
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError

_MODELS = (
    ExaonePathModel,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderModel,
    ExaonePathOmicsEncoderModel,
    ExaonePathAlignmentModel,
)
_MARK = "_asks_exaonepath_first"
_BY_TYPE: dict[str, Any] = {model.config_class.model_type: model for model in _MODELS}


def register() -> None:
    """Register configurations and models; may be called again.

    The Auto classes' `from_pretrained` are wrapped, so that a config.json of ours is read by our own gate and never by
    transformers, and a repository's own code is not run, also where `trust_remote_code=True` is passed (before 5.23
    transformers prefers that code over a registered class). Models of other types are passed through as they came.
    """
    for model in _MODELS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)
    for auto, wrap in ((AutoConfig, _wrap_config), (AutoModel, _wrap_model)):
        original = auto.from_pretrained.__func__
        if not getattr(original, _MARK, False):
            wrapped = functools.wraps(original)(wrap(original))
            setattr(wrapped, _MARK, True)
            auto.from_pretrained = classmethod(wrapped)


def _wrap_config(original: Any) -> Any:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        arguments = dict(kwargs)
        if found := _ours(pretrained_model_name_or_path, arguments):
            model, repository, content = found
            return model.config_class.from_file(content, repository, arguments)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained


def _wrap_model(original: Any) -> Any:
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        # Of a local folder, config and weights have to be read together: it may be replaced in between. On the Hub a
        # commit is fixed, and AutoConfig is asked in any case.
        where = pretrained_model_name_or_path
        is_local = isinstance(where, str | os.PathLike) and os.path.lexists(where)
        if is_local and kwargs.get("config") is None and (found := _ours(where, dict(kwargs))):
            return found[0].from_pretrained(where, *args, **kwargs)
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


def _ours(where: Any, arguments: dict[str, Any]) -> tuple[Any, Repository, dict[str, Any]] | None:
    """The class, the place and the content of config.json where it is of one of our models; else None.

    The arguments that say where files are get taken out of `arguments`.

    Raises:
        WeightsError: there is a config.json that cannot be one of any model.
    """
    try:
        repository = Repository.from_arguments(where, arguments)
        content = read_config(repository) or {}
    except (SettingsError, HubError):
        return None  # of what model is not known: transformers has its own errors for it
    model_type = content.get("model_type")
    model = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    return None if model is None else (model, repository, content)
