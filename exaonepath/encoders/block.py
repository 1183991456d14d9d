"""Transformer layers of the slide encoder, over packed tokens [T, E]: the mathematics, in module calls only.

The residual stream, norms and softmax statistics stay in float32 for any dtype of the weights, and under autocast: only
matrix products run in half precision. In this file, each parameter is read only by the module that owns it. So hooks,
adapters, quantised and offloaded weights work as in any torch model. `inference` computes the same in less memory, for
encoders without such changes (see `unmodified`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exaonepath.encoders.unmodified import own
from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods
from exaonepath.ops.linear import linear


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of matrix products: autocast's dtype if autocast is on, else that of the weights."""
    if not weight.is_floating_point():  # quantised: the layer gets float32 and converts it as it needs
        return torch.float32
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def stream_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the residual stream: float32, or float64 for a float64 model."""
    return torch.promote_types(weight.dtype, torch.float32)


@own
class Linear(nn.Linear):
    """`nn.Linear` that uses the faster CPU library if no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@own
class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input (the float32 residual stream), for any dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@own
class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, in the dtype of its input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


@own
class RopePeriods(nn.Module):
    """The periods of the rotation, in float32 for any dtype of the model.

    The checkpoint's buffer has priority over the config. Half-precision periods would be wrong by whole radians far
    from the origin. So a cast of the model does not change the buffer. If a buffer was stored in half precision, it
    equals the rounded periods of the config, and the exact periods of the config replace it.
    """

    periods: Tensor

    def __init__(self, head_dim: int, cfg: dict[str, Any]) -> None:
        super().__init__()
        self._from_config = rotary_periods(
            head_dim, cfg["pos_embed_rope_base"], cfg["pos_embed_rope_min_period"], cfg["pos_embed_rope_max_period"]
        )
        self.register_buffer("periods", self._from_config.clone())

    def forward(self) -> Tensor:
        """float64 [D/4] on the CPU."""
        return self.exact(self.periods.detach().cpu())

    def exact(self, stored: Tensor) -> Tensor:
        """float64 [D/4]: the periods that a buffer means. Without a branch on values, so that it can be exported."""
        stored, config = stored.float(), self._from_config.to(stored.device)
        periods = stored.double()
        for half in (torch.bfloat16, torch.float16):
            rounded = (stored == config.to(half).float()).all()
            periods = torch.where(rounded, config.double(), periods)
        return periods

    def reset(self) -> None:
        """Fill the buffer from the config (a checkpoint may omit it)."""
        with torch.no_grad():
            self.periods.copy_(self._from_config)

    def _apply(self, fn: Any, recurse: bool = True) -> RopePeriods:
        # torch calls this for `.to()`, `.half()` and the like. A change of device is kept, a change of dtype is undone.
        before = self.periods
        super()._apply(fn, recurse)
        if self.periods.dtype != before.dtype:
            self.periods = before.to(self.periods.device)
        return self


@own
class Attention(nn.Module):
    """Multi-head attention inside segments; query, key and value projections stacked in `qkv`."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, proj_bias: bool, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, segments: Segments, rotation: Rotation | None, backend: str) -> Tensor:
        qkv = self.split(self.qkv(x))
        attended = fragment_attention(qkv, segments, rotation, backend=backend)
        out: Tensor = self.proj_drop(self.proj(attended.flatten(1)))
        return out

    def split(self, qkv: Tensor) -> Tensor:
        """[T, 3E] to [T, 3, H, D]."""
        return qkv.unflatten(1, (3, self.heads, qkv.shape[1] // (3 * self.heads)))


@own
class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), then dropout."""

    def __init__(self, dim: int, hidden: int, bias: bool, drop: float) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=bias)
        self.w2 = Linear(dim, hidden, bias=bias)
        self.w3 = Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.w3(F.silu(self.w1(x)) * self.w2(x)))
        return out


@own
class Block(nn.Module):
    """Pre-norm transformer block over packed tokens."""

    def __init__(self, cfg: dict[str, Any], hidden: int, norm: type[nn.Module], norm_eps: float) -> None:
        super().__init__()
        dim = cfg["embed_dim"]
        self.norm1 = norm(dim, eps=norm_eps)
        self.attn = Attention(dim, cfg["num_heads"], cfg["qkv_bias"], cfg["proj_bias"], cfg["attn_drop"])
        self.norm2 = norm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, hidden, cfg["ffn_bias"], cfg["ffn_drop"])

    def forward(self, x: Tensor, segments: Segments, rotation: Rotation | None, backend: str) -> Tensor:
        """One block.

        Args:
            x: residual stream [T, E].
            segments: which tokens attend to each other.
            rotation: of queries and keys (RoPE blocks), or None (NoPE blocks).
            backend: attention backend, resolved (not "auto").

        Returns:
            The stream after the block, [T, E].
        """
        dtype = compute_dtype(self.attn.qkv.weight)
        x = x + self.attn(self.norm1(x).to(dtype), segments, rotation, backend)
        x = x + self.mlp(self.norm2(x).to(dtype))
        return x
