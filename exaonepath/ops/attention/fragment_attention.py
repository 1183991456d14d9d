"""Attention over packed tokens, restricted to contiguous segments, including the 2D rotation of queries and keys.

The operation has several backends with the same result. `eager` uses plain products, segment by segment (for tests).
`sdpa` calls torch's attention, segment by segment (any device), or in float32 on the CPU a kernel of ours for all of
them. `triton` is one fused kernel (CUDA). `cudnn` is cuDNN for one long segment, and otherwise the fused kernel (CUDA).
Only `eager` stores all scores of a segment.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.kernels.launch_config import attention_config
from exaonepath.log_once import warn_once
from exaonepath.ops.attention import cpu as cpu_attention
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, apply_rotation, rotate_inplace
from exaonepath.ops.attention.segments import ATTEND, sdpa_attention
from exaonepath.ops.attention.triton import triton_attention, unsupported_device, unsupported_input

logger = logging.getLogger(__name__)

_Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]

ATTENTION_BACKENDS = ("auto", "sdpa", "eager", "triton", "cudnn")
# With fewer tokens a call of cuDNN costs more than it saves.
_CUDNN_FROM = 1024


def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    segments: Segments | None = None,
    *,
    rotated: bool = False,
    training: bool = False,
) -> str:
    """The backend that will run: the requested one, or for "auto" the fastest one that is available.

    "auto" is triton on a CUDA device that supports the kernels, and sdpa elsewhere. If the kernels cannot run on a CUDA
    device, one warning is logged. Without gradients, "auto" is cudnn for one segment without rotation that is so long
    that cuDNN was measured to be faster, plans included. "auto" is deterministic: the same input gives the same bits.

    "cudnn" stays "cudnn" for one segment without rotation, of at least 1,024 tokens in half precision on a CUDA device;
    for everything else it is what "auto" is. cuDNN's backward pass is faster than ours, and not deterministic. So with
    `torch.use_deterministic_algorithms`, training does not use it.

    Args:
        backend: one of ATTENTION_BACKENDS.
        device, dtype, head_dim: device, dtype and head dimension of the queries.
        segments: the segments of the attention; None if they are not known yet.
        rotated: whether queries and keys are rotated.
        training: whether gradients are needed.

    Raises:
        SettingsError: the backend is unknown.
    """
    if backend not in ATTENTION_BACKENDS:
        raise SettingsError(f"unknown attention backend {backend!r}; choose one of {', '.join(ATTENTION_BACKENDS)}")
    if backend not in ("auto", "cudnn"):
        return backend
    if device.type != "cuda":
        return "sdpa"
    if segments is not None and len(segments.lengths) == 1 and not rotated:
        enough = _CUDNN_FROM if backend == "cudnn" else _cudnn_from(device, dtype, head_dim)
        allowed = not training or (backend == "cudnn" and not torch.are_deterministic_algorithms_enabled())
        half = dtype in (torch.float16, torch.bfloat16) and head_dim <= 128
        if allowed and half and enough is not None and segments.n_tokens >= enough:
            return "cudnn"
    return "triton" if _kernels_support(device, dtype, head_dim) else "sdpa"


# A compiled graph contains the answer, not this code with its logger.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernels_support(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    reason = unsupported_input(dtype, head_dim, 0) or unsupported_device(device, dtype)
    if reason is not None:
        warn_once(logger, "%s; attention runs through torch's scaled_dot_product_attention", reason)
    return reason is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cudnn_from(device: torch.device, dtype: torch.dtype, head_dim: int) -> int | None:
    if unsupported_input(dtype, head_dim, 0) is not None:
        return None
    return attention_config(torch.cuda.get_device_capability(device), dtype.itemsize, head_dim).cudnn_from


def fragment_attention(
    qkv: Tensor,
    segments: Segments,
    rotation: Rotation | None = None,
    *,
    backend: str = "auto",
    scale: float | None = None,
    overwrite_qkv: bool = False,
) -> Tensor:
    """Each token attends to the tokens of its own segment.

    Args:
        qkv: [T, 3, H, D] packed queries, keys and values, floating point, last dimension contiguous.
        segments: which tokens attend to each other; covers all T tokens.
        rotation: 2D rotation of queries and keys (RoPE blocks); None: no rotation (NoPE blocks).
        backend: "triton" (CUDA; float32, float16 or bfloat16; head dimension 32, 64 or 128), "sdpa", "eager" (stores
            all scores of a segment, for tests), "cudnn", or "auto"; for the last two see `resolve_backend`.
        scale: positive factor on the scores; default D ** -0.5.
        overwrite_qkv: without autograd, rotate inside `qkv` instead of in a copy, and possibly store the result in
            place of the queries. The caller must not use `qkv` afterwards.

    Returns:
        [T, H, D] in qkv's dtype. Differentiable in qkv.

    Raises:
        SettingsError: shapes, dtype, devices, segments or scale do not match, or the backend is unknown.
        BackendError: the backend cannot run on this device.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise SettingsError(f"qkv must be floating point [T, 3, H, D], got {qkv.dtype} {list(qkv.shape)}")
    if segments.n_tokens != qkv.shape[0]:
        raise SettingsError(f"segments cover {segments.n_tokens} tokens, but qkv holds {qkv.shape[0]}")
    if segments.offsets.device != qkv.device:
        raise SettingsError(f"segments are on {segments.offsets.device}, but qkv is on {qkv.device}")
    if rotation is not None:
        rotation.require(qkv.shape[0], qkv.shape[3], qkv.device)
    scale = score_scale(scale, qkv.shape[3])
    training = torch.is_grad_enabled() and qkv.requires_grad
    backend = resolve_backend(
        backend, qkv.device, qkv.dtype, qkv.shape[3], segments, rotated=rotation is not None, training=training
    )
    if backend == "triton":
        return triton_attention(qkv, segments, rotation, scale, overwrite_qkv)
    qkv = _in_memory(qkv)
    q, k, v = qkv.unbind(1)
    in_place = overwrite_qkv and not training
    if backend == "sdpa" and cpu_kernel.can_attend(q, k, v, scale):
        return _in_kernel((qkv,), segments, rotation, scale, in_place=in_place)
    return _by_torch(q, k, v, segments, rotation, backend, scale, in_place=in_place)


