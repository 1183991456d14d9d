"""The work lists of the fragment-attention kernels: tiles of packed tokens, longest first.

The lists are computed once per batch, and stored in a dictionary whose weak key is the offsets tensor of the segments.
So every layer and every row chunk of a batch shares them, and they are deleted together with the batch. An operator
that gets only the offsets tensor (in a compiled graph, or in the backward pass) can look them up. If the tensor was
written to since then, for example as a buffer that is used for one slide after another, the lists are computed again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import Segments


class TileSchedules:
    """Tile lists of one set of segments, computed at the first request.

    Attributes:
        lengths: int64 [S] on the host.
        bounds: int32 [T, 2] on the tokens' device: the first token, and one past the last token, that each packed token
            attends to.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        self.lengths = lengths
        starts = np.concatenate([[0], lengths.cumsum()])
        pairs = torch.from_numpy(np.stack([starts[:-1], starts[1:]], 1).astype(np.int32)).to(device)
        repeats = torch.from_numpy(lengths).to(device)
        self.bounds = torch.repeat_interleave(pairs, repeats, 0, output_size=int(starts[-1]))
        self._device = device
        self._tiles: dict[tuple[int, int, int], Tensor] = {}

    @property
    def n_tokens(self) -> int:
        """T, the number of packed tokens."""
        return self.bounds.shape[0]

    def tiles(self, block: int, first_row: int = 0, rows: int | None = None) -> Tensor:
        """`tile_schedule` on the tokens' device."""
        key = (block, first_row, self.n_tokens - first_row if rows is None else rows)
        if key not in self._tiles:
            self._tiles[key] = torch.from_numpy(tile_schedule(self.lengths, *key)).to(self._device)
        return self._tiles[key]


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def schedules(offsets: Tensor, segments: Segments | None = None) -> TileSchedules:
    """The schedules of the segments with these int64 [S + 1] offsets; empty segments are left out.

    Without `segments`, new offsets are read from their device once. With `segments`, the lengths on the host are used,
    and the tensor is not read.

    Raises:
        SettingsError: offsets that were read do not ascend from 0.
    """
    version = 0 if offsets.is_inference() else offsets._version  # torch increases it at every write to the tensor
    seen: tuple[int, TileSchedules] | None = _KNOWN.get(offsets)
    known = seen[1] if seen is not None and seen[0] == version else None
    if known is None:
        if segments is None:
            numbers = np.array(offsets.tolist(), np.int64)
            lengths = np.diff(numbers)
            if len(numbers) == 0 or numbers[0] != 0 or (lengths < 0).any():
                raise SettingsError("segment offsets must ascend from 0; use Segments.from_lengths")
            lengths = lengths[lengths > 0]
        else:
            lengths = np.array(segments.lengths, np.int64)
        known = TileSchedules(lengths, offsets.device)
        _KNOWN[offsets] = version, known
    return known


def tile_schedule(lengths: NDArray[np.int64], block: int, first_row: int, rows: int) -> NDArray[np.int32]:
    """Tiles of up to `block` tokens that cover tokens first_row .. first_row + rows.

    A segment of at least `block` tokens is divided into separate tiles. Neighbouring shorter segments share tiles, so
    that thousands of tiny fragments do not need thousands of nearly empty programs. Tiles with the most work are first:
    a long one that starts last would run alone at the end, while the other processors have no work.

    Returns:
        int32 [W, 4]: (first, last, begin, end): tokens [first, last) attend to tokens within [begin, end).
    """
    stop = first_row + rows
    starts = np.concatenate([[0], lengths.cumsum()])
    inside = slice(np.searchsorted(starts, first_row, side="right") - 1, np.searchsorted(starts, stop, side="left"))
    if rows == 0:
        return np.zeros((0, 4), np.int32)
    is_long = lengths[inside] >= block
    # A group is one long segment, or consecutive short ones. So a group starts at each segment that is long, or whose
    # previous segment is long.
    opens = np.ones(len(is_long), bool)
    opens[1:] = is_long[1:] | is_long[:-1]
    group_starts = starts[:-1][inside][opens].clip(min=first_row)
    group_ends = np.append(group_starts[1:], stop)
    counts = -(-(group_ends - group_starts) // block)
    group = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    first = group_starts[group] + within * block
    last = np.minimum(first + block, group_ends[group])
    begin = starts[np.searchsorted(starts, first, side="right") - 1]
    end = starts[np.searchsorted(starts, last, side="left")]
    order = np.argsort(begin - end, kind="stable")
    return np.stack([first, last, begin, end], 1)[order].astype(np.int32)
