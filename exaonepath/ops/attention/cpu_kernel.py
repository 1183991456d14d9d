"""Attention of all segments in one call of the C++ extension, with the rotation inside: float32 on the CPU.

torch's attention takes one call a segment. Segments of tissue are short, so those calls, and a rotation that moves all
queries and keys through memory twice before them, take as long as the products. The products of the kernel
(csrc/attention_kernel.cpp) are faster, too: 160 GFLOP/s on one Zen 5 core with AVX-512, where torch's attention reaches
90, since its MKL uses AVX2 on processors of AMD. Without the extension, for other dtypes, and under torch's
transformations, torch's operations compute the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.log_once import warn_once
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, apply_rotation
from exaonepath.ops.attention.segments import eager_attention
from exaonepath.ops.extension import load_extension
from exaonepath.ops.plain import are_plain_float32

logger = logging.getLogger(__name__)

# By instruction set, the longest segment for which the kernel is used. AVX-512: faster than torch's attention and
# `cpu.attend_segment` up to 12,000 tokens, where the measurement ended; but each thread copies keys and values of its
# segment, 512 bytes a key and 1,280 with gradients, and many threads have to fit memory. AVX2: 1.4 to 1.7 times as fast
# as torch's attention in short segments, as fast in long ones. Narrower vectors: not measured.
_MAX_LENGTH = {"avx512": 8192, "avx2": 1024}
_DIMS = 16  # the head dimension must be a multiple of it: the widest vector
_FLOAT32 = torch.finfo(torch.float32)


@cache
def max_length() -> int:
    """Tokens of the longest segment that the kernel should compute on this processor; 0 without the extension."""
    extension, _ = load_extension()
    return 0 if extension is None else _MAX_LENGTH.get(extension.cpu_isa(), 0)


def can_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernel can compute segments of at most `max_length()` tokens of these tensors [T, H, D].

    If only the extension is missing, one line is logged.
    """
    fits = (
        are_plain_float32(q, k, v)
        and q.shape[-1] % _DIMS == 0
        and q.numel() > 0
        and all(_is_readable(x) for x in (q, k, v))
        and _FLOAT32.tiny <= scale <= _FLOAT32.max  # others would be 0 or infinity
    )
    if fits and load_extension()[0] is None:
        warn_once(logger, "attention on the CPU runs through torch: %s", load_extension()[1])
    return fits and max_length() > 0


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
    if pieces.shape[0] == 0:
        return
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
    q, k, v = separate(tokens)
    out = _empty(q.shape)
    angles = None if rotation is None else rotation.cos_sin(torch.float32)
    attend_pieces(q, k, v, segments.pieces, scale, out, angles, angles)
    return out


class _Attend(torch.autograd.Function):
    """Keeps its inputs only: the backward pass computes scores and softmax again, which fits its products."""

    @staticmethod
    def forward(ctx: Any, segments: Segments, rotation: Rotation | None, scale: float, *tokens: Tensor) -> Tensor:
        ctx.save_for_backward(*tokens)
        ctx.settings = segments, rotation, scale
        ctx.shape = tokens[0].shape
        return _forward(segments, rotation, scale, tokens)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        segments, rotation, scale = ctx.settings
        tokens, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        for x in tokens:
            _require_saved(x, ctx.shape)
        if dout._is_zerotensor():
            dout = dout.clone()  # zeros in memory
        again = torch.is_grad_enabled()
        if again or not are_plain_float32(dout, *tokens, ignore_autocast=True):
            # Gradients that are differentiated again, or many at once: through plain products.
            return None, None, None, *_plain_gradients(tokens, needed, segments, rotation, scale, dout, again)
        gradients = tuple(_empty(ctx.shape) for _ in tokens)
        dout, *tokens = (x if _is_readable(x) else x.resolve_neg().contiguous() for x in (dout, *tokens))
        angles = None if rotation is None else rotation.cos_sin(torch.float32)
        extension, _ = load_extension()
        assert extension is not None
        dq, dk, dv = (_strided(x) for x in separate(gradients))
        extension.attention_backward_cpu(
            **_arguments(*separate(tokens), segments.pieces, scale, angles, angles),
            dout=_strided(dout), dq=dq, dk=dk, dv=dv, threads=torch.get_num_threads(),
        )  # fmt: skip
        return None, None, None, *gradients


def _require_saved(x: Tensor, shape: torch.Size) -> None:
    if x.shape != shape or x.dtype != torch.float32 or x.device.type != "cpu":
        raise SettingsError(
            f"attention saved float32 {list(shape)} on cpu for its gradient, but a saved-tensor hook returned "
            f"{x.dtype} {list(x.shape)} on {x.device}; let the hook restore dtype, shape and device"
        )


def _plain_gradients(
    tokens: Sequence[Tensor],
    needed: Sequence[bool],
    segments: Segments,
    rotation: Rotation | None,
    scale: float,
    dout: Tensor,
    differentiable: bool,
) -> Iterator[Tensor | None]:
    """Gradients by torch's operations, None for tokens that need none."""
    # The dtypes are those of the forward pass, which no autocast of the caller may change now.
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Gradients of the tokens themselves would call their hooks here, and again when they arrive there. Views are
        # other tensors to autograd, and a second derivative reaches the tokens through them.
        views = [x.view_as(x) for x in tokens]
        wanted = [x for x, wants in zip(views, needed, strict=True) if wants]
        for x in wanted:
            if not x.requires_grad:  # a saved-tensor hook has returned a copy
                x.requires_grad_()
        out = _plain(*separate(views), segments, rotation, scale)
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=differentiable))
    return (next(found) if wants else None for wants in needed)


def _plain(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rotation: Rotation | None, scale: float) -> Tensor:
    if rotation is not None:
        cos, sin = rotation.cos_sin(torch.float32)
        q, k = apply_rotation(q, cos, sin), apply_rotation(k, cos, sin)
    parts = zip(*(x.transpose(0, 1).split(segments.lengths, 1) for x in (q, k, v)), strict=True)
    return torch.cat([eager_attention(q, k, v, scale) for q, k, v in parts], 1).transpose(0, 1)


def separate(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, H, D] of the three tensors, or of the one [T, 3, H, D], in `tokens`."""
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


def _empty(shape: torch.Size) -> Tensor:
    # Not torch's default dtype and device, which the caller may have changed.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _is_readable(x: Tensor) -> bool:
    return x.stride(-1) == 1 and not x.is_neg()


def _strided(x: Tensor) -> tuple[int, int, int]:
    """Address and strides. The check is for bugs of this package."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _is_readable(x):
        raise TypeError(f"{x.dtype} on {x.device} with strides {x.stride()} does not match csrc/attention.h")
    return x.data_ptr(), x.stride(0), x.stride(1)


def _addresses(angles: tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    if angles is None:
        return 0, 0
    if any(x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous() for x in angles):
        raise TypeError("cosines and sines do not match csrc/attention.h")
    return angles[0].data_ptr(), angles[1].data_ptr()