def score_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores, default D ** -0.5; SettingsError unless D > 0 and it is positive and finite."""
    if head_dim == 0:
        raise SettingsError("attention needs a head dimension of 1 or more, got 0")
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise SettingsError(f"scale must be a positive finite number, got {scale}")
    return scale


def attend_by_segment(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, rotation: Rotation | None, backend: str, scale: float
) -> Tensor:
    """Attention of [T, H, D] by the backends "sdpa", "eager" and "cudnn"; checked by the caller."""
    q, k, v = (_in_memory(x) for x in (q, k, v))
    if backend == "sdpa" and cpu_kernel.can_attend(q, k, v, scale):
        return _in_kernel((q, k, v), segments, rotation, scale)
    return _by_torch(q, k, v, segments, rotation, backend, scale)


def _in_kernel(
    tokens: tuple[Tensor, ...], segments: Segments, rotation: Rotation | None, scale: float, *, in_place: bool = False
) -> Tensor:
    """Attention by `cpu_kernel`, but of longer segments by torch: a segment's own length alone decides.

    `tokens` are q, k and v [T, H, D], or all in one [T, 3, H, D], whose gradient is then one tensor, too.
    """
    limit = cpu_kernel.max_length()
    if segments.longest <= limit:
        return cpu_kernel.attend_segments(tokens, segments, rotation, scale)
    if len(segments.lengths) == 1:
        return _by_torch(*cpu_kernel.separate(tokens), segments, rotation, "sdpa", scale, in_place=in_place)
    angles = None if rotation is None else rotation.cos_sin(torch.float32)  # once: its rows share them
    if torch.is_grad_enabled() and any(x.requires_grad for x in tokens):
        # One split and one concatenation, whose backward passes copy each gradient once.
        runs = segments.runs(limit)
        parts = zip(*(x.split([run.n_tokens for run in runs]) for x in tokens), strict=True)
        results, first = [], 0
        for run, part in zip(runs, parts, strict=True):
            rotated = None if rotation is None else rotation.rows(slice(first, first + run.n_tokens))
            if run.longest <= limit:
                results.append(cpu_kernel.attend_segments(part, run, rotated, scale))
            else:
                results.append(_by_torch(*cpu_kernel.separate(part), run, rotated, "sdpa", scale))
            first += run.n_tokens
        return torch.cat(results)
    q, k, v = cpu_kernel.separate(tokens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    cpu_kernel.attend_pieces(q, k, v, segments.pieces[segments.pieces[:, 3] <= limit], scale, out, angles, angles)
    first = 0
    for run in segments.runs(limit):
        rows = slice(first, first + run.n_tokens)
        first += run.n_tokens
        if run.longest > limit:
            rotated = None if rotation is None else rotation.rows(rows)
            _by_torch(q[rows], k[rows], v[rows], run, rotated, "sdpa", scale, in_place=in_place, out=out[rows])
    return out


def _by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    rotation: Rotation | None,
    backend: str,
    scale: float,
    *,
    in_place: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of [T, H, D] by torch's operations: backends "sdpa", "eager" and "cudnn".

    Without autograd, `in_place` rotates q and k themselves, and the result is stored in `out` [T, H, D] if given.
    """
    if rotation is not None:
        cos, sin = rotation.cos_sin(torch.promote_types(q.dtype, torch.float32))
        if in_place:
            rotate_inplace(q, cos, sin)
            rotate_inplace(k, cos, sin)
        else:
            q, k = apply_rotation(q, cos, sin), apply_rotation(k, cos, sin)
    attend = ATTEND[backend]
    # Without autograd, results are written into slices of one tensor. With autograd, the backward pass of every such
    # assignment would copy the whole gradient, so another function is used.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _with_grad(q, k, v, segments, scale, attend)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    return _without_grad(q, k, v, segments, scale, attend, out)


