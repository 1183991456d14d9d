"""Attention of all segments in one call of the C++ extension, with the rotation inside: float32 on the CPU.

torch's attention takes one call a segment. Segments of tissue are short, so those calls, and a rotation that moves all
queries and keys through memory twice before them, take as long as the products. The products of the kernel
(csrc/attention_kernel.cpp) are faster, too: 160 GFLOP/s on one Zen 5 core with AVX-512, where torch's attention reaches
90, since its MKL uses AVX2 on processors of AMD. Without the extension, for other dtypes, and under torch's
transformations, torch's operations compute the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, apply_rotation
from exaonepath.ops.attention.segments import eager_attention
from exaonepath.ops.extension import load_extension
from exaonepath.ops.plain import are_plain_float32

# By instruction set, the longest segment for which the kernel is used. AVX-512: faster than torch's attention and
# `cpu.attend_segment` up to 12,000 tokens, where the measurement ended; but each thread copies keys and values of its
# segment, 512 bytes a key and 1,280 with gradients, and many threads have to fit memory. AVX2: 1.4 to 1.7 times as fast
# as torch's attention in short segments, as fast in long ones. Narrower vectors: not measured.
_MAX_LENGTH = {"avx512": 8192, "avx2": 1024}
_DIMS = 16  # the head dimension must be a multiple of it: the widest vector


@cache
def max_length() -> int:
    """Tokens of the longest segment that the kernel should compute on this processor; 0 without the extension."""
    extension, _ = load_extension()
    return 0 if extension is None else _MAX_LENGTH.get(extension.cpu_isa(), 0)


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can compute segments of at most `max_length()` tokens of these tensors [T, H, D]."""
    return (
        are_plain_float32(q, k, v)
        and q.shape[-1] % _DIMS == 0
        and q.numel() > 0
        and all(x.stride(-1) == 1 and not x.is_neg() for x in (q, k, v))
        and max_length() > 0
    )


def workspace_bytes(dtype: torch.dtype, dim: int, length: int) -> int:
    """Memory of all threads while segments of up to `length` tokens are computed without gradients; 0 if they are not.

    It is freed at the end of a call, and torch does not count it.
    """
    if dtype != torch.float32 or dim % _DIMS or not max_length():
        return 0
    padded = min(length, max_length()) + 31
    # `attention_workspace` in csrc/attention_kernel.h: keys and values, then a block of queries and its scores.
    floats = 2 * padded * dim + max(36_000, 12 * padded) + 128 * dim
    return 4 * floats * torch.get_num_threads()


def attend_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Tensor,
    scale: float,
    out: Tensor,
    q_angles: tuple[Tensor, Tensor] | None = None,
    k_angles: tuple[Tensor, Tensor] | None = None,
) -> None:
    """softmax(q kᵀ scale) v for the queries of each piece, without autograd.

    Args:
        q, out: [R, H, D] with any token and head strides, last dimension contiguous; `out` may be q itself.
        k, v: [T, H, D], the same.
        pieces: int64 [P, 4] on the CPU, contiguous: first query, queries, first key, keys. A query is in one piece.
        scale: factor on the scores.
        q_angles, k_angles: cosines and sines [R, D/2] and [T, D/2] that rotate queries and keys, or None.
    """
    extension, _ = load_extension()
    assert extension is not None
    arguments = _arguments(q, k, v, pieces, scale, q_angles, k_angles)
    extension.attention_cpu(**arguments, out=_strided(out), threads=torch.get_num_threads())


def attend_segments(tokens: tuple[Tensor, ...], segments: Segments, rotation: Rotation | None, scale: float) -> Tensor:
    """Attention of segments of at most `max_length()` tokens, for tensors that `can_attend`; differentiable.

    Args:
        tokens: queries, keys and values [T, H, D], or one tensor [T, 3, H, D], whose gradient is then one tensor, too.
        segments, rotation, scale: as for `fragment_attention`.

    Returns:
        [T, H, D], contiguous.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tokens):
        out: Tensor = _Attend.apply(segments, rotation, scale, *tokens)
        return out
    return _forward(segments, rotation, scale, tokens)


def _forward(segments: Segments, rotation: Rotation | None, scale: float, tokens: tuple[Tensor, ...]) -> Tensor:
    q, k, v = _separate(tokens)
    out = torch.empty(q.shape)
    angles = None if rotation is None else rotation.cos_sin(torch.float32)
    attend_pieces(q, k, v, segments.pieces, scale, out, angles, angles)
    return out


class _Attend(torch.autograd.Function):
    """Keeps its inputs only: the backward pass computes scores and softmax again, which fits its products."""

    @staticmethod
    def forward(ctx: Any, segments: Segments, rotation: Rotation | None, scale: float, *tokens: Tensor) -> Tensor:
        ctx.save_for_backward(*tokens)
        ctx.settings = segments, rotation, scale
        return _forward(segments, rotation, scale, tokens)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        segments, rotation, scale = ctx.settings
        tokens = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or not are_plain_float32(dout):
            # Gradients that are differentiated again, or many at once: through plain products.
            with torch.enable_grad():
                out = _plain(*_separate(tokens), segments, rotation, scale)
                wanted = [x for x, needed in zip(tokens, ctx.needs_input_grad[3:], strict=True) if needed]
                found = iter(torch.autograd.grad(out, wanted, dout, create_graph=again))
            return None, None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[3:])
        gradients = tuple(torch.empty(x.shape) for x in tokens)
        if dout.stride(-1) != 1 or dout.is_neg():
            dout = dout.resolve_neg().contiguous()
        angles = None if rotation is None else rotation.cos_sin(torch.float32)
        extension, _ = load_extension()
        assert extension is not None
        dq, dk, dv = (_strided(x) for x in _separate(gradients))
        extension.attention_backward_cpu(
            **_arguments(*_separate(tokens), segments.pieces, scale, angles, angles),
            dout=_strided(dout), dq=dq, dk=dk, dv=dv, threads=torch.get_num_threads(),
        )  # fmt: skip
        return None, None, None, *gradients


def _plain(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rotation: Rotation | None, scale: float) -> Tensor:
    if rotation is not None:
        cos, sin = rotation.cos_sin(torch.float32)
        q, k = apply_rotation(q, cos, sin), apply_rotation(k, cos, sin)
    parts = zip(*(x.transpose(0, 1).split(segments.lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([eager_attention(q, k, v, scale) for q, k, v in parts], 1).transpose(0, 1)


def _separate(tokens: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tokens if len(tokens) == 3 else tokens[0].unbind(1)
    return q, k, v


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Tensor,
    scale: float,
    q_angles: tuple[Tensor, Tensor] | None,
    k_angles: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    return {
        "q": _strided(q),
        "k": _strided(k),
        "v": _strided(v),
        "q_angles": _addresses(q_angles),
        "k_angles": _addresses(k_angles),
        "pieces": pieces.data_ptr(),
        "count": pieces.shape[0],
        "heads": q.shape[1],
        "dim": q.shape[2],
        "scale": scale,
    }


def _strided(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _addresses(angles: tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    return (0, 0) if angles is None else (angles[0].data_ptr(), angles[1].data_ptr())
