"""Attention of a chunk of query rows, in place. Inference uses it, so that the queries of all tokens never exist
together.

The keys (already rotated) and values of all packed tokens exist. A chunk of queries is rotated, attends to the keys of
its own segments, and is overwritten with the result. None of these functions is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from exaonepath.errors import SettingsError
from exaonepath.ops.attention import cpu as cpu_attention
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.fragment_attention import score_scale
from exaonepath.ops.attention.layout import Segments, batch_rows, equal_length_batches
from exaonepath.ops.attention.rotary import Rotation, apply_rotation
from exaonepath.ops.attention.segments import ATTEND
from exaonepath.ops.attention.triton import triton_attend_rows, triton_rotate_rows

# Rows that are rotated together: a rotation in torch needs temporary float32 tensors of five times their size.
_ROTATED_ROWS = 2048


@dataclass(frozen=True)
class _Piece:
    """Queries that attend together: `rows` of the chunk to `keys` of the packed tokens, in `count` equal segments."""

    rows: slice | Tensor
    keys: slice | Tensor
    count: int
    length: int


@dataclass(frozen=True)
class RowChunk:
    """Query rows that are processed together: `first` .. `first + count` of the packed tokens."""

    first: int
    count: int
    pieces: tuple[_Piece, ...]
    segment_pieces: Tensor  # int64 [S, 4] on the CPU, segment by segment: first query, queries, first key, keys


def cut_rows(segments: Segments, rows: int) -> list[RowChunk]:
    """Divide the packed tokens into chunks of at most `rows`, at segment boundaries if possible.

    Called once per forward pass, for all layers: a chunk stores which of its queries attend to which keys. A chunk ends
    inside a segment only if no segment ends inside the chunk.
    """
    lengths = np.asarray(segments.lengths, np.int64)
    ends = np.cumsum(lengths)
    chunks, first = [], 0
    while first < segments.n_tokens:
        # Number of segments that end inside the chunk or before it.
        within = int(np.searchsorted(ends, first + rows, side="right"))
        stop = int(ends[within - 1]) if within and ends[within - 1] > first else first + rows
        since = int(np.searchsorted(ends, first, side="right"))
        until = int(np.searchsorted(ends, stop, side="left")) + 1
        some_lengths, some_ends = lengths[since:until], ends[since:until]
        pieces = _pieces(first, stop, some_lengths, some_ends, segments.offsets.device)
        begin, end = np.maximum(some_ends - some_lengths, first), np.minimum(some_ends, stop)
        by_segment = np.stack([begin - first, end - begin, some_ends - some_lengths, some_lengths], 1)
        chunks.append(RowChunk(first, stop - first, tuple(pieces), torch.from_numpy(by_segment)))
        first = stop
    return chunks


def _pieces(first: int, stop: int, lengths: np.ndarray, ends: np.ndarray, device: torch.device) -> Iterator[_Piece]:
    """Pieces with every query from `first` to `stop` once; `lengths`, `ends`: segments that overlap the range."""
    starts = ends - lengths
    whole = (starts >= first) & (ends <= stop)
    for start, end in zip(starts[~whole].tolist(), ends[~whole].tolist(), strict=True):  # cut by the chunk
        yield _Piece(slice(max(start, first) - first, min(end, stop) - first), slice(start, end), 1, end - start)
    kept, begin = lengths[whole].tolist(), starts[whole].tolist()
    for members in equal_length_batches(kept):
        keys = batch_rows([begin[i] for i in members], kept[members[0]], device)
        rows = slice(keys.start - first, keys.stop - first) if isinstance(keys, slice) else keys - first
        yield _Piece(rows, keys, len(members), kept[members[0]])


def rotate_rows(x: Tensor, rotation: Rotation, first_row: int, *, backend: str) -> None:
    """Rotate heads in place.

    Args:
        x: [R, H, D], rows first_row .. first_row + R of the packed tokens, last dimension contiguous.
        rotation: rotation of all packed tokens.
        first_row: packed position of the first row.
        backend: "triton" uses one kernel; any other value uses torch.
    """
    if backend == "triton":
        triton_rotate_rows(x, rotation, first_row)
        return
    cos, sin = rotation.cos_sin(torch.promote_types(x.dtype, torch.float32))
    for start in range(0, x.shape[0], _ROTATED_ROWS):
        part = x[start : start + _ROTATED_ROWS]
        rows = slice(first_row + start, first_row + start + part.shape[0])
        part.copy_(apply_rotation(part, cos[rows], sin[rows]))


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    chunk: RowChunk,
    rotation: Rotation | None,
    *,
    backend: str,
    scale: float | None = None,
) -> None:
    """Attention of a chunk of query rows; the result overwrites the queries.

    Args:
        q: [R, H, D], the chunk's rows, not rotated; overwritten with the result. Last dimension contiguous.
        k, v: [T, H, D], keys (already rotated) and values of all packed tokens, with any token and head strides.
        segments: which tokens attend to each other; covers all T tokens.
        chunk: one of `cut_rows(segments, ...)`.
        rotation: rotation of all packed tokens, for the queries (RoPE blocks), or None (NoPE blocks).
        backend: "sdpa", "eager" (stores all scores, for tests), "cudnn" or "triton".
        scale: positive factor on the scores; default D ** -0.5.

    Raises:
        SettingsError: shapes or scale do not match, or the backend is unknown.
        BackendError: the backend cannot run on this device.
    """
    if q.ndim != 3 or k.shape[1:] != q.shape[1:] or v.shape != k.shape:
        raise SettingsError(
            f"q must be [R, H, D], k and v [T, H, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if segments.n_tokens != k.shape[0] or q.shape[0] != chunk.count or chunk.first + chunk.count > k.shape[0]:
        raise SettingsError(
            f"{q.shape[0]} queries and {k.shape[0]} keys do not match a chunk of {chunk.count} rows that starts at "
            f"{chunk.first} and segments of {segments.n_tokens} tokens"
        )
    scale = score_scale(scale, q.shape[2])
    if backend == "triton":
        triton_attend_rows(q, k, v, segments, chunk.first, rotation, scale)
        return
    attend = ATTEND.get(backend)
    if attend is None:
        raise SettingsError(f"unknown attention backend {backend!r}; choose sdpa, eager, cudnn or triton")
    in_kernel = 0
    if (
        backend == "sdpa"
        and not (torch.is_grad_enabled() and q.requires_grad)
        and cpu_kernel.can_attend(q, k, v, scale)
    ):
        in_kernel = cpu_kernel.max_length()
        pieces = chunk.segment_pieces[chunk.segment_pieces[:, 3] <= in_kernel]
        angles = None
        if rotation is not None:
            cos, sin = rotation.cos_sin(torch.float32)
            angles = cos[chunk.first :], sin[chunk.first :]
        cpu_kernel.attend_pieces(q, k, v, pieces, scale, q, q_angles=angles)
        if not q.is_inference():  # such tensors have no version
            increment_version(q)  # autograd does not see that write
    elif rotation is not None:
        rotate_rows(q, rotation, chunk.first, backend=backend)
    for piece in chunk.pieces:
        if piece.length <= in_kernel:
            continue
        if in_kernel and rotation is not None:
            assert isinstance(piece.rows, slice)  # such long segments are never gathered
            rotate_rows(q[piece.rows], rotation, chunk.first + piece.rows.start, backend=backend)
        queries, keys, values = q[piece.rows], k[piece.keys], v[piece.keys]
        if backend == "sdpa" and piece.count == 1 and cpu_attention.can_attend(q, piece.length):
            cpu_attention.attend_segment(queries, keys, values, scale, queries)
            continue
        heads, dim = q.shape[1:]
        batch = [t.reshape(piece.count, -1, heads, dim).transpose(1, 2) for t in (queries, keys, values)]
        q[piece.rows] = attend(batch[0], batch[1], batch[2], scale).transpose(1, 2).reshape(-1, heads, dim)