def _in_memory(x: Tensor) -> Tensor:
    """x, or a copy if it is zeros without memory, which torch's attention on the CPU reads as anything."""
    return x.clone() if not torch.compiler.is_compiling() and x._is_zerotensor() else x


def _without_grad(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, attend: _Attend, out: Tensor
) -> Tensor:
    for rows, count, length in segments.equal_length_groups:
        if attend is sdpa_attention and count == 1 and cpu_attention.can_attend(q, length):
            cpu_attention.attend_segment(q[rows], k[rows], v[rows], scale, out[rows])
        else:
            out[rows] = _batched(q[rows], k[rows], v[rows], count, length, scale, attend)
    return out


def _with_grad(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, attend: _Attend) -> Tensor:
    if not segments.lengths:
        return (q + k + v) * 0  # no tokens: the result stays connected to the graph
    # One split: its backward pass is one concatenation. The backward pass of a slice would write a gradient of all
    # tokens, once for each slice.
    parts = list(zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True))
    out: list[Tensor] = [q] * len(parts)
    for members in segments.equal_length_members:
        length = segments.lengths[members[0]]
        if len(members) == 1:
            one = parts[members[0]]
            out[members[0]] = _batched(one[0], one[1], one[2], 1, length, scale, attend)
            continue
        queries, keys, values = (torch.cat([parts[i][axis] for i in members]) for axis in range(3))
        combined = _batched(queries, keys, values, len(members), length, scale, attend)
        for i, attended in zip(members, combined.split(length), strict=True):
            out[i] = attended
    return torch.cat(out)


def _batched(q: Tensor, k: Tensor, v: Tensor, count: int, length: int, scale: float, attend: _Attend) -> Tensor:
    """Attention of `count` segments of equal length, [count * length, H, D] each."""
    heads, dim = q.shape[1:]
    q, k, v = (x.reshape(count, length, heads, dim).transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, scale).transpose(1, 2).reshape(count * length, heads, dim)
