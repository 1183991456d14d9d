"""Configurations of the omics encoders and of the model that aligns them with slides (arXiv 2512.14019)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from exaonepath.alignment.modalities import ROPE_MODES, WSI, in_order, name_problem
from exaonepath.encoders.base_configuration import ExaonePathPretrainedConfig, check_size, is_integer
from exaonepath.encoders.configuration import FFN_ALIGN, complete_wsi_cfg, ffn_parameters, wsi_parameters
from exaonepath.errors import ConfigError
from exaonepath.files.strict_json import shown
from exaonepath.text import close_to

TRANSFORMS = ("none", "log1p", "cpm_log1p")

_MAX_WIDTH = 2**16
_MAX_FFN_RATIO = 1024
_MAX_NOISE = 100  # in standard deviations of the inputs
_MAX_FOUNDATION = 2**20
_MAX_MODALITIES = 32
_MAX_PATIENTS = 2**31

_OMICS_DEFAULTS: dict[str, Any] = {
    "feature_names": [],
    "scale": "any",
    "transform": "none",
    "clip": None,
    "counted_features": None,
    "n_patients": 0,
    "embed_dim": 256,
    "ffn_ratio": 4.0,
    "ffn_layer": "swiglu",
    "dropout": 0.1,
    "input_dropout": 0.0,
    "input_noise": 0.0,
    "foundation": None,
}


def complete_omics_cfg(cfg: Mapping[str, Any], where: str = "omics encoder") -> dict[str, Any]:
    """An omics encoder's settings with defaults filled in and checked.

    Keys: `feature_names` (the manifest, in the order of the weights), `scale` (scale of the measured values: "tpm",
    "beta", ...), `transform` ("none", "log1p", "cpm_log1p": applied before standardisation), `clip` (bound of the
    standardised values, or None), `counted_features` (for counts: features in addition to `feature_names` that are part
    of a patient's total in training; None: not known), `n_patients` (number of patients of the statistics; 0: not
    known), `embed_dim` (width of the embedding), `ffn_ratio` and `ffn_layer` (SwiGLU hidden width, as in the slide
    encoder; ratio 0: no FFN, a linear encoder), `dropout` (on the embedding and after the FFN), `input_dropout` (share
    of input features set to their training mean in training), `input_noise` (standard deviation of the noise that is
    added to the standardised inputs in training), `foundation` (None, or {"dim": width of its output, "fingerprint": of
    its weights, or None}).

    Raises:
        ConfigError: a key is unknown, or no encoder can be built from a value.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{where}: settings must be a mapping, got {shown(cfg)}")
    for key in cfg:
        if key not in _OMICS_DEFAULTS:
            raise ConfigError(f"{where}: unknown key {shown(key)}{close_to(str(key)[:80], _OMICS_DEFAULTS)}")
    out = {**_OMICS_DEFAULTS, **cfg}
    if isinstance(out["feature_names"], str | Mapping) or not isinstance(out["feature_names"], Iterable):
        raise ConfigError(f"{where}: feature_names must be a list of names, got {shown(out['feature_names'])}")
    names = out["feature_names"] = [str(name) for name in out["feature_names"]]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(f"{where}: {len(twice)} feature names occur twice: {', '.join(twice[:5])}")
    counted = out["counted_features"]
    if counted is not None:
        if isinstance(counted, str | Mapping) or not isinstance(counted, Iterable):
            raise ConfigError(f"{where}: counted_features must be a list of names, or null, got {shown(counted)}")
        out["counted_features"] = [str(name) for name in counted]
    if not is_integer(out["n_patients"], 0, _MAX_PATIENTS):
        raise ConfigError(f"{where}: n_patients must be an integer, 0 or more, got {shown(out['n_patients'])}")
    if not is_integer(out["embed_dim"], 1, _MAX_WIDTH):
        raise ConfigError(
            f"{where}: embed_dim must be an integer from 1 to {_MAX_WIDTH}, got {shown(out['embed_dim'])}"
        )
    if out["ffn_layer"] not in tuple(FFN_ALIGN):
        raise ConfigError(f"{where}: ffn_layer must be one of {', '.join(FFN_ALIGN)}, got {shown(out['ffn_layer'])}")
    if not _is_number(out["ffn_ratio"]) or not 0 <= out["ffn_ratio"] <= _MAX_FFN_RATIO:
        raise ConfigError(
            f"{where}: ffn_ratio must be a number from 0 (linear) to {_MAX_FFN_RATIO}, got {shown(out['ffn_ratio'])}"
        )
    if not _is_number(out["input_noise"]) or not 0 <= out["input_noise"] <= _MAX_NOISE:
        raise ConfigError(
            f"{where}: input_noise must be a number from 0 to {_MAX_NOISE}, got {shown(out['input_noise'])}"
        )
    for key in ("dropout", "input_dropout"):
        if not _is_number(out[key]) or not 0 <= out[key] < 1:
            raise ConfigError(f"{where}: {key} must be in [0, 1), got {shown(out[key])}")
    if out["transform"] not in TRANSFORMS:
        raise ConfigError(f"{where}: transform must be one of {', '.join(TRANSFORMS)}, got {shown(out['transform'])}")
    if out["clip"] is not None and not (_is_number(out["clip"]) and out["clip"] > 0):
        raise ConfigError(f"{where}: clip must be positive or null, got {shown(out['clip'])}")
    foundation = out["foundation"]
    if foundation is not None and (
        not isinstance(foundation, Mapping)
        or set(foundation) - {"dim", "fingerprint"}
        or not is_integer(foundation.get("dim"), 1, _MAX_FOUNDATION)
        or not isinstance(foundation.get("fingerprint"), str | None)
    ):
        raise ConfigError(f'{where}: foundation must be {{"dim": width, "fingerprint": hash or null}}')
    check_size(_omics_parameters(out), f"the encoder of {where}")
    return out


