"""The patch encoder with its weights converted once, for inference over many batches.

Under autocast, torch converts every weight again in every call, and computes norms in float32: it reads and writes the
tokens several times around each of them. Here weights are converted once. The scale and shift of a norm are linear, so
they are multiplied into the weights of the linear layer that follows, in float32, before these are rounded. What
remains of a norm has no weights and runs in half precision (its statistics are float32 inside torch). The last norm is
computed in float32.

Results differ from those under autocast by rounding only. The copy is of the weights at that time, and only of an
encoder without hooks, adapters or other changes (see `unmodified`).
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exaonepath.encoders.patch_encoder import (
    DIM,
    EPS,
    ExaonePathPatchEncoderModel,
    TokenNorm,
    VisionTransformer,
    VitBlock,
    attend,
)
from exaonepath.encoders.unmodified import is_unmodified
from exaonepath.ops.linear import linear


def can_prepare(model: nn.Module) -> TypeGuard[ExaonePathPatchEncoderModel]:
    """Whether the module is an unmodified patch encoder with weights in float32."""
    return (
        type(model) is ExaonePathPatchEncoderModel
        and is_unmodified(model)
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    )


class PreparedPatchEncoder(nn.Module):
    """Computes what the patch encoder computes, matrix products in `dtype`. It has buffers only, and no gradients.

    Args:
        model: of which `can_prepare` is true.
        dtype: float32, bfloat16 or float16.
    """

    cls_token: Tensor
    projection: Tensor
    projection_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, model: ExaonePathPatchEncoderModel, dtype: torch.dtype) -> None:
        super().__init__()
        backbone = model.patch_encoder.backbone
        assert isinstance(backbone, VisionTransformer)
        self.dtype, self._patch_size = dtype, backbone.patch_size
        self._eager = model.config._attn_implementation == "eager"
        # Not a submodule: only the position embedding of other image sizes is taken from it.
        self._positions = backbone.positions
        with torch.no_grad():
            bias = backbone.patch_embed.proj.bias
            assert bias is not None
            self.register_buffer("projection", backbone.patch_embed.proj.weight.to(dtype))
            self.register_buffer("projection_bias", bias.to(dtype))
            self.register_buffer("cls_token", backbone.cls_token.to(dtype))
            self.blocks = nn.ModuleList(_PreparedBlock(block, dtype) for block in backbone.blocks)
            self.register_buffer("norm_weight", backbone.norm.weight.detach().clone())
            self.register_buffer("norm_bias", backbone.norm.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to float32 [B, 768]; see `ExaonePathPatchEncoderModel.forward`."""
        height, width = x.shape[-2:]
        tokens = F.conv2d(x.to(self.dtype), self.projection, self.projection_bias, stride=self._patch_size)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self._positions(height, width).to(self.dtype)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, self._eager)
        first: Tensor = last(tokens, self._eager, first_only=True)
        return F.layer_norm(first[:, 0].float(), (DIM,), self.norm_weight, self.norm_bias, EPS)


class _PreparedBlock(nn.Module):
    """A block of the ViT whose norms have no weights."""

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(block, VitBlock)
        for name, layer, norm in (
            ("qkv", block.attn.qkv, block.norm1),
            ("proj", block.attn.proj, None),
            ("fc1", block.mlp.fc1, block.norm2),
            ("fc2", block.mlp.fc2, None),
        ):
            weight, bias = _folded(layer, norm)
            self.register_buffer(name, weight.to(dtype))
            self.register_buffer(f"{name}_bias", bias.to(dtype))

    def forward(self, x: Tensor, eager: bool, first_only: bool = False) -> Tensor:
        """The block's output, or that of the first token [B, 1, 768] alone."""
        rows = x[:, :1] if first_only else x
        rows = rows + self._attention(x, eager, first_only)
        hidden = F.gelu(linear(F.layer_norm(rows, (DIM,), eps=EPS), self.fc1, self.fc1_bias))
        return rows + linear(hidden, self.fc2, self.fc2_bias)

    def _attention(self, x: Tensor, eager: bool, first_only: bool) -> Tensor:
        normed = F.layer_norm(x, (DIM,), eps=EPS)
        if first_only:
            query = linear(normed[:, :1], self.qkv[:DIM], self.qkv_bias[:DIM])
            key, value = linear(normed, self.qkv[DIM:], self.qkv_bias[DIM:]).chunk(2, -1)
        else:
            query, key, value = linear(normed, self.qkv, self.qkv_bias).chunk(3, -1)
        return linear(attend(query, key, value, eager), self.proj, self.proj_bias)


def _folded(layer: nn.Linear, norm: TokenNorm | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer after the norm without its own: W (g * n + b) + c = (W g) n + (W b + c)."""
    weight, bias = layer.weight, layer.bias
    if norm is None:
        return weight, bias
    return weight * norm.weight, bias + weight @ norm.bias
