"""The slide encoder in simple torch code: padded tokens, dense [T, T] mask, float64 by default.

It is also the baseline of the benchmarks: with `attention=sdpa_dense_mask` it computes a slide as the published
encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exaonepath.reference.fragment_attention import rotate

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v over [B, H, T, D] with bool mask [B, 1, T, T]; rows without a key give 0."""
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0) @ v


def sdpa_dense_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's SDPA with the dense mask: no flash kernel on a GPU accepts one."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def slide_encoder(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    features: Tensor,
    mask: Tensor,
    coords: Tensor | None = None,
    contour_index: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    attention: Attention = explicit_attention,
) -> tuple[Tensor, Tensor]:
    """Forward pass of the slide encoder.

    Args:
        state: parameters by name, without the prefix `slide_encoder.wsi_encoder.transformer.`.
        config: `wsi_cfg` with every default filled in, and `periods`: float64 [D/4].
        features: [B, N, C]; mask: bool [B, N]; coords: [B, N, 2] or None; contour_index: [B, N] or None.
        dtype: dtype of parameters and activations.

    Returns:
        (patch embedding [B, N, C + E], slide embedding [B, C + E]); undefined at padded patches.
    """
    p = {name: tensor.to(features.device, dtype) for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(x: Tensor, name: str, kind: str, eps: float) -> Tensor:
        if kind == "rmsnorm":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * p[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    features = features.to(dtype)
    batch, n = mask.shape
    heads, embed = config["num_heads"], config["embed_dim"]
    e = linear(features, "patch_embed.proj")
    if config["embed_use_norm"]:
        e = norm(e, "patch_embed.norm", "layernorm", 1e-5)
    prefix = [p["cls_token"]] + ([p["storage_tokens"]] if config["n_storage_tokens"] else [])
    x = torch.cat([t.expand(batch, -1, -1) for t in prefix] + [e], 1)
    n_prefix = x.shape[1] - n

    valid = torch.cat([mask.new_ones(batch, n_prefix), mask], 1)
    key_mask = valid[:, None, None, :].expand(-1, 1, n_prefix + n, -1)
    fragment_mask = key_mask
    if contour_index is not None:
        contour = torch.cat([contour_index.new_full((batch, n_prefix), -1), contour_index], 1)
        fragment_mask = key_mask & (contour[:, None, :, None] == contour[:, None, None, :])
    positions = None
    if coords is not None:
        half = config["patch_size"] // 2
        u = (coords.double() + half) / config["patch_size"]
        positions = torch.cat([u.new_zeros(batch, n_prefix, 2), u], 1).flatten(0, 1)

    kind = config["norm_layer"]
    eps = config["norm_eps"]
    for i in range(config["depth"]):
        rope = i % config["nope_interval"] != 0
        h = norm(x, f"blocks.{i}.norm1", kind, eps)
        q, k, v = linear(h, f"blocks.{i}.attn.qkv").view(batch, -1, 3, heads, embed // heads).unbind(2)
        if rope and positions is not None:
            q, k = (rotate(t.flatten(0, 1), positions, config["periods"]).view_as(t) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        a = attention(q, k, v, fragment_mask if rope else key_mask)
        x = x + linear(a.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        h = norm(x, f"blocks.{i}.norm2", kind, eps)
        x = x + linear(F.silu(linear(h, f"blocks.{i}.mlp.w1")) * linear(h, f"blocks.{i}.mlp.w2"), f"blocks.{i}.mlp.w3")
    x = norm(x, "norm", kind, eps)[:, n_prefix:]

    both = torch.cat([features, x], -1)
    weights = mask[:, :, None].to(dtype)
    return both, (both * weights).sum(1) / weights.sum(1).clamp(min=1)
