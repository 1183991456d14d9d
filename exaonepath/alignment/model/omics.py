"""Encoders of molecular profiles: standardisation of named features, then a linear layer and a SwiGLU FFN.

The names of the features and the statistics of the standardisation are part of the model. So a profile of another
cohort is matched by name, never by column.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from exaonepath.alignment.model.configuration import ExaonePathOmicsEncoderConfig
from exaonepath.alignment.standardization import missing_as_mean, standardized, transformed
from exaonepath.encoders.base import ExaonePathPreTrainedModel
from exaonepath.encoders.block import LayerNorm, Linear, SwiGLU, compute_dtype, stream_dtype
from exaonepath.encoders.loading import weights_fingerprint
from exaonepath.encoders.slide_encoder import ffn_hidden
from exaonepath.errors import ConfigError, SettingsError, WeightsError

_EPS = 1e-5


class OmicsEncoder(nn.Module):
    """h = z + dropout(FFN(norm(z))), z = dropout(W x + b), then a norm (arXiv 2512.14019: "Linear, then SwiGLU FFN").

    x is the standardised profile; a missing value (NaN) counts as the training mean, which is 0. With a foundation
    model, x is its normalised output instead, and its input is the profile as measured. With `ffn_ratio` 0, there is no
    FFN: the encoder is linear up to the norm.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: dict[str, Any], name: str = "omics") -> None:
        super().__init__()
        self.name = name
        self.transform, self.scale, self.clip = cfg["transform"], cfg["scale"], cfg["clip"]
        self.feature_names: tuple[str, ...] = tuple(cfg["feature_names"])
        counted: list[str] | None = cfg["counted_features"]
        #: all features that training added to a patient's total; empty: not known
        self.measured = () if counted is None else (*self.feature_names, *counted)
        self.n_patients: int = cfg["n_patients"]
        self.foundation_cfg: dict[str, Any] | None = cfg["foundation"]
        # The foundation model is frozen, and not part of our checkpoints. A plain list hides it from `parameters()`, so
        # neither the checkpoint nor the optimiser contains it.
        self._foundation: list[nn.Module] = []
        width, n = cfg["embed_dim"], len(self.feature_names)
        if not n and self.foundation_cfg is None:
            raise ConfigError(f"{name}: an encoder needs feature_names, or a foundation model to take its input from")
        if self.foundation_cfg is None:
            self.register_buffer("mean", torch.zeros(n))
            self.register_buffer("std", torch.ones(n))
        else:
            n = self.foundation_cfg["dim"]
            self.foundation_norm = LayerNorm(n, eps=_EPS)
        self.input_drop = nn.Dropout(cfg["input_dropout"])
        self.proj = Linear(n, width)
        self.drop = nn.Dropout(cfg["dropout"])
        self.input_noise: float = cfg["input_noise"]
        self.is_linear: bool = not cfg["ffn_ratio"]
        if not self.is_linear:
            self.ffn_norm = LayerNorm(width, eps=_EPS)
            self.ffn = SwiGLU(width, ffn_hidden(width, cfg["ffn_ratio"], cfg["ffn_layer"]), True, cfg["dropout"])
        self.norm = LayerNorm(width, eps=_EPS)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store mean and standard deviation of the training patients after the transform, float [F] each.

        Raises:
            SettingsError: the number of features is wrong, or a deviation is not positive.
        """
        if self.foundation_cfg is not None:
            raise SettingsError(f"{self.name}: the foundation model takes profiles as measured; nothing to standardise")
        if mean.shape != self.mean.shape or std.shape != self.std.shape:
            raise SettingsError(
                f"{self.name}: statistics of {mean.numel()} and {std.numel()} features for {self.mean.numel()}"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise SettingsError(f"{self.name}: statistics must be finite, and deviations positive")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def standardize(self, values: Tensor, totals: Tensor | None = None) -> Tensor:
        """Convert measured values to inputs of the encoder.

        Args:
            values: [B, F] as measured (in `scale`), in the order of `feature_names`; NaN is missing.
            totals: [B], for counts: the sum over all measured features, also of those that the model does not read;
                default: the sum of `values`.

        Returns:
            [B, F]: transformed, standardised, clipped; 0 for missing values. Unchanged with a foundation model.
        """
        if self.foundation_cfg is not None:
            return values
        x = transformed(values.to(torch.promote_types(values.dtype, torch.float32)), self.transform, totals)
        return standardized(x, self.mean, self.std, self.clip)

    def attach_foundation(self, module: nn.Module) -> None:
        """Attach the frozen foundation model; `module` maps profiles [B, F] to [B, dim].

        Raises:
            SettingsError: this encoder uses no foundation model. WeightsError: this encoder was trained on another one.
        """
        if self.foundation_cfg is None:
            raise SettingsError(f"{self.name}: this encoder reads its features itself and has no foundation model")
        wanted, found = self.foundation_cfg.get("fingerprint"), weights_fingerprint(module)
        if wanted is not None and wanted != found:
            raise WeightsError(
                f"{self.name}: the encoder was trained on a foundation model of fingerprint {wanted[:12]}..., this one "
                f"is {found[:12]}...; attach the model it was trained on"
            )
        self.foundation_cfg["fingerprint"] = found
        self._foundation[:] = [module.requires_grad_(False).eval().to(self.proj.weight.device)]

    def _apply(self, fn: Any, recurse: bool = True) -> OmicsEncoder:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        # Half precision is too inexact for the statistics, so a cast of the model does not change their dtype.
        for name, tensor in self.named_buffers(recurse=False):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before[name].to(tensor.device))
        for module in self._foundation:
            module._apply(fn)
        return self

    def forward(self, profiles: Tensor) -> Tensor:
        """profiles: [B, F] standardised (`standardize`; as measured for a foundation model); returns [B, embed_dim].

        Raises:
            SettingsError: the number of features is wrong, or the foundation model was not attached.
        """
        if profiles.ndim != 2 or (self.feature_names and profiles.shape[1] != len(self.feature_names)):
            raise SettingsError(
                f"{self.name}: profiles must be [B, {len(self.feature_names) or 'F'}], got {list(profiles.shape)}"
            )
        weight = self.proj.weight
        stream = stream_dtype(weight)
        if self.foundation_cfg is None:
            x = missing_as_mean(profiles.to(stream))
        else:
            x = self.foundation_norm(self._through_foundation(profiles).to(stream))
        if self.training and self.input_noise:
            x = x + self.input_noise * torch.randn_like(x)
        z: Tensor = self.drop(self.proj(self.input_drop(x).to(compute_dtype(weight)))).to(stream)
        out: Tensor = self.norm(z if self.is_linear else z + self.ffn(self.ffn_norm(z).to(compute_dtype(weight))))
        return out

    @torch.no_grad()
    def _through_foundation(self, profiles: Tensor) -> Tensor:
        if not self._foundation:
            raise SettingsError(
                f"{self.name}: this encoder needs a frozen foundation model, which is not in the checkpoint; pass it "
                f"to attach_foundation() or from_pretrained(..., foundation=...)"
            )
        assert self.foundation_cfg is not None
        # .eval() at every call, because .train() of a training loop must not switch on the dropout of a frozen model.
        out: Tensor = self._foundation[0].eval()(profiles)
        if out.shape != (profiles.shape[0], self.foundation_cfg["dim"]):
            raise SettingsError(
                f"{self.name}: the foundation model gave {list(out.shape)} for {list(profiles.shape)}; expected "
                f"[{profiles.shape[0]}, {self.foundation_cfg['dim']}]"
            )
        return out


class ExaonePathOmicsEncoderModel(ExaonePathPreTrainedModel):
    """A single omics encoder, with save and load."""

    config_class = ExaonePathOmicsEncoderConfig
    base_model_prefix = "omics_encoder"
    main_input_name = "profiles"
    component_names = ("omics",)

    def __init__(self, config: ExaonePathOmicsEncoderConfig) -> None:
        super().__init__(config)
        self.omics_encoder = OmicsEncoder(config.omics, config.modality)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        foundation: nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load strictly, like the other models; `foundation` is attached to the encoder."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if foundation is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).omics_encoder.attach_foundation(foundation)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the fingerprint of an attached foundation model is written with the configuration."""
        if self.omics_encoder.foundation_cfg is not None:
            self.config.omics_cfg["foundation"] = dict(self.omics_encoder.foundation_cfg)
        return super().save_pretrained(*args, **kwargs)

    def forward(self, profiles: Tensor) -> Tensor:
        """[B, F] profiles, columns in the order of `feature_names`, to embeddings [B, embed_dim]."""
        out: Tensor = self.omics_encoder(profiles)
        return out
