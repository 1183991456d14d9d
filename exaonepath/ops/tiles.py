"""The work list of the fragment-attention kernels: tiles of packed tokens, longest first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from exaonepath.ops.fragment_layout import Segments


def token_bounds(segments: Segments) -> Tensor:
    """int32 [T, 2]: first and one past the last token that each packed token may meet."""
    ids = segments.ids()
    offsets = segments.offsets.to(torch.int32)
    return torch.stack([offsets[ids], offsets[ids + 1]], 1)


def tile_schedule(segments: Segments, block: int) -> Tensor:
    """Tiles of up to `block` tokens, on the tokens' device.

    A segment of at least `block` tokens is cut into tiles of its own; neighbouring shorter ones share tiles, so that
    thousands of tiny fragments do not make thousands of nearly empty programs. Longest first: what takes longest must
    not start last.

    Returns:
        int32 [W, 4]: (first, last, begin, end), tokens [first, last) meet tokens within [begin, end).
    """
    lengths = np.array(segments.lengths, np.int64)
    starts = np.concatenate([[0], lengths.cumsum()])
    is_long = lengths >= block
    # A group is a long segment, or a run of short ones: it begins where either neighbour is long.
    opens = np.ones(len(lengths), bool)
    opens[1:] = is_long[1:] | is_long[:-1]
    group_starts = starts[:-1][opens]
    group_ends = np.append(group_starts[1:], starts[-1])
    counts = -(-(group_ends - group_starts) // block)
    group = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    first = group_starts[group] + within * block
    last = np.minimum(first + block, group_ends[group])
    begin = starts[np.searchsorted(starts, first, side="right") - 1]
    end = starts[np.searchsorted(starts, last, side="left")]
    order = np.argsort(begin - end, kind="stable")
    tiles = np.stack([first, last, begin, end], 1)[order].astype(np.int32)
    return torch.from_numpy(tiles).to(segments.offsets.device)
