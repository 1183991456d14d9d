"""The base class of our Hugging Face models: strict safetensors loading and the choice of attention backend."""

from __future__ import annotations

import copy
import os
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from exaonepath.encoders.base_configuration import CONFIG_NAME, WEIGHT_DTYPES, check_attention, read_config
from exaonepath.encoders.block import RMSNorm, RopePeriods
from exaonepath.encoders.repository import Repository
from exaonepath.encoders.weights import check_keys, read_weights
from exaonepath.errors import ExaonePathError, SettingsError, WeightsError

_MISFITS = ("missing", "unexpected", "mismatched")
# Arguments of transformers' `from_pretrained` that we pass on. Any other is a field of the configuration, or unknown.
_TRANSFORMERS_ARGUMENTS = {
    "attn_implementation", "device_map", "dtype", "max_memory", "offload_buffers", "offload_folder", "torch_dtype",
}  # fmt: skip
_IGNORED_ARGUMENTS = (
    "_from_auto", "_from_pipeline", "_fast_init", "low_cpu_mem_usage", "trust_remote_code", "code_revision",
    "weights_only", "disable_mmap", "tqdm_class", "offload_state_dict", "adapter_name",
)  # fmt: skip
_QUANTIZE = "load the model, then quantize it, as with torchao.quantization.quantize_(model, ...)"
_ONE_DEVICE = "load the model, then distribute it"
_NO_KERNELS = "kernels are chosen with attn_implementation"
_REFUSED_ARGUMENTS = {
    "state_dict": "build the model from its configuration, then model.load_state_dict(...)",
    "gguf_file": "weights are read from safetensors only",
    "from_tf": "weights are read from safetensors only",
    "from_flax": "weights are read from safetensors only",
    "key_mapping": "rename the tensors in the file",
    "quantization_config": _QUANTIZE,
    "load_in_8bit": _QUANTIZE,
    "load_in_4bit": _QUANTIZE,
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "use_kernels": _NO_KERNELS,
    "kernel_config": _NO_KERNELS,
    "allow_all_kernels": _NO_KERNELS,
    "experts_implementation": "they have no experts",
    "fusion_config": "they are fused already",
    "generation_config": "they generate nothing",
}


class ExaonePathPreTrainedModel(PreTrainedModel):
    """Base of the encoders. `from_pretrained` reads safetensors only, and every key has to match."""

    _supports_sdpa = True
    # Values of `component=` that select this model.
    component_names: ClassVar[tuple[str, ...]] = ()
    # The periods follow from the config, so a file may omit them. Published checkpoints contain them; then they are
    # read.
    _keys_to_ignore_on_load_missing = [r"rope_embed\.periods$"]  # noqa: RUF012  transformers' own convention

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load config and weights from a Hub id or a directory, as in transformers, but strictly.

        This method reads and checks the files. transformers gets a configuration object and tensors in memory, and does
        not look for files itself (adapters, pickled or distributed checkpoints, kernels).

        Raises:
            WeightsError: files are missing or damaged, or tensors are missing, unexpected or misshapen (all are
                listed), not stored as floating point numbers, or not finite. ConfigError: an unknown key or an
                impossible value in config.json. SettingsError: an argument that cannot be used.
        """
        _check_arguments(args, kwargs)
        kwargs.pop("component_subfolder", None)
        for name in ("component", "encoder_type"):
            # With subfolder=, AutoModel calls this class directly. A component that names the same class is accepted.
            value = kwargs.pop(name, None)
            if value is not None and value not in cls.component_names:
                raise SettingsError(f"{name}={value!r} was requested, but the configuration is of {cls.__name__}")
        want_info, variant = kwargs.pop("output_loading_info", False), kwargs.pop("variant", None)
        repository = Repository.from_arguments(pretrained_model_name_or_path, kwargs)
        config = kwargs.pop("config", None)
        if not isinstance(config, PretrainedConfig):
            source = repository if config is None else Repository.from_arguments(config, {})
            content = read_config(source)
            if content is None:
                raise source.missing(CONFIG_NAME)
            fields = {name: kwargs.pop(name) for name in list(kwargs) if name not in _TRANSFORMERS_ARGUMENTS}
            config, unused = cls.config_class.from_file(content, source, {**fields, "return_unused_kwargs": True})
            kwargs.update(unused)
        check_attention(config._attn_implementation)
        check_attention(kwargs.get("attn_implementation"))
        if unknown := sorted(set(kwargs) - _TRANSFORMERS_ARGUMENTS):
            raise SettingsError(f"from_pretrained of {cls.__name__} has no argument {', '.join(unknown)}")
        with torch.device("meta"):  # names and shapes, without memory
            shapes = {name: tuple(t.shape) for name, t in cls(copy.deepcopy(config)).state_dict().items()}
        state = read_weights(repository, shapes, cls._keys_to_ignore_on_load_missing, variant)
        try:
            model, info = super().from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, **kwargs
            )
        except (ExaonePathError, torch.OutOfMemoryError):
            raise
        except (
            ValueError,
            KeyError,
            ImportError,
            RuntimeError,
        ) as exc:  # the files were checked above, so the arguments are the cause
            raise SettingsError(f"{repository} cannot be loaded with these arguments: {exc}") from exc
        check_keys(str(repository), *([str(key) for key in info.get(f"{kind}_keys") or ()] for kind in _MISFITS))
        model.config.name_or_path = model.name_or_path = repository.where
        return (model, info) if want_info else model

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        # transformers 4.57 writes tensors in memory to an offload folder only if its list of files is not empty. So it
        # gets a list of one empty name.
        return super()._load_pretrained_model(model, state_dict, checkpoint_files or [""], *args, **kwargs)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, **kwargs: Any
    ) -> str:
        # transformers' own method treats an unknown name as a kernel on the Hub, and downloads it.
        return self.get_correct_attn_implementation(attn_implementation, is_init_check)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """transformers' hook: it accepts the names of our backends only."""
        check_attention(requested_attention)
        return requested_attention or "auto"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RopePeriods):
            module.reset()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            # Inputs are normalised, so this standard deviation gives outputs of variance 1 at any width. With a fixed
            # 0.02, attention in narrow encoders would be uniform over all keys, and positions could not be learned.
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | RMSNorm):  # by type: `weight` of other modules may be a child's weight
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("cls_token", "storage_tokens", "pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise an error for arguments that would bypass safetensors, and remove arguments that have no effect."""
    if kwargs.pop("use_safetensors", None) is False or kwargs.pop("ignore_mismatched_sizes", False):
        raise WeightsError("exaonepath loads safetensors only, and never weights whose shapes do not match")
    if args:
        raise SettingsError(f"from_pretrained takes one positional argument, got {len(args) + 1}")
    for name, instead in _REFUSED_ARGUMENTS.items():
        if kwargs.pop(name, None):
            raise SettingsError(f"{name} cannot be used with these models: {instead}")
    if adapter := (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path"):
        raise SettingsError(
            f"{adapter} holds an adapter: load the model, then peft.PeftModel.from_pretrained(model, ...)"
        )
    for name in _IGNORED_ARGUMENTS:
        kwargs.pop(name, None)
    for name in ("dtype", "torch_dtype"):
        dtype = kwargs.get(name)
        if dtype not in (None, "auto") and str(dtype).removeprefix("torch.") not in WEIGHT_DTYPES:
            raise SettingsError(f"{name} must be one of auto, {', '.join(WEIGHT_DTYPES)}, got {dtype!r}")
