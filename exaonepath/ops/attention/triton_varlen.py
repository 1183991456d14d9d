"""The fused Triton kernels for queries, keys and values in three tensors, as torch operations.

The forward kernel takes three pointers, so without gradients nothing is packed. The backward kernels take one tensor
[T, 3, H, D]: with gradients, queries, keys and values are copied into it, where they are rotated, too. It is what the
backward pass saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.ops.attention import triton as kernels
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation
from exaonepath.ops.attention.tiles import schedules


def triton_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments | Tensor, rotation: Rotation | None, scale: float
) -> Tensor:
    """`varlen_attention` through the kernels; the same arguments, checked by the caller.

    Args:
        q, k, v: [T, H, D] of one dtype, on one device.
        segments: segments that cover all T tokens, or, in a compiled graph, cumulative lengths [S + 1] that are read
            and checked when the graph runs.
        rotation: rotation of queries and keys, or None.
        scale: positive factor on the scores.

    Raises:
        BackendError: the kernels do not support this device or this input.
    """
    kernels._refuse(kernels.unsupported_input(q.dtype, q.shape[2], q.shape[0]))
    if q.shape[0] == 0:
        return (q + k + v) * 0  # a new tensor, connected to the graph
    if isinstance(segments, Segments):
        offsets = kernels._known_offsets(segments)
    else:
        offsets = _checked_offsets(segments, q.shape[0])
    cos, sin = kernels._tables(q, rotation)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out: Tensor = _forward(q, k, v, cos, sin, offsets, scale, training)[0]
    return out


@torch.library.custom_op("exaonepath::checked_offsets", mutates_args=(), tags=kernels._LOOKS_UP_TILES)
def _checked_offsets(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [S + 1] copy of cumulative lengths that are checked here, when a compiled graph runs.

    A copy: the caller may write the next batch into `cu_seqlens`, which cannot be noticed if it is an inference tensor.
    """
    segments = Segments.from_cu_seqlens(cu_seqlens)
    require_tokens(segments, tokens)
    offsets = cu_seqlens.to(torch.int64, copy=True)
    schedules(offsets, segments)
    return offsets


@_checked_offsets.register_fake
def _(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


def require_tokens(segments: Segments, tokens: int) -> None:
    """Raise SettingsError unless the segments cover `tokens` tokens."""
    if segments.n_tokens != tokens:
        raise SettingsError(
            f"cu_seqlens must end with the number of tokens: it covers {segments.n_tokens}, but q holds {tokens}"
        )


@torch.library.custom_op("exaonepath::varlen_attention", mutates_args=(), tags=kernels._LOOKS_UP_TILES)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, scale: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, H, D], lse [H, T] and packed qkv [T, 3, H, D], rotated. The last two are empty without training."""
    tokens, heads, dim = q.shape
    kernels._refuse(kernels.unsupported_device(q.device, q.dtype))
    known, rope = kernels._schedules(offsets), cos.numel() > 0
    # Checked here because a compiled graph may pass other strides than those that were traced.
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens) if training else 0, dtype=torch.float32, device=q.device)
    packed = torch.empty((tokens, 3, heads, dim) if training else 0, dtype=q.dtype, device=q.device)
    if training:
        for axis, x in enumerate((q, k, v)):
            if rope and axis < 2:
                kernels._launch_rotate(x, packed[:, axis], cos, sin, 0, heads)
            else:
                packed[:, axis] = x
        q, k, v = packed.unbind(1)
    elif rope:
        rotated = torch.empty((tokens, heads, dim), dtype=k.dtype, device=k.device)
        kernels._launch_rotate(k, rotated, cos, sin, 0, heads)
        k = rotated
    kernels._launch_forward(
        kernels._config(q), q, k, v, out, lse if training else None, cos, sin, known, 0, rope and not training, scale
    )
    return out, lse, packed


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor, scale: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, dim = q.shape
    lse = q.new_empty((heads, tokens) if training else 0, dtype=torch.float32)
    return q.new_empty((tokens, heads, dim)), lse, q.new_empty((tokens, 3, heads, dim) if training else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    cos, sin, offsets, scale = inputs[3:7]
    out, lse, packed = output
    ctx.save_for_backward(packed, out, lse, cos, sin, offsets)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dq = dk = dv = None
    if dout is not None:
        dq, dk, dv = kernels._backward(dout, *ctx.saved_tensors, ctx.scale).unbind(1)
    return (dq, dk, dv, *(None,) * 5)


_forward.register_autograd(_gradient, setup_context=_save)
