"""Registration with transformers' Auto classes, so that published repositories are loaded with our classes.

`import exaonepath` must be fast, and transformers may be imported before it, after it, or never. So this module imports
nothing: a hook changes transformers' Auto modules when they are imported (immediately, if they already are), and the
models are imported and registered at the first use of an Auto class.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import wrapt

from exaonepath.errors import SettingsError

if TYPE_CHECKING:
    from exaonepath.encoders.repository import Repository

_MARK = "_asks_exaonepath_first"


def install() -> None:
    """Make `AutoConfig` and `AutoModel` support our models whenever transformers is imported; may be called again."""
    hooks = {"configuration_auto": _change_config, "modeling_auto": _change_model}
    for module, change in hooks.items():
        wrapt.register_post_import_hook(change, f"transformers.models.auto.{module}")


@functools.cache
def register() -> dict[str, Any]:
    """Import and register configurations and models; returns model type -> model class."""
    from transformers import AutoConfig, AutoModel

    from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
    from exaonepath.alignment.model.omics import ExaonePathOmicsEncoderModel
    from exaonepath.encoders.composite import ExaonePathModel
    from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
    from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel

    models = (
        ExaonePathModel,
        ExaonePathPatchEncoderModel,
        ExaonePathSlideEncoderModel,
        ExaonePathOmicsEncoderModel,
        ExaonePathAlignmentModel,
    )
    for model in models:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModel.register(model.config_class, model, exist_ok=True)
    return {model.config_class.model_type: model for model in models}


def _change_config(module: Any) -> None:
    _replace(module.AutoConfig, "from_pretrained", _config_from_pretrained)
    _replace(module.AutoConfig, "for_model", _after_registration)


def _change_model(module: Any) -> None:
    _replace(module.AutoModel, "from_pretrained", _model_from_pretrained)
    _replace(module.AutoModel, "from_config", _after_registration)


def _replace(auto: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(auto, name)
    function = getattr(original, "__func__", original)
    if getattr(function, _MARK, False):
        return
    wrapped = functools.wraps(function)(wrap(original))
    setattr(wrapped, _MARK, True)
    # `for_model` is a static method in some versions, without a class argument.
    setattr(auto, name, classmethod(wrapped) if hasattr(original, "__func__") else staticmethod(wrapped))


def _after_registration(original: Any) -> Any:
    bound = hasattr(original, "__func__")

    def call(*args: Any, **kwargs: Any) -> Any:
        register()
        return original.__func__(*args, **kwargs) if bound else original(*args, **kwargs)

    return call


def _config_from_pretrained(original: Any) -> Any:
    """A config.json of our models is read and checked by our own function, never by transformers."""

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        arguments = dict(kwargs)
        if found := _ours(pretrained_model_name_or_path, arguments):
            model, repository, content = found
            return model.config_class.from_file(content, repository, arguments)
        return original.__func__(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained


def _model_from_pretrained(original: Any) -> Any:
    """The code in a repository is not run, even with `trust_remote_code=True`.

    Before version 5.23, transformers prefers that code to a registered class. Other models are handled by transformers.
    """

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        # Config and weights of a local folder must be read together, because it may be replaced in between. On the Hub,
        # a commit does not change, and `AutoConfig` is called in any case.
        register()
        where = pretrained_model_name_or_path
        is_local = isinstance(where, str | os.PathLike) and os.path.lexists(where)
        if is_local and kwargs.get("config") is None and (found := _ours(where, dict(kwargs))):
            return found[0].from_pretrained(where, *args, **kwargs)
        return original.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


def _ours(where: Any, arguments: dict[str, Any]) -> tuple[Any, Repository, dict[str, Any]] | None:
    """The class, the repository and the content of config.json if it belongs to one of our models; else None.

    The arguments that locate files are removed from `arguments`.

    Raises:
        WeightsError: there is a config.json that is not valid for any model.
    """
    from exaonepath.encoders.base_configuration import read_config
    from exaonepath.encoders.repository import HubError, Repository

    try:
        repository = Repository.from_arguments(where, arguments)
        content = read_config(repository) or {}
    except (SettingsError, HubError):
        return None  # the kind of model is unknown: transformers raises its own error
    model_type = content.get("model_type")
    model = register().get(model_type) if isinstance(model_type, str) else None
    return None if model is None else (model, repository, content)
