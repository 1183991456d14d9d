"""The computation of a block (`block.Block`) in less memory, for encoders without hooks or other changes.

Without autograd, a block overwrites the token buffer in place. In addition to that buffer, only the keys and values of
all tokens exist; everything else exists for one chunk of rows at a time (see `memory_plan`). Under autograd, the
row-wise layers also run in chunks, and may be computed again in the backward pass. Both functions read the weights
without a call of the modules that own them. So `unmodified.is_unmodified` must be true for the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from exaonepath.encoders.block import Block, Linear, SwiGLU, compute_dtype
from exaonepath.encoders.row_checkpoint import by_rows
from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation
from exaonepath.ops.attention.rows import RowChunk, attend_rows, rotate_rows
from exaonepath.ops.linear import linear


@torch.no_grad()
def block_in_place(
    block: Block,
    x: Tensor,
    segments: Segments,
    rotation: Rotation | None,
    backend: str,
    chunks: Sequence[RowChunk],
    rows: int,
) -> Tensor:
    """`block(x, segments, rotation, backend)`; the result overwrites x.

    Args:
        block: in evaluation mode or not; no gradient is kept.
        x: residual stream [T, E], overwritten.
        segments, rotation, backend: as for the block.
        chunks: queries that attend together.
        rows: rows that the linear layers compute together.

    Returns:
        x.
    """
    tokens, width = x.shape
    attn, heads, dtype = block.attn, block.attn.heads, compute_dtype(block.attn.qkv.weight)
    # The stacked projection is split in two: keys and values are needed for all tokens, queries only for one chunk.
    to_queries = projection(attn.qkv, dtype, slice(None, width))
    to_keys_values = projection(attn.qkv, dtype, slice(width, None))

    keys_values = torch.empty((tokens, 2, heads, width // heads), dtype=dtype, device=x.device)
    largest = max([0, *[chunk.count for chunk in chunks]])
    queries = torch.empty((largest, heads, width // heads), dtype=dtype, device=x.device)
    # If one chunk holds all tokens, the queries are computed in the first loop, which saves a second pass of the norm.
    at_once = largest == tokens
    for first in range(0, tokens, rows):
        part = slice(first, first + rows)
        normed = block.norm1(x[part]).to(dtype)
        keys_values[part].flatten(1).copy_(to_keys_values(normed))
        if at_once:
            queries[part].flatten(1).copy_(to_queries(normed))
        del normed  # before the next iteration: else two of them would exist while the next one is computed
        if rotation is not None:
            rotate_rows(keys_values[part, 0], rotation, first, backend=backend)
    k, v = keys_values.unbind(1)
    del to_keys_values  # its cast weights are not needed any more, and those of the next layers not before
    proj = projection(attn.proj, dtype)
    mlp = _swiglu(block.mlp, dtype)

    for chunk in chunks:
        q = queries[: chunk.count]
        # Attention reads other tokens only through `k` and `v`, which exist already. So each row of the stream may be
        # overwritten now: no other row needs its old value.
        stream = x[chunk.first : chunk.first + chunk.count]
        if not at_once:
            for target, source in zip(q.split(rows), stream.split(rows), strict=True):
                target.flatten(1).copy_(to_queries(block.norm1(source).to(dtype)))
        attend_rows(q, k, v, segments, chunk, rotation, backend=backend)  # overwrites q with the result
        for attended, target in zip(q.flatten(1).split(rows), stream.split(rows), strict=True):
            target += attn.proj_drop(proj(attended))
            normed = block.norm2(target)
            if normed.dtype != dtype:
                normed = attended.copy_(normed)  # the cast needs no memory: the attended queries are not read any more
            target += mlp(normed)
            del normed
    return x


def block_by_rows(
    block: Block, x: Tensor, segments: Segments, rotation: Rotation | None, backend: str, rows: int, recompute: bool
) -> Tensor:
    """`block(x, segments, rotation, backend)` under autograd.

    Args:
        block, x, segments, rotation, backend: as for the block.
        rows: rows that the linear layers compute together.
        recompute: keep no activations of the linear layers, and compute them again in the backward pass.

    Returns:
        The stream after the block, [T, E].
    """
    attn, dtype = block.attn, compute_dtype(block.attn.qkv.weight)

    def to_qkv(stream: Tensor) -> Tensor:
        return projection(attn.qkv, dtype)(block.norm1(stream).to(dtype))

    def after_attention(stream: Tensor, attended: Tensor) -> Tensor:
        stream = stream + attn.proj_drop(projection(attn.proj, dtype)(attended))
        return stream + _swiglu(block.mlp, dtype)(block.norm2(stream).to(dtype))

    qkv = by_rows(to_qkv, (x,), (block.norm1, attn.qkv), rows, recompute)
    out = fragment_attention(attn.split(qkv), segments, rotation, backend=backend).flatten(1)
    del qkv  # autograd keeps what the backward pass needs of it
    return by_rows(after_attention, (x, out), (attn.proj, block.norm2, block.mlp), rows, recompute)


def projection(module: Linear, dtype: torch.dtype, rows: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    """A linear layer, or some rows of its output, as a function of inputs in `dtype`; the weights are cast once."""
    weight = module.weight[rows].to(dtype)
    bias = None if module.bias is None else module.bias[rows].to(dtype)
    return lambda x: linear(x, weight, bias)


def _swiglu(module: SwiGLU, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A SwiGLU as a function of inputs in `dtype`. Without gradients it works in place."""
    w1, w2, w3 = (projection(layer, dtype) for layer in (module.w1, module.w2, module.w3))

    def apply(x: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()
        gate = F.silu(w1(x), inplace=in_place)
        hidden = gate.mul_(w2(x)) if in_place else gate * w2(x)
        out: Tensor = module.drop(w3(hidden))
        return out

    return apply
