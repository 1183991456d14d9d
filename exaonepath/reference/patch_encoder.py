"""The patch encoder (ViT-B/14, 224 x 224) as straight-line torch, attention written out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_HEADS, _DEPTH, _PATCH, _EPS = 12, 12, 14, 1e-6


def patch_encoder(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Embed images.

    Args:
        state: parameters by name, without the prefix `patch_encoder.backbone.`, in the images' dtype.
        images: [B, 3, 224, 224], preprocessed.

    Returns:
        [B, 768]
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], _EPS)

    projection = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, *projection, stride=_PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for i in range(_DEPTH):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]
