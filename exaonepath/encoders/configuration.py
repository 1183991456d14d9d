"""Hugging Face configurations with the fields of the published model. An unknown key raises an error that names it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from exaonepath.encoders.base_configuration import ExaonePathPretrainedConfig, check_size, is_integer
from exaonepath.encoders.repository import check_subfolder
from exaonepath.errors import ConfigError, SettingsError
from exaonepath.files.strict_json import shown

# Value of each key of `wsi_cfg` if a checkpoint does not contain it.
WSI_DEFAULTS: dict[str, Any] = {
    "input_dim": 768,
    "embed_dim": 768,
    "depth": 6,
    "num_heads": 12,
    "ffn_ratio": 4.0,
    "ffn_layer": "swiglu128",
    "qkv_bias": True,
    "proj_bias": True,
    "ffn_bias": True,
    "n_storage_tokens": 7,
    "nope_interval": 2,
    "embed_use_norm": True,
    "attn_drop": 0.2,
    "ffn_drop": 0.2,
    "norm_layer": "layernorm",
    "patch_size": 256,
    "pos_embed_rope_base": 10_000,
    "pos_embed_rope_min_period": None,
    "pos_embed_rope_max_period": None,
}
# Known keys without any effect. Our periods are float32 for any value of `pos_embed_rope_dtype`.
WSI_IGNORED = {"aggregate", "attn_type", "out_l2_norm", "pos_embed_rope_dtype"}

FFN_ALIGN = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}
NORM_LAYERS = ("layernorm", "rmsnorm")

# The lowest and highest value of each: wide limits, but no allowed model takes minutes to build.
_INTEGERS = {
    "input_dim": (1, 2**20),
    "embed_dim": (1, 2**16),
    "depth": (0, 256),
    "num_heads": (1, 2**12),
    "n_storage_tokens": (0, 2**16),
    "nope_interval": (1, 2**31),
    "patch_size": (1, 2**20),
}
_MAX_FFN_RATIO = 1024
_MAX_SIDE = 2**16
_VITB_BLOCKS = 85_000_000
_BOOLEANS = ("qkv_bias", "proj_bias", "ffn_bias", "embed_use_norm")
_NUMBERS = (
    "ffn_ratio",
    "attn_drop",
    "ffn_drop",
    "pos_embed_rope_base",
    "pos_embed_rope_min_period",
    "pos_embed_rope_max_period",
)


def complete_wsi_cfg(wsi_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`wsi_cfg` with defaults filled in and checked; keys without effect are dropped.

    If `pos_embed_rope_min_period` is given and `pos_embed_rope_base` is not, the latter is None.

    Raises:
        ConfigError: a key is unknown, or no encoder can be built from a value.
    """
    if not isinstance(wsi_cfg, Mapping):
        raise ConfigError(f"wsi_cfg must be a mapping, got {shown(wsi_cfg)}")
    known = set(WSI_DEFAULTS) | WSI_IGNORED
    for key in wsi_cfg:
        if key not in known:
            close = difflib.get_close_matches(str(key)[:80], known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {shown(key)} in wsi_cfg{hint}")
    cfg = {**WSI_DEFAULTS, **{k: v for k, v in wsi_cfg.items() if k not in WSI_IGNORED}}
    if "pos_embed_rope_base" not in wsi_cfg and cfg["pos_embed_rope_min_period"] is not None:
        cfg["pos_embed_rope_base"] = None  # the periods are given by their range: the default base does not apply
    for key, (lowest, highest) in _INTEGERS.items():
        if not is_integer(cfg[key], lowest, highest):
            raise ConfigError(f"wsi_cfg[{key!r}] must be an integer from {lowest} to {highest}, got {shown(cfg[key])}")
    for key in _BOOLEANS:
        if not isinstance(cfg[key], bool):
            raise ConfigError(f"wsi_cfg[{key!r}] must be true or false, got {shown(cfg[key])}")
    for key in _NUMBERS:
        if not (_is_number(cfg[key]) or (cfg[key] is None and key.startswith("pos_embed"))):
            raise ConfigError(f"wsi_cfg[{key!r}] must be a number, got {shown(cfg[key])}")
    if cfg["embed_dim"] % cfg["num_heads"] or (cfg["embed_dim"] // cfg["num_heads"]) % 4:
        raise ConfigError(
            f"wsi_cfg: embed_dim {cfg['embed_dim']} over num_heads {cfg['num_heads']} must be a head dimension "
            "divisible by 4 (2D RoPE)"
        )
    for key, choices in (("ffn_layer", tuple(FFN_ALIGN)), ("norm_layer", NORM_LAYERS)):
        if cfg[key] not in choices:
            raise ConfigError(f"wsi_cfg[{key!r}] must be one of {', '.join(choices)}, got {shown(cfg[key])}")
    for key in ("attn_drop", "ffn_drop"):
        if not 0 <= cfg[key] < 1:
            raise ConfigError(f"wsi_cfg[{key!r}] must be in [0, 1), got {cfg[key]!r}")
    if not 0 < cfg["ffn_ratio"] <= _MAX_FFN_RATIO:
        raise ConfigError(
            f"wsi_cfg['ffn_ratio'] must be positive, and at most {_MAX_FFN_RATIO}, got {cfg['ffn_ratio']!r}"
        )
    check_size(wsi_parameters(cfg), "the slide encoder of wsi_cfg")
    return cfg


def wsi_parameters(cfg: Mapping[str, Any]) -> int:
    """Approximate number of parameters of the slide encoder of a completed `wsi_cfg`."""
    width = cfg["embed_dim"]
    block = 4 * width**2 + ffn_parameters(width, cfg["ffn_ratio"])
    return int(cfg["depth"] * block + width * (cfg["input_dim"] + cfg["n_storage_tokens"]))


def ffn_parameters(width: int, ratio: float) -> int:
    """Approximate number of parameters of a SwiGLU FFN."""
    return int(2 * width * width * ratio)


class ExaonePathPatchEncoderConfig(ExaonePathPretrainedConfig):
    """ViT-B/14 patch encoder. `image_encoder` is "vitb"; `extra_kwargs` must be empty (no published use)."""

    model_type = "exaonepath_patch_encoder"

    def __init__(
        self,
        image_encoder: str = "vitb",
        patch_size: int = 14,
        img_size: int | list[int] | tuple[int, int] = (224, 224),
        extra_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        sides = list(img_size) if isinstance(img_size, list | tuple) else [img_size, img_size]
        if image_encoder != "vitb":
            raise ConfigError(f"image_encoder must be 'vitb', got {shown(image_encoder)}")
        if extra_kwargs:
            raise ConfigError(f"extra_kwargs must be empty, got {shown(extra_kwargs)}")
        if not is_integer(patch_size, 1, _MAX_SIDE):
            raise ConfigError(f"patch_size must be an integer from 1 to {_MAX_SIDE}, got {shown(patch_size)}")
        if len(sides) != 2 or any(not is_integer(s, patch_size, _MAX_SIDE) or s % patch_size for s in sides):
            raise ConfigError(
                f"img_size must be two multiples of patch_size {patch_size}, at most {_MAX_SIDE}, got {shown(img_size)}"
            )
        tokens = (sides[0] // patch_size) * (sides[1] // patch_size)
        check_size(_VITB_BLOCKS + 768 * (tokens + 3 * patch_size**2), "the patch encoder")
        self.image_encoder = image_encoder
        self.patch_size = patch_size
        self.img_size = sides
        self.extra_kwargs: dict[str, Any] = {}
        super().__init__(**self.check_others(kwargs, "image_encoder", "patch_size", "img_size", "extra_kwargs"))

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return 768


class ExaonePathSlideEncoderConfig(ExaonePathPretrainedConfig):
    """Slide encoder. `wsi_cfg` is kept and saved as given; `wsi` is the completed, checked form."""

    model_type = "exaonepath_slide_encoder"

    def __init__(self, wsi_cfg: dict[str, Any] | None = None, **kwargs: Any) -> None:
        complete_wsi_cfg({} if wsi_cfg is None else wsi_cfg)
        self.wsi_cfg = dict(wsi_cfg or {})
        super().__init__(**self.check_others(kwargs, "wsi_cfg"))

    @property
    def wsi(self) -> dict[str, Any]:
        """`wsi_cfg` with every default filled in."""
        return complete_wsi_cfg(self.wsi_cfg)

    @property
    def hidden_size(self) -> int:
        """Width of the slide embedding: the features and the encoder output, concatenated."""
        return int(self.wsi["input_dim"] + self.wsi["embed_dim"])


class ExaonePathConfig(ExaonePathPretrainedConfig):
    """Root configuration of a repository that holds both encoders in subfolders."""

    model_type = "exaonepath"

    def __init__(
        self,
        patch_encoder_config: dict[str, Any] | None = None,
        slide_encoder_config: dict[str, Any] | None = None,
        patch_encoder_subfolder: str = "patch-encoder",
        slide_encoder_subfolder: str = "slide-encoder",
        **kwargs: Any,
    ) -> None:
        self.patch_encoder_config = _plain(patch_encoder_config, "patch_encoder_config")
        self.slide_encoder_config = _plain(slide_encoder_config, "slide_encoder_config")
        self.patch_encoder_subfolder = patch_encoder_subfolder
        self.slide_encoder_subfolder = slide_encoder_subfolder
        for name, config in (("patch", self.patch_encoder), ("slide", self.slide_encoder)):
            try:
                check_subfolder(getattr(self, f"{name}_encoder_subfolder"), f"{name}_encoder_subfolder")
                config()
            except SettingsError as exc:
                raise ConfigError(f"{name} encoder: {exc}") from exc
        own = ("patch_encoder_config", "slide_encoder_config", "patch_encoder_subfolder", "slide_encoder_subfolder")
        super().__init__(**self.check_others(kwargs, *own))

    def patch_encoder(self) -> ExaonePathPatchEncoderConfig:
        """Configuration of the patch encoder."""
        return ExaonePathPatchEncoderConfig(**self.patch_encoder_config)

    def slide_encoder(self) -> ExaonePathSlideEncoderConfig:
        """Configuration of the slide encoder."""
        return ExaonePathSlideEncoderConfig(**self.slide_encoder_config)


def _plain(config: dict[str, Any] | PretrainedConfig | None, name: str) -> dict[str, Any]:
    if isinstance(config, PretrainedConfig):
        config = config.to_diff_dict()
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {shown(config)}")
    return {k: v for k, v in (config or {}).items() if k not in ("model_type", "transformers_version")}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
