"""Transformer layers of the slide encoder, over packed tokens [T, E].

The residual stream, norms and softmax statistics stay in float32 whatever the dtype of the weights, autocast included:
only matrix products run in half precision. Without autograd a block works on the token buffer in place: beside it exist
the keys and values of all tokens, and for everything else only a chunk of rows (see `memory_plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exaonepath.models.row_checkpoint import by_rows
from exaonepath.ops import Rotation, Segments, fragment_attention
from exaonepath.ops.attend_rows import RowChunk, attend_rows, cut_rows, rotate_rows
from exaonepath.ops.cpu_linear import linear
from exaonepath.ops.rotary import rotary_periods


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype matrix products run in: autocast's where it is on, else the weights' own."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def stream_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the residual stream: float32, or float64 for a float64 model."""
    return torch.promote_types(weight.dtype, torch.float32)


class Linear(nn.Linear):
    """`nn.Linear` that picks the faster CPU library without autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input (the float32 residual stream), whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, in the dtype of its input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class RopePeriods(nn.Module):
    """The rotation's periods, float32 whatever the dtype of the model.

    The checkpoint's buffer decides. Half-precision periods would be wrong by whole radians far from the origin, so
    casting the model leaves the buffer alone, and a buffer that was stored in half precision is recognised as the
    rounded form of what the config states and replaced by it.
    """

    periods: Tensor

    def __init__(self, head_dim: int, cfg: dict[str, Any]) -> None:
        super().__init__()
        self._from_config = rotary_periods(
            head_dim, cfg["pos_embed_rope_base"], cfg["pos_embed_rope_min_period"], cfg["pos_embed_rope_max_period"]
        )
        self.register_buffer("periods", self._from_config.clone())

    def reset(self) -> None:
        """Fill the buffer from the config (a checkpoint may leave it out)."""
        with torch.no_grad():
            self.periods.copy_(self._from_config)

    def exact(self) -> Tensor:
        """float64 [D/4] on the CPU."""
        stored = self.periods.detach().cpu().float()
        for half in (torch.bfloat16, torch.float16):
            if torch.equal(stored, self._from_config.to(half).float()):
                return self._from_config.double()
        return stored.double()

    def _apply(self, fn: Any, recurse: bool = True) -> RopePeriods:
        before = self.periods
        super()._apply(fn, recurse)
        if self.periods.dtype != before.dtype:
            self.periods = before.to(self.periods.device)
        return self


class Attention(nn.Module):
    """Multi-head attention inside segments; query, key and value projections stacked in `qkv`."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, proj_bias: bool, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(drop)

    def split(self, qkv: Tensor) -> Tensor:
        """[T, 3E] to [T, 3, H, D]."""
        return qkv.unflatten(1, (3, self.heads, qkv.shape[1] // (3 * self.heads)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), then dropout."""

    def __init__(self, dim: int, hidden: int, bias: bool, drop: float) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=bias)
        self.w2 = Linear(dim, hidden, bias=bias)
        self.w3 = Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_layers(x, self.w1, self.w2, self.w3)

    def with_weights(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """This module as a function of inputs in `dtype`, weights cast once (see `projection`)."""
        if not _is_own(self, SwiGLU):
            return self
        w1, w2, w3 = (projection(layer, dtype) for layer in (self.w1, self.w2, self.w3))
        return lambda x: self._apply_layers(x, w1, w2, w3)

    def _apply_layers(
        self, x: Tensor, w1: Callable[..., Tensor], w2: Callable[..., Tensor], w3: Callable[..., Tensor]
    ) -> Tensor:
        gate = w1(x)
        inplace = not torch.is_grad_enabled()
        gate = F.silu(gate, inplace=inplace)
        hidden = gate.mul_(w2(x)) if inplace else gate * w2(x)
        out: Tensor = self.drop(w3(hidden))
        return out


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens."""

    def __init__(self, cfg: dict[str, Any], hidden: int, norm: type[nn.Module], norm_eps: float) -> None:
        super().__init__()
        dim = cfg["embed_dim"]
        self.norm1 = norm(dim, eps=norm_eps)
        self.attn = Attention(dim, cfg["num_heads"], cfg["qkv_bias"], cfg["proj_bias"], cfg["attn_drop"])
        self.norm2 = norm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, hidden, cfg["ffn_bias"], cfg["ffn_drop"])

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        rotation: Rotation | None,
        backend: str,
        chunks: Sequence[RowChunk] | None = None,
        rows: int | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """One block.

        Args:
            x: residual stream [T, E]. Without autograd it is overwritten with the result.
            segments: which tokens attend to each other.
            rotation: of queries and keys (RoPE blocks), or None (NoPE blocks).
            backend: of attention, a resolved one.
            chunks: without autograd, queries that attend together; None: all at once.
            rows: rows that go through the linear layers together; None: all at once.
            recompute: under autograd, keep nothing of the linear layers and compute it again in the backward pass.

        Returns:
            The stream after the block, [T, E].
        """
        rows = max(1, x.shape[0]) if rows is None else rows
        if torch.is_grad_enabled():
            return self._forward_train(x, segments, rotation, backend, rows, recompute)
        if chunks is None:
            chunks = cut_rows(segments, max(1, x.shape[0]))
        return self._forward_inplace(x, segments, rotation, backend, chunks, rows)

    def _forward_inplace(
        self,
        x: Tensor,
        segments: Segments,
        rotation: Rotation | None,
        backend: str,
        chunks: Sequence[RowChunk],
        rows: int,
    ) -> Tensor:
        tokens, width = x.shape
        heads, dtype = self.attn.heads, compute_dtype(self.attn.qkv.weight)
        to_queries = projection(self.attn.qkv, dtype, slice(None, width))
        to_keys_values = projection(self.attn.qkv, dtype, slice(width, None))
        proj = projection(self.attn.proj, dtype)
        mlp = self.mlp.with_weights(dtype)

        keys_values = torch.empty((tokens, 2, heads, width // heads), dtype=dtype, device=x.device)
        largest = max([0, *[chunk.count for chunk in chunks]])
        queries = torch.empty((largest, heads, width // heads), dtype=dtype, device=x.device)
        at_once = largest == tokens  # queries for all tokens have room: the norm serves them as well
        for first in range(0, tokens, rows):
            part = slice(first, first + rows)
            normed = self.norm1(x[part]).to(dtype)
            keys_values[part].flatten(1).copy_(to_keys_values(normed))
            if at_once:
                queries[part].flatten(1).copy_(to_queries(normed))
            if rotation is not None:
                rotate_rows(keys_values[part, 0], rotation, first, backend=backend)
            del normed
        k, v = keys_values.unbind(1)

        for chunk in chunks:
            q = queries[: chunk.count]
            # Once keys and values exist, a row of the stream is read and written by nobody but itself.
            stream = x[chunk.first : chunk.first + chunk.count]
            if not at_once:
                for target, here in zip(q.split(rows), stream.split(rows), strict=True):
                    target.flatten(1).copy_(to_queries(self.norm1(here).to(dtype)))
            attend_rows(q, k, v, segments, chunk, rotation, backend=backend)
            for attended, here in zip(q.split(rows), stream.split(rows), strict=True):
                here += self.attn.proj_drop(proj(attended.flatten(1)))
                here += mlp(self.norm2(here).to(dtype))
        return x

    def _forward_train(
        self, x: Tensor, segments: Segments, rotation: Rotation | None, backend: str, rows: int, recompute: bool
    ) -> Tensor:
        dtype = compute_dtype(self.attn.qkv.weight)

        def to_qkv(stream: Tensor) -> Tensor:
            return projection(self.attn.qkv, dtype)(self.norm1(stream).to(dtype))

        def leave(stream: Tensor, attended: Tensor) -> Tensor:
            stream = stream + self.attn.proj_drop(projection(self.attn.proj, dtype)(attended))
            ffn: Tensor = self.mlp.with_weights(dtype)(self.norm2(stream).to(dtype))
            return stream + ffn

        qkv = by_rows(to_qkv, (x,), (self.norm1, self.attn.qkv), rows, recompute)
        out = fragment_attention(self.attn.split(qkv), segments, rotation, backend=backend).flatten(1)
        del qkv
        return by_rows(leave, (x, out), (self.attn.proj, self.norm2, self.mlp), rows, recompute)


def projection(module: nn.Module, dtype: torch.dtype, rows: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    """A linear layer, or some rows of its output, as a function of inputs in `dtype`.

    The weights are cast once, here. A layer that was replaced or hooked (adapters, quantisation) is called as it is.
    """
    if not _is_own(module, Linear):
        return lambda x: module(x)[:, rows]
    assert isinstance(module, Linear)
    weight = module.weight[rows].to(dtype)
    bias = None if module.bias is None else module.bias[rows].to(dtype)
    return lambda x: linear(x, weight, bias)


def _is_own(module: nn.Module, cls: type[nn.Module]) -> bool:
    return type(module) is cls and not (module._forward_hooks or module._forward_pre_hooks)
