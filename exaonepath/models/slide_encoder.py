"""The slide encoder (EXAONE Path 2.5, arXiv 2512.14019): patch features to patch and slide embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from exaonepath.errors import SettingsError
from exaonepath.models.base import ExaonePathPreTrainedModel
from exaonepath.models.configuration import FFN_ALIGN, ExaonePathSlideEncoderConfig
from exaonepath.models.layers import Block, LayerNorm, Linear, RMSNorm, RopePeriods, compute_dtype, stream_dtype
from exaonepath.ops import FragmentLayout, Rotation, build_fragment_layout

_EPS = 1e-5  # of every norm, layer norm or RMS norm


@dataclass
class SlideEncoderOutput(ModelOutput):
    """Embeddings of a batch of slides; readable as attributes, as keys, and as a tuple.

    Attributes:
        patch_embedding: [B, N, C + E], the features beside the encoder's output; encoder half 0 at padded patches.
        slide_embedding: [B, C + E], mean over valid patches; 0 for a slide without any.
    """

    patch_embedding: Tensor | None = None
    slide_embedding: Tensor | None = None


def ffn_hidden(embed_dim: int, ffn_ratio: float, ffn_layer: str) -> int:
    """SwiGLU hidden width: two thirds of the plain width, rounded up to the layer's multiple."""
    align = FFN_ALIGN[ffn_layer]
    hidden = int(int(embed_dim * ffn_ratio) * 2 / 3)
    return -(-hidden // align) * align


class PatchEmbed(nn.Module):
    """Linear projection of patch features, with an optional layer norm."""

    def __init__(self, input_dim: int, embed_dim: int, use_norm: bool) -> None:
        super().__init__()
        self.proj = Linear(input_dim, embed_dim)
        self.norm = LayerNorm(embed_dim, eps=_EPS) if use_norm else nn.Identity()

    def forward(self, features: Tensor, dtype: torch.dtype, stream: torch.dtype) -> Tensor:
        out: Tensor = self.norm(self.proj(features.to(dtype)).to(stream))
        return out


class SlideTransformer(nn.Module):
    """CLS and storage tokens, then patches; blocks without positions alternate with fragment-wise RoPE blocks."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        dim = cfg["embed_dim"]
        self.cfg = cfg
        self.n_prefix = 1 + cfg["n_storage_tokens"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if cfg["n_storage_tokens"]:
            self.storage_tokens = nn.Parameter(torch.zeros(1, cfg["n_storage_tokens"], dim))
        self.patch_embed = PatchEmbed(cfg["input_dim"], dim, cfg["embed_use_norm"])
        self.rope_embed = RopePeriods(dim // cfg["num_heads"], cfg)
        norm = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[cfg["norm_layer"]]
        hidden = ffn_hidden(dim, cfg["ffn_ratio"], cfg["ffn_layer"])
        self.blocks = nn.ModuleList(Block(cfg, hidden, norm, _EPS) for _ in range(cfg["depth"]))
        self.norm = norm(dim, eps=_EPS)

    def forward(self, features: Tensor, layout: FragmentLayout, coords: Tensor | None, backend: str) -> Tensor:
        """features [B, N, C] to the encoder's output [B, N, E], 0 at padded patches."""
        x, rotation = self._embed(features, layout, coords)
        for i, block in enumerate(self.blocks):
            if i % self.cfg["nope_interval"] == 0:
                x = block(x, layout.slides, None, backend)
            else:
                x = block(x, layout.fragments, rotation, backend)
        return layout.unpack_patches(self.norm(x))

    def _embed(self, features: Tensor, layout: FragmentLayout, coords: Tensor | None) -> tuple[Tensor, Rotation | None]:
        is_prefix = layout.is_prefix
        patch_positions = (~is_prefix).nonzero().view(-1)
        prefix_positions = is_prefix.nonzero().view(-1)
        rows = layout.patch_rows[patch_positions]
        weight = self.patch_embed.proj.weight
        stream = stream_dtype(weight)

        tokens: list[Tensor] = [self.cls_token, *([self.storage_tokens] if self.cfg["n_storage_tokens"] else [])]
        prefix = torch.cat(tokens, 1)[0].to(stream)
        prefix = prefix[layout.source[prefix_positions] % (layout.n_prefix + layout.n_patches)]
        patches = self.patch_embed(features.flatten(0, 1)[rows], compute_dtype(weight), stream)
        x = prefix.new_zeros((layout.source.numel(), prefix.shape[-1]))
        x = x.index_copy(0, prefix_positions, prefix).index_copy(0, patch_positions, patches.to(stream))
        if coords is None:
            return x, None

        valid_coords = coords.flatten(0, 1)[rows].to(torch.float64)
        if not torch.isfinite(valid_coords).all():
            raise SettingsError("patch_coords holds a non-finite value at a valid patch")
        patch_rotation = Rotation.from_coords(valid_coords, self.rope_embed.exact(), self.cfg["patch_size"])
        # Position 0 is an angle of 0: prefix tokens come out of the rotation as they went in.
        positions = patch_rotation.positions.new_zeros((x.shape[0], 2))
        positions[patch_positions] = patch_rotation.positions
        return x, Rotation(positions, patch_rotation.periods)


class _WsiEncoder(nn.Module):
    """A level of the published parameter names."""

    def __init__(self, transformer: SlideTransformer) -> None:
        super().__init__()
        self.transformer = transformer


class _SlideEncoder(nn.Module):
    """A level of the published parameter names."""

    def __init__(self, transformer: SlideTransformer) -> None:
        super().__init__()
        self.wsi_encoder = _WsiEncoder(transformer)


class ExaonePathSlideEncoderModel(ExaonePathPreTrainedModel):
    """Slide encoder under the published parameter names (`slide_encoder.wsi_encoder.transformer.*`)."""

    config_class = ExaonePathSlideEncoderConfig
    base_model_prefix = "slide_encoder"
    main_input_name = "patch_features"
    component_names = ("slide", "slide-encoder", "slide_encoder", "wsi")
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: ExaonePathSlideEncoderConfig) -> None:
        super().__init__(config)
        self.slide_encoder = _SlideEncoder(SlideTransformer(config.wsi))
        self.post_init()

    @property
    def transformer(self) -> SlideTransformer:
        """The transformer inside the published nesting of names."""
        return self.slide_encoder.wsi_encoder.transformer

    def forward(
        self,
        patch_features: Tensor,
        patch_mask: Tensor | None = None,
        patch_coords: Tensor | None = None,
        patch_contour_index: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SlideEncoderOutput | tuple[Tensor, Tensor]:
        """Encode a batch of slides.

        Args:
            patch_features: [B, N, C], features of the patch encoder. Values at padded patches have no influence.
            patch_mask: [B, N], bool or number (0 is padding); None: every patch is valid.
            patch_coords: [B, N, 2], (x, y) of each patch's top left corner in level-0 pixels; None: no rotation.
            patch_contour_index: [B, N], tissue fragment of each patch (-1 joins the prefix tokens); None: no fragment
                restriction.
            return_dict: False returns a plain tuple.

        Returns:
            `SlideEncoderOutput`, in the wider dtype of features and weights.

        Raises:
            SettingsError: shapes that do not fit, or non-finite coordinates.
        """
        mask = self._check(patch_features, patch_mask, patch_coords, patch_contour_index)
        layout = build_fragment_layout(self.transformer.n_prefix, mask, patch_contour_index)
        encoded = self.transformer(patch_features, layout, patch_coords, self.config._attn_implementation)

        dtype = torch.promote_types(patch_features.dtype, self.dtype)
        valid = mask[:, :, None]
        count = mask.sum(1, keepdim=True).clamp(min=1)
        features_mean = _sum_valid(patch_features, valid) / count
        encoded_mean = encoded.sum(1) / count  # padded rows are 0
        slide_embedding = torch.cat([features_mean.to(encoded.dtype), encoded_mean], -1).to(dtype)
        features = torch.where(valid | torch.isfinite(patch_features), patch_features, 0)
        patch_embedding = torch.cat([features.to(dtype), encoded.to(dtype)], -1)
        output = SlideEncoderOutput(patch_embedding=patch_embedding, slide_embedding=slide_embedding)
        return output.to_tuple() if return_dict is False else output

    def _check(self, features: Tensor, mask: Tensor | None, coords: Tensor | None, contour: Tensor | None) -> Tensor:
        width = self.config.wsi["input_dim"]
        if features.ndim != 3 or features.shape[-1] != width or not features.is_floating_point():
            raise SettingsError(
                f"patch_features must be floating point [B, N, {width}], got {features.dtype} {list(features.shape)}"
            )
        shape = features.shape[:2]
        for name, tensor, wanted in (
            ("patch_mask", mask, shape),
            ("patch_coords", coords, (*shape, 2)),
            ("patch_contour_index", contour, shape),
        ):
            if tensor is not None and tensor.shape != wanted:
                raise SettingsError(f"{name} must be {list(wanted)} to match patch_features, got {list(tensor.shape)}")
            if tensor is not None and tensor.device != features.device:
                raise SettingsError(f"{name} is on {tensor.device}, but patch_features is on {features.device}")
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=features.device)
        return mask if mask.dtype == torch.bool else mask != 0


def _sum_valid(x: Tensor, valid: Tensor) -> Tensor:
    """Sum over patches [B, N, C] where valid [B, N, 1], in float32 or wider; padded values (NaN, inf) are left out."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.where(valid, x, 0).sum(1, dtype=wide)
