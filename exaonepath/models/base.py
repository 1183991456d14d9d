"""What our Hugging Face models share: strict safetensors loading and the choice of attention backend."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from exaonepath.errors import ExaonePathError, SettingsError, WeightsError
from exaonepath.models.layers import RMSNorm, RopePeriods
from exaonepath.ops import ATTENTION_BACKENDS

_SHOWN_KEYS = 12


class ExaonePathPreTrainedModel(PreTrainedModel):
    """Base of the encoders. `from_pretrained` reads safetensors only, and every key has to fit."""

    _supports_sdpa = True
    # What `component=` may call this model.
    component_names: ClassVar[tuple[str, ...]] = ()
    # Follows from the config; published checkpoints carry it, and then it is read.
    _keys_to_ignore_on_load_missing = [r"rope_embed\.periods$"]  # noqa: RUF012  transformers' own convention

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load config and weights from a Hub id or a directory, as in transformers, but strictly.

        Raises:
            WeightsError: there is no safetensors file, or keys are missing, unexpected or misshapen (all are listed).
        """
        if kwargs.pop("use_safetensors", None) is False or kwargs.pop("ignore_mismatched_sizes", False):
            raise WeightsError("exaonepath loads safetensors only, and never weights whose shapes do not match")
        kwargs.pop("component_subfolder", None)
        for name in ("component", "encoder_type"):
            # With subfolder=, AutoModel comes here directly: a component that says the same is no contradiction.
            value = kwargs.pop(name, None)
            if value is not None and value not in cls.component_names:
                raise SettingsError(f"{name}={value!r} was asked for, but the configuration there is of {cls.__name__}")
        want_info = kwargs.pop("output_loading_info", False)
        where = str(pretrained_model_name_or_path)
        if kwargs.get("subfolder"):
            where += f" (subfolder {kwargs['subfolder']})"
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        except ExaonePathError:
            raise
        except (OSError, SafetensorError) as exc:
            raise WeightsError(f"no usable safetensors weights at {where}: {exc}") from exc
        _check_loading(where, info)
        return (model, info) if want_info else model

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """transformers' hook: our backends under their own names, and nothing else."""
        if requested_attention is None:
            return "auto"
        if requested_attention not in ATTENTION_BACKENDS:
            raise SettingsError(
                f"attn_implementation={requested_attention!r} is not one of {', '.join(ATTENTION_BACKENDS)}"
            )
        return requested_attention

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RopePeriods):
            module.reset()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            # Inputs are normed, so outputs have variance 1 at any width. A fixed 0.02 leaves attention in narrow
            # encoders even over all keys, and positions with nothing to be learned from.
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | RMSNorm):  # by type: other modules may lend out a child's weight
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("cls_token", "storage_tokens", "pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)


def _check_loading(where: str, info: dict[str, Any]) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys"):
        keys = sorted(info.get(kind) or [])
        if keys:
            problems.append(f"{kind.replace('_', ' ')}: {_some(keys)}")
    # transformers 5 names (key, shape in the file, shape in the model); 4.57 the key alone.
    misshapen = sorted(
        key if isinstance(key, str) else f"{key[0]} (file {list(key[1])}, model {list(key[2])})"
        for key in info.get("mismatched_keys") or []
    )
    if misshapen:
        problems.append(f"misshapen: {_some(misshapen)}")
    if errors := info.get("error_msgs"):
        problems.append(str(errors))
    if problems:
        raise WeightsError(f"the weights at {where} do not fit the model; " + "; ".join(problems))


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more
