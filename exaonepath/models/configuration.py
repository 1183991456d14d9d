"""Hugging Face configurations of the published model, field for field; an unknown key is an error that names it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from exaonepath.errors import ConfigError

# What each key of `wsi_cfg` is when a checkpoint does not state it.
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
# Known keys without any effect. Ours keeps periods in float32 whatever `pos_embed_rope_dtype` says.
WSI_IGNORED = {"aggregate", "attn_type", "out_l2_norm", "pos_embed_rope_dtype"}

FFN_ALIGN = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}
NORM_LAYERS = ("layernorm", "rmsnorm")

_INTEGERS = ("input_dim", "embed_dim", "depth", "num_heads", "n_storage_tokens", "nope_interval", "patch_size")
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

    Where `pos_embed_rope_min_period` is stated and `pos_embed_rope_base` is not, the latter is None.

    Raises:
        ConfigError: an unknown key, or a value that no encoder can be built from.
    """
    if not isinstance(wsi_cfg, Mapping):
        raise ConfigError(f"wsi_cfg must be a mapping, got {wsi_cfg!r}")
    known = set(WSI_DEFAULTS) | WSI_IGNORED
    for key in wsi_cfg:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r} in wsi_cfg{hint}")
    cfg = {**WSI_DEFAULTS, **{k: v for k, v in wsi_cfg.items() if k not in WSI_IGNORED}}
    if "pos_embed_rope_base" not in wsi_cfg and cfg["pos_embed_rope_min_period"] is not None:
        cfg["pos_embed_rope_base"] = None  # periods are stated the other way: the default has no say
    for key in _INTEGERS:
        lowest = 0 if key in ("depth", "n_storage_tokens") else 1
        if isinstance(cfg[key], bool) or not isinstance(cfg[key], int) or cfg[key] < lowest:
            raise ConfigError(f"wsi_cfg[{key!r}] must be an integer >= {lowest}, got {cfg[key]!r}")
    for key in _BOOLEANS:
        if not isinstance(cfg[key], bool):
            raise ConfigError(f"wsi_cfg[{key!r}] must be true or false, got {cfg[key]!r}")
    for key in _NUMBERS:
        if not (_is_number(cfg[key]) or (cfg[key] is None and key.startswith("pos_embed"))):
            raise ConfigError(f"wsi_cfg[{key!r}] must be a number, got {cfg[key]!r}")
    if cfg["embed_dim"] % cfg["num_heads"] or (cfg["embed_dim"] // cfg["num_heads"]) % 4:
        raise ConfigError(
            f"wsi_cfg: embed_dim {cfg['embed_dim']} over num_heads {cfg['num_heads']} must be a head dimension "
            "divisible by 4 (2D RoPE)"
        )
    for key, choices in (("ffn_layer", tuple(FFN_ALIGN)), ("norm_layer", NORM_LAYERS)):
        if cfg[key] not in choices:
            raise ConfigError(f"wsi_cfg[{key!r}] must be one of {', '.join(choices)}, got {cfg[key]!r}")
    for key in ("attn_drop", "ffn_drop"):
        if not 0 <= cfg[key] < 1:
            raise ConfigError(f"wsi_cfg[{key!r}] must be in [0, 1), got {cfg[key]!r}")
    if cfg["ffn_ratio"] <= 0:
        raise ConfigError(f"wsi_cfg['ffn_ratio'] must be positive, got {cfg['ffn_ratio']!r}")
    return cfg


class ExaonePathPatchEncoderConfig(PretrainedConfig):
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
        sides = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        if image_encoder != "vitb":
            raise ConfigError(f"image_encoder must be 'vitb', got {image_encoder!r}")
        if extra_kwargs:
            raise ConfigError(f"unknown keys in extra_kwargs: {', '.join(sorted(extra_kwargs))}")
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise ConfigError(f"patch_size must be a positive integer, got {patch_size!r}")
        if len(sides) != 2 or any(side < patch_size or side % patch_size for side in sides):
            raise ConfigError(f"img_size must be two multiples of patch_size {patch_size}, got {img_size!r}")
        self.image_encoder = image_encoder
        self.patch_size = patch_size
        self.img_size = sides
        self.extra_kwargs: dict[str, Any] = {}
        super().__init__(**_local(kwargs, "image_encoder", "patch_size", "img_size", "extra_kwargs"))

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return 768


class ExaonePathSlideEncoderConfig(PretrainedConfig):
    """Slide encoder. `wsi_cfg` is kept as given (it is what gets saved); `wsi` is the completed, checked form."""

    model_type = "exaonepath_slide_encoder"

    def __init__(self, wsi_cfg: dict[str, Any] | None = None, **kwargs: Any) -> None:
        complete_wsi_cfg({} if wsi_cfg is None else wsi_cfg)
        self.wsi_cfg = dict(wsi_cfg or {})
        super().__init__(**_local(kwargs, "wsi_cfg"))

    @property
    def wsi(self) -> dict[str, Any]:
        """`wsi_cfg` with every default filled in."""
        return complete_wsi_cfg(self.wsi_cfg)

    @property
    def hidden_size(self) -> int:
        """Width of the slide embedding: features and encoder output side by side."""
        return int(self.wsi["input_dim"] + self.wsi["embed_dim"])


class ExaonePathConfig(PretrainedConfig):
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
        self.patch_encoder_config = _plain(patch_encoder_config)
        self.slide_encoder_config = _plain(slide_encoder_config)
        self.patch_encoder_subfolder = patch_encoder_subfolder
        self.slide_encoder_subfolder = slide_encoder_subfolder
        super().__init__(
            **_local(
                kwargs,
                "patch_encoder_config",
                "slide_encoder_config",
                "patch_encoder_subfolder",
                "slide_encoder_subfolder",
            )
        )

    def patch_encoder(self) -> ExaonePathPatchEncoderConfig:
        """Configuration of the patch encoder."""
        return ExaonePathPatchEncoderConfig(**self.patch_encoder_config)

    def slide_encoder(self) -> ExaonePathSlideEncoderConfig:
        """Configuration of the slide encoder."""
        return ExaonePathSlideEncoderConfig(**self.slide_encoder_config)


def _plain(config: dict[str, Any] | PretrainedConfig | None) -> dict[str, Any]:
    if isinstance(config, PretrainedConfig):
        config = config.to_diff_dict()
    return {k: v for k, v in (config or {}).items() if k not in ("model_type", "transformers_version")}


def _local(fields: dict[str, Any], *own: str) -> dict[str, Any]:
    """What transformers is left to deal with, without `auto_map`: it points to a repository's own code, and this class
    is what stands in for that. transformers keeps any key; a misspelt one of ours must not be lost in there.
    """
    for key in fields:
        close = difflib.get_close_matches(key, own, n=1, cutoff=0.8)
        if close:
            raise ConfigError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    return {key: value for key, value in fields.items() if key != "auto_map"}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
