"""Compiled `flex_attention` with a BlockMask made by hand from the segments, which is cheaper than `create_block_mask`.

Compiled with dynamic shapes: every slide has its own number of patches, and a compilation takes longer than a slide.
`flex_static` is compiled for the current shape only, at a few shapes, for comparison.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from harness.problems import Problem
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .base import Attend, Peer, offsets

BLOCK = 128
STATIC_SHAPES = ((512, 1), (4_000, 1), (16_384, 1), (100_000, 100))  # (tokens, fragments)
_INDEX_BYTES = 8 << 30


def _why_not(problem: Problem, backward: bool) -> str | None:
    if problem.device == "cpu" and backward:
        return "flex_attention has no backward on the CPU"
    blocks = -(-problem.n // BLOCK)
    return "the block index alone takes more than 8 GB" if 8 * blocks**2 > _INDEX_BYTES else None


def block_mask(problem: Problem) -> BlockMask:
    """Segments are contiguous, so the blocks that a row of blocks meets are one interval, and those inside its own
    segment (no mask needed) another one within it. The mask is symmetric: columns are as rows."""
    ends = offsets(problem).long()
    ids = problem.segments().ids()
    n, device = problem.n, problem.device
    first = torch.arange(0, n, BLOCK, device=device)
    last = (first + BLOCK).clamp(max=n) - 1
    begin, end = ends[ids[first]], ends[ids[last] + 1]
    low, high = begin // BLOCK, -(-end // BLOCK)
    whole = (ids[first] == ids[last]) & (last - first == BLOCK - 1)
    full_low = torch.where(whole, -(-begin // BLOCK), low)
    full_high = torch.where(whole, end // BLOCK, low)
    full = (full_high - full_low).clamp(min=0)
    partial_count = high - low - full
    before = full_low - low
    # Rows as wide as the mask: the lowering takes the width for the number of key blocks.
    column = torch.arange(len(first), device=device)
    partial_index = torch.where(column < before[:, None], low[:, None] + column, low[:, None] + full[:, None] + column)
    full_index = full_low[:, None] + column
    # Past the counted ones an index is never read, but must exist.
    partial_index, full_index = (index.clamp(max=len(first) - 1) for index in (partial_index, full_index))
    count, index, full, full_index = (
        x.to(torch.int32)[None, None].contiguous() for x in (partial_count, partial_index, full, full_index)
    )

    def same_segment(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[query] == ids[key]

    both = (count, index, full, full_index)
    return BlockMask((n, n), *both, *both, (BLOCK, BLOCK), same_segment)


def _why_not_static(problem: Problem, backward: bool) -> str | None:
    if (problem.n, problem.fragments) not in STATIC_SHAPES:
        return "compiled for a few shapes only, since each takes a compilation of its own"
    return _why_not(problem, backward)


@cache
def _compiled(dynamic: bool) -> object:
    # Past torch's limit of compilations it would fall back to uncompiled code without a word.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=dynamic)


def _build(dynamic: bool, problem: Problem) -> Attend:
    mask, call = block_mask(problem), _compiled(dynamic)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


PEER = Peer("flex", _why_not, partial(_build, True))
STATIC = Peer("flex_static", _why_not_static, partial(_build, False))