def _omics_parameters(cfg: Mapping[str, Any]) -> int:
    """Approximate number of parameters of the encoder with completed settings."""
    inputs = cfg["foundation"]["dim"] if cfg["foundation"] else len(cfg["feature_names"])
    return int(cfg["embed_dim"] * inputs) + ffn_parameters(cfg["embed_dim"], cfg["ffn_ratio"])


class ExaonePathOmicsEncoderConfig(ExaonePathPretrainedConfig):
    """Encoder of one molecular modality; `omics_cfg` is kept as given, `omics` is its completed, checked form."""

    model_type = "exaonepath_omics_encoder"

    def __init__(self, modality: str = "rna", omics_cfg: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not isinstance(modality, str):
            raise ConfigError(f"modality must be a name, got {shown(modality)}")
        complete_omics_cfg(omics_cfg or {}, modality)
        self.modality = modality
        self.omics_cfg = dict(omics_cfg or {})
        super().__init__(**self.check_others(kwargs, "modality", "omics_cfg"))

    @property
    def omics(self) -> dict[str, Any]:
        """`omics_cfg` with every default filled in."""
        return complete_omics_cfg(self.omics_cfg, self.modality)

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return int(self.omics["embed_dim"])


class ExaonePathAlignmentConfig(ExaonePathPretrainedConfig):
    """Slide encoder, omics encoders and the pairwise loss over them.

    Args:
        wsi_cfg: settings of the slide encoder; None: the model has no slides (molecular modalities only).
        omics: settings of the encoder of each molecular modality, by name (`complete_omics_cfg`).
        projection_dim: d, the width of each pair's shared space.
        rope_mode: a key of `ROPE_MODES`.
        loss: "sigmoid" (arXiv 2512.14019) or "softmax" (CLIP, for comparison).
        pairs: "all" pairs of modalities, or "wsi": only those with the slide.
        pos_weight: None, a number, or "balanced" (see `PairwiseSigmoidLoss`).
        pair_weights: factor on a pair's loss, by "a-b"; 1 if absent.
        provenance: origin of the weights (hashes of settings and data); no effect.
    """

    model_type = "exaonepath_alignment"

    def __init__(
        self,
        wsi_cfg: dict[str, Any] | None = None,
        omics: dict[str, dict[str, Any]] | None = None,
        projection_dim: int = 256,
        rope_mode: str = "full",
        loss: str = "sigmoid",
        pairs: str = "all",
        pos_weight: float | str | None = None,
        pair_weights: dict[str, float] | None = None,
        provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if wsi_cfg is not None:
            complete_wsi_cfg(wsi_cfg)
        if not is_integer(projection_dim, 1, _MAX_WIDTH):
            raise ConfigError(f"projection_dim must be an integer from 1 to {_MAX_WIDTH}, got {shown(projection_dim)}")
        for key, value, choices in (
            ("rope_mode", rope_mode, ROPE_MODES),
            ("loss", loss, ("sigmoid", "softmax")),
            ("pairs", pairs, ("all", "wsi")),
        ):
            if value not in tuple(choices):
                raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {shown(value)}")
        for key, mapping in (("omics", omics), ("pair_weights", pair_weights), ("provenance", provenance)):
            if mapping is not None and not isinstance(mapping, Mapping):
                raise ConfigError(f"{key} must be a mapping, got {shown(mapping)}")
        if len(omics or {}) > _MAX_MODALITIES:
            raise ConfigError(f"omics: {len(omics or {}):,} modalities, more than the {_MAX_MODALITIES} allowed")
        if isinstance(pos_weight, str) and pos_weight != "balanced":
            raise ConfigError(f'pos_weight as text can be "balanced" alone, got {shown(pos_weight)}')
        if (
            pos_weight is not None
            and not isinstance(pos_weight, str)
            and not (_is_number(pos_weight) and pos_weight > 0)
        ):
            raise ConfigError(f'pos_weight must be null, a positive number or "balanced", got {shown(pos_weight)}')
        for name, cfg in (omics or {}).items():
            _check_modality_name(name)
            complete_omics_cfg(cfg, name)
        self.wsi_cfg = None if wsi_cfg is None else dict(wsi_cfg)
        self.omics = {name: dict(cfg) for name, cfg in (omics or {}).items()}
        self.projection_dim = projection_dim
        self.rope_mode = rope_mode
        self.loss = loss
        self.pairs = pairs
        self.pos_weight = pos_weight
        self.pair_weights = dict(pair_weights or {})
        self.provenance = dict(provenance or {})
        known = {f"{a}-{b}" for a, b in self.modality_pairs}
        for name, weight in self.pair_weights.items():
            if name not in known:
                raise ConfigError(
                    f"pair_weights: no pair {shown(name)}; pairs are {', '.join(sorted(known)) or 'none'}"
                )
            if not _is_number(weight) or weight < 0:
                raise ConfigError(f"pair_weights[{name!r}] must be a number >= 0, got {shown(weight)}")
        check_size(self._parameters(), "the model")
        own = ("wsi_cfg", "omics", "projection_dim", "rope_mode", "loss", "pairs", "pos_weight", "pair_weights")
        super().__init__(**self.check_others(kwargs, *own, "provenance"))

    def _parameters(self) -> int:
        slide = 0 if self.wsi_cfg is None else wsi_parameters(complete_wsi_cfg(self.wsi_cfg))
        profiles = sum(_omics_parameters(complete_omics_cfg(cfg, name)) for name, cfg in self.omics.items())
        # Each modality has one projection for every other.
        projections = sum(self.widths.values()) * max(len(self.modalities) - 1, 0) * self.projection_dim
        return slide + profiles + projections

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities: the slide, the four of the paper in its order, then any others by name."""
        return ((WSI,) if self.wsi_cfg is not None else ()) + in_order(self.omics)

    @property
    def modality_pairs(self) -> tuple[tuple[str, str], ...]:
        """Every unordered pair of modalities, in their order."""
        names = self.modalities
        return tuple((a, b) for i, a in enumerate(names) for b in names[i + 1 :])

    @property
    def widths(self) -> dict[str, int]:
        """Width of the embedding of each modality."""
        widths = {name: int(complete_omics_cfg(self.omics[name], name)["embed_dim"]) for name in self.omics}
        if self.wsi_cfg is not None:
            wsi = complete_wsi_cfg(self.wsi_cfg)
            widths[WSI] = wsi["input_dim"] + wsi["embed_dim"]
        return {name: widths[name] for name in self.modalities}


def _check_modality_name(name: object) -> None:
    """Raise `ConfigError` if a modality of this name has no unambiguous parameter names."""
    problem = name_problem(name) if isinstance(name, str) else "a name must be text"
    if problem is None:
        from torch import nn

        # The encoders are attributes of a ModuleDict, which has methods of these names.
        problem = "torch uses this name" if hasattr(nn.ModuleDict, str(name)) else None
    if problem:
        raise ConfigError(
            f"{shown(name)} cannot name a molecular modality ({problem}); use rna, snp, cnv, methylation or a word"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
