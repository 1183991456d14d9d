"""The patch encoder: a ViT-B/14 from 224 x 224 pixels to 768 numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exaonepath.encoders.base import ExaonePathPreTrainedModel
from exaonepath.encoders.block import Linear
from exaonepath.encoders.configuration import ExaonePathPatchEncoderConfig
from exaonepath.encoders.unmodified import is_unmodified, own
from exaonepath.errors import SettingsError
from exaonepath.ops.linear import linear

DIM, _DEPTH, _HEADS, _MLP, EPS = 768, 12, 12, 3072, 1e-6
# DINO adds this to the grid size before it computes the scale factor of the position embedding. So rounding down inside
# the interpolation cannot lose a row. It also shifts the sampling points, so it is part of the model's definition.
_INTERPOLATE_OFFSET = 0.1


@own
class TokenNorm(nn.LayerNorm):
    """`nn.LayerNorm` as torch computes it. A class of its own, so that `unmodified` does not take it for another's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@own
class PatchProjection(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out.flatten(2).transpose(1, 2)


@own
class SelfAttention(nn.Module):
    """Full self-attention over the tokens of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Linear(DIM, 3 * DIM)
        self.proj = Linear(DIM, DIM)

    def forward(self, x: Tensor, eager: bool) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        projected: Tensor = self.proj(attend(q, k, v, eager))
        return projected

    def first_token(self, x: Tensor, eager: bool) -> Tensor:
        """The first of the tokens that `forward` returns, [B, 1, 768]: its query, and the keys and values of all."""
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(x[:, :1], weight[:DIM], bias[:DIM])
        k, v = linear(x, weight[DIM:], bias[DIM:]).chunk(2, -1)
        projected: Tensor = self.proj(attend(q, k, v, eager))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, eager: bool) -> Tensor:
    """Attention of queries [B, Q, 768] over keys and values [B, T, 768], heads side by side: [B, Q, 768]."""
    q, k, v = (t.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    if eager:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        out = scores.float().softmax(-1).to(v.dtype) @ v if scores.dtype != torch.float64 else scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


@own
class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), exact GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = Linear(DIM, _MLP)
        self.fc2 = Linear(_MLP, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


@own
class VitBlock(nn.Module):
    """Pre-norm ViT block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = TokenNorm(DIM, eps=EPS)
        self.attn = SelfAttention()
        self.norm2 = TokenNorm(DIM, eps=EPS)
        self.mlp = Mlp()

    def forward(self, x: Tensor, eager: bool) -> Tensor:
        x = x + self.attn(self.norm1(x), eager)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def first_token(self, x: Tensor, eager: bool) -> Tensor:
        """The first of the tokens [B, 1, 768] that `forward` returns, in a sixth of the operations.

        Only for an unmodified block: hooks and replaced modules expect all tokens, and the weight of `qkv` is read.
        """
        first = x[:, :1] + self.attn.first_token(self.norm1(x), eager)
        out: Tensor = first + self.mlp(self.norm2(first))
        return out


@own
class VisionTransformer(nn.Module):
    """ViT-B with a CLS token and a learned absolute position embedding."""

    def __init__(self, patch_size: int, img_size: list[int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], DIM))
        self.patch_embed = PatchProjection(patch_size)
        self.blocks = nn.ModuleList(VitBlock() for _ in range(_DEPTH))
        self.norm = TokenNorm(DIM, eps=EPS)

    def forward(self, x: Tensor, eager: bool) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        tokens = tokens + self.positions(height, width).to(tokens.dtype)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, eager)
        # Only the CLS token is returned, so the last block computes its query, output and MLP for no other token. (The
        # class is compared for the type checker: `is_unmodified` accepts any class that is decorated with `own`.)
        if isinstance(last, VitBlock) and is_unmodified(last):
            tokens = last.first_token(tokens, eager)
        else:
            tokens = last(tokens, eager)
        # The norm acts on each token alone.
        out: Tensor = self.norm(tokens[:, 0])
        return out

    def positions(self, height: int, width: int) -> Tensor:
        rows, columns = height // self.patch_size, width // self.patch_size
        if (rows, columns) == self.grid:
            return self.pos_embed
        wide = torch.promote_types(self.pos_embed.dtype, torch.float32)
        grid = self.pos_embed[:, 1:].to(wide).view(1, *self.grid, DIM).permute(0, 3, 1, 2)
        factors = tuple((n + _INTERPOLATE_OFFSET) / own for n, own in zip((rows, columns), self.grid, strict=True))
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1].to(wide), grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


@own
class _PatchEncoder(nn.Module):
    """One level of the published parameter names (`patch_encoder.backbone`)."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone


@own
class ExaonePathPatchEncoderModel(ExaonePathPreTrainedModel):
    """Patch encoder under the published parameter names (`patch_encoder.backbone.*`)."""

    config_class = ExaonePathPatchEncoderConfig
    base_model_prefix = "patch_encoder"
    main_input_name = "pixel_values"
    component_names = ("patch", "patch-encoder", "patch_encoder")
    _no_split_modules = ["VitBlock"]  # noqa: RUF012

    def __init__(self, config: ExaonePathPatchEncoderConfig) -> None:
        super().__init__(config)
        self.patch_encoder = _PatchEncoder(VisionTransformer(config.patch_size, config.img_size))
        self.post_init()

    def forward(self, x: Tensor | None = None, *, pixel_values: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Embed images.

        Args:
            x, pixel_values: [B, 3, H, W], preprocessed (ImageNet mean and std); two names of one argument. H and W are
                multiples of the patch size. If they differ from the config, the position embedding is resized
                bicubically.

        Returns:
            [B, 768], the normalised CLS token.

        Raises:
            SettingsError: not exactly one of the two is given, or the shape is wrong.
        """
        if kwargs:
            raise SettingsError(f"unknown arguments: {', '.join(sorted(kwargs))}")
        if (x is None) == (pixel_values is None):
            raise SettingsError("give the images once, as x or as pixel_values")
        images = x if x is not None else pixel_values
        assert images is not None
        size = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % size or images.shape[3] % size:
            raise SettingsError(
                f"images must be [B, 3, H, W] with H and W multiples of {size}, got {list(images.shape)}"
            )
        if 0 in images.shape[2:]:
            raise SettingsError(f"images are empty: {list(images.shape)}")
        backbone = self.patch_encoder.backbone
        weight = backbone.patch_embed.proj.weight
        if not torch.is_autocast_enabled(images.device.type):
            images = images.to(weight.dtype)
        embedding: Tensor = backbone(images, self.config._attn_implementation == "eager")
        return embedding
