"""The base class of our configurations: one function reads config.json, and keys and values are checked."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from exaonepath.encoders.repository import Repository
from exaonepath.errors import ConfigError, StoredConfigError, WeightsError
from exaonepath.files.strict_json import parse_json, shown
from exaonepath.ops.attention.fragment_attention import ATTENTION_BACKENDS

CONFIG_NAME = "config.json"
# The config of an alignment model lists its features: a methylation array alone has 900,000 names, 20 MB.
_MAX_CONFIG = 128 * 2**20
# 40 GB in float32, a thousand times the published encoders. A larger number is a mistake, and an error is raised before
# anything is allocated.
_MAX_PARAMETERS = 10_000_000_000
_MAX_LABELS = 10_000
_MAX_TEXT = 4096
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")

# Keys that have no effect on these models, but that transformers 4 writes if all keys are requested. They are accepted
# with their default values.
_WITHOUT_EFFECT: dict[str, Any] = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "pruned_heads": {}, "tie_word_embeddings": True, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
    "is_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False,
    "tie_encoder_decoder": False, "finetuning_task": None, "task_specific_params": None, "problem_type": None,
    "tokenizer_class": None, "prefix": None, "bos_token_id": None, "pad_token_id": None, "eos_token_id": None,
    "sep_token_id": None, "decoder_start_token_id": None, "max_length": 20, "min_length": 0, "do_sample": False,
    "early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "tf_legacy_loss": False, "use_bfloat16": False, "use_cache": True,
    "quantization_config": None, "experts_implementation": None,
}  # fmt: skip


class ExaonePathPretrainedConfig(PretrainedConfig):
    """Base of our configurations."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read config.json from a Hub id, a directory, or the file itself; further arguments as in transformers.

        Raises:
            WeightsError: the file is missing, cannot be read, or is not one JSON object. ConfigError: it has an unknown
                key or an impossible value.
        """
        repository = Repository.from_arguments(pretrained_model_name_or_path, kwargs)
        config = read_config(repository)
        if config is None:
            raise repository.missing(CONFIG_NAME)
        return cls.from_file(config, repository, kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook: the content of config.json (empty if there is none), and the unused arguments."""
        return read_config(Repository.from_arguments(pretrained_model_name_or_path, kwargs)) or {}, kwargs

    @classmethod
    def from_file(cls, config: dict[str, Any], repository: Repository, arguments: dict[str, Any]) -> Any:
        """The configuration from the content of `repository`'s config.json; `arguments` override its fields."""
        for name in ("trust_remote_code", "code_revision", "gguf_file"):
            if arguments.pop(name, None) and name == "gguf_file":
                raise ConfigError("gguf_file: weights of these models are read from safetensors only")
        arguments = {"name_or_path": repository.where, **arguments}
        try:
            return cls.from_dict(config, **arguments)
        except ConfigError as exc:
            raise StoredConfigError(f"{repository.location(CONFIG_NAME)}: {exc}") from exc

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but overridden fields are checked with all others, not set afterwards."""
        fields = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
        own = {name: kwargs.pop(name) for name in fields if name in kwargs}
        # transformers 4.57 sets some of these after the constructor, and drops others. So they are checked first.
        for key, value in (*config_dict.items(), *kwargs.items()):
            if not (key in ("dtype", "torch_dtype") and value == "auto"):
                _check_value(key, value)
        return super().from_dict({**config_dict, **own}, **kwargs)

    def check_others(self, others: dict[str, Any], *own: str) -> dict[str, Any]:
        """The keys that transformers handles, without `auto_map`, which points to code in a repository that these
        classes replace.

        Raises:
            ConfigError: a key is neither in `own` nor one of transformers' keys, or its value is not accepted.
        """
        for key, value in others.items():
            if key in _CHECKS or key in ATTENTION_KEYS:
                _check_value(key, value)
            elif key == "model_type":
                if value != type(self).model_type:
                    raise ConfigError(f"a configuration of type {shown(value)}, not {type(self).model_type!r}")
            elif key not in _WITHOUT_EFFECT and key not in _DEFAULTS:
                close = difflib.get_close_matches(str(key)[:80], own, n=1, cutoff=0.8)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(own)}"
                raise ConfigError(f"unknown key {shown(key)}{hint}")
            elif value not in (_WITHOUT_EFFECT.get(key), _DEFAULTS.get(key)):
                reason = "quantize the model after it is loaded" if key == "quantization_config" else "leave it out"
                raise ConfigError(f"{key} can have no effect on this model, and is {shown(value)}: {reason}")
        return {key: value for key, value in others.items() if key != "auto_map"}


ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_DEFAULTS = PretrainedConfig().to_dict()


def read_config(repository: Repository) -> dict[str, Any] | None:
    """The content of a model's config.json; None if there is none.

    Raises:
        WeightsError: the file cannot be read, or is not one JSON object.
    """
    data = repository.read(CONFIG_NAME, _MAX_CONFIG)
    if data is None:
        return None
    where = repository.location(CONFIG_NAME)
    config = parse_json(data, where)
    if not isinstance(config, dict):
        raise WeightsError(f"{where} is not a JSON object, but {shown(config)}")
    return config


def check_attention(name: object, key: str = "attn_implementation") -> None:
    """Raise `ConfigError` if `name` is not one of our attention backends: transformers would download a kernel."""
    if name is not None and not (isinstance(name, str) and name in ATTENTION_BACKENDS):
        raise ConfigError(f"{key}={shown(name)} is not one of {', '.join(ATTENTION_BACKENDS)}")


def check_size(parameters: int, what: str) -> None:
    """Raise `ConfigError` if a model would have more parameters than any model of this family needs."""
    if parameters > _MAX_PARAMETERS:
        raise ConfigError(
            f"{what} would have {parameters:,} parameters ({parameters * 4 / 1e9:,.0f} GB in float32), more than the "
            f"{_MAX_PARAMETERS:,} that are allowed"
        )


def is_integer(value: object, lowest: int, highest: int) -> bool:
    """Whether `value` is an integer (and not a bool) from `lowest` to `highest`."""
    return type(value) is int and lowest <= value <= highest


def _check_value(key: str, value: object) -> None:
    if key in ATTENTION_KEYS:
        check_attention(value, key)
    elif key in _CHECKS and not _CHECKS[key](value):
        raise ConfigError(f"{key} cannot be {shown(value)}")


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _MAX_TEXT)


def _is_dtype(value: object) -> bool:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    return value is None or (isinstance(value, str) and value in WEIGHT_DTYPES)


def _are_labels(value: object) -> bool:
    return value is None or (isinstance(value, Mapping) and len(value) <= _MAX_LABELS)


def _are_texts(value: object) -> bool:
    return value is None or (isinstance(value, list) and len(value) <= 16 and all(isinstance(v, str) for v in value))


_CHECKS = {
    "architectures": _are_texts,
    "auto_map": lambda value: value is None or isinstance(value, Mapping),
    "transformers_version": _is_text,
    "dtype": _is_dtype,
    "torch_dtype": _is_dtype,
    "_name_or_path": _is_text,
    "name_or_path": lambda value: _is_text(os.fspath(value) if isinstance(value, os.PathLike) else value),
    "_commit_hash": _is_text,
    "_attn_implementation_autoset": lambda value: isinstance(value, bool),
    "id2label": _are_labels,
    "label2id": _are_labels,
    "num_labels": lambda value: value is None or is_integer(value, 0, _MAX_LABELS),
}
