"""Packs the tokens of a batch of slides so that every fragment is one contiguous segment.

The general layout is that of concatenated slides (`build_ragged_layout`); a padded batch is the same without its
padding (`build_fragment_layout`). Tokens, prefix tokens (contour -1) included, are stably sorted by (slide, contour).
Attention restricted to fragments is then block diagonal over segments, so no mask tensor is needed. Every layer of the
encoder uses the same order, so each forward pass sorts only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index

import torch
from torch import Tensor

from exaonepath.errors import SettingsError

PREFIX_CONTOUR = -1

# Segments up to this length are gathered by equal length and computed as one batch: with one call for each segment, the
# calls would take longer than the computation.
_SHORT = 128
# Limits of such a batch: CUDA attention kernels use batch x heads as a grid dimension, which is at most 65,535.
# Copies of a batch's queries, keys and values exist while it is computed: its tokens are bounded, too.
_MAX_BATCH, _MAX_BATCH_TOKENS = 4096, 1 << 14


def equal_length_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of segments that are computed together: short ones in batches of one length, long ones alone."""
    members: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        # A long segment gets a key of its own; negative keys cannot be equal to a length.
        members.setdefault(length if length <= _SHORT else -1 - i, []).append(i)
    batches = []
    for batch in members.values():
        step = min(_MAX_BATCH, max(1, _MAX_BATCH_TOKENS // lengths[batch[0]]))
        batches += [batch[start : start + step] for start in range(0, len(batch), step)]
    return batches


def batch_rows(starts: Sequence[int], length: int, device: torch.device) -> slice | Tensor:
    """The packed tokens of segments of one length: a slice for one segment, int64 [count * length] for several."""
    if len(starts) == 1:
        return slice(starts[0], starts[0] + length)
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)).view(-1)


@dataclass(frozen=True)
class Segments:
    """Contiguous ranges of packed tokens; a token attends only to the tokens of its own segment.

    Attributes:
        offsets: int64 [S + 1] on the tokens' device, ascending from 0 to T; segment s is offsets[s]:offsets[s + 1].
        lengths: the S lengths on the host, all positive; stored so that no layer has to synchronise with the device.
        n_tokens: T, the number of packed tokens.

    Raises:
        SettingsError: offsets and lengths do not match.
    """

    offsets: Tensor
    lengths: tuple[int, ...]
    n_tokens: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.offsets.dtype != torch.int64 or self.offsets.ndim != 1:
            raise SettingsError(
                f"segment offsets must be int64 [S + 1], got {self.offsets.dtype} {list(self.offsets.shape)}"
            )
        if self.offsets.numel() != len(self.lengths) + 1:
            raise SettingsError(
                f"{len(self.lengths)} segment lengths need {len(self.lengths) + 1} offsets, got {self.offsets.numel()}"
            )
        if any(length <= 0 for length in self.lengths):
            raise SettingsError("segment lengths must be positive; use Segments.from_lengths, which drops empty ones")
        # Offsets are read only on the CPU, where this needs no synchronisation. Code for the GPU uses the lengths.
        if self.offsets.device.type == "cpu" and self.offsets.tolist() != [0, *accumulate(self.lengths)]:
            raise SettingsError("segment offsets must ascend from 0 by the segment lengths; use Segments.from_lengths")
        object.__setattr__(self, "n_tokens", sum(self.lengths))

    @staticmethod
    def from_lengths(lengths: Tensor) -> Segments:
        """Segments from int64 [S] lengths; empty segments are dropped."""
        numbers: list[int] = lengths.tolist()
        if min(numbers, default=0) < 0:
            raise SettingsError(f"a segment cannot hold {min(numbers)} tokens")
        kept = tuple(number for number in numbers if number)
        offsets = torch.zeros(len(kept) + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths[lengths > 0], 0, out=offsets[1:])
        return Segments(offsets, kept)

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, device: torch.device | str | None = None) -> Segments:
        """Segments from cumulative lengths, as FlashAttention takes them; empty segments are dropped.

        The lengths are copied to the host. If `cu_seqlens` is on a GPU, this waits for the GPU, so call it once for a
        batch. If it is on the CPU, nothing waits, and `device` can be the GPU of the tokens.

        Args:
            cu_seqlens: int32 or int64 [S + 1], ascending from 0 to T.
            device: device of the tokens; default: that of `cu_seqlens`.

        Raises:
            SettingsError: shape, dtype or values are not those.
        """
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
            raise SettingsError(
                f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        bounds: list[int] = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise SettingsError(f"cu_seqlens must begin with 0, got {bounds[0]}")
        for i, (begin, end) in enumerate(pairwise(bounds)):
            if end < begin:
                raise SettingsError(f"cu_seqlens must ascend, but entry {i + 1} is {end}, after {begin}")
        kept = tuple(end - begin for begin, end in pairwise(bounds) if end > begin)
        device = cu_seqlens.device if device is None else device
        return Segments(torch.tensor([0, *accumulate(kept)], dtype=torch.int64, device=device), kept)

    def ids(self) -> Tensor:
        """int64 [T]: the segment of every packed token."""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)

    @cached_property
    def pieces(self) -> Tensor:
        """int64 [S, 4] on the CPU: first query, queries, first key, keys of each segment. Computed once."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device="cpu")
        first = lengths.cumsum(0) - lengths
        return torch.stack([first, lengths, first, lengths], 1)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment, 0 without any."""
        return max(self.lengths, default=0)

    def runs(self, limit: int) -> list[Segments]:
        """The segments in order, cut into runs of those up to `limit` tokens and single longer ones. Computed once."""
        if limit not in self._runs:
            runs: list[list[int]] = []
            for length in self.lengths:
                if length <= limit and runs and runs[-1][0] <= limit:
                    runs[-1].append(length)
                else:
                    runs.append([length])
            device = self.offsets.device
            self._runs[limit] = [
                Segments(torch.tensor([0, *accumulate(run)], dtype=torch.int64, device=device), tuple(run))
                for run in runs
            ]
        return self._runs[limit]

    @property
    def equal_length_members(self) -> list[list[int]]:
        """Every segment's number once, see `equal_length_batches`. Computed once, used by every layer."""
        # A graph computes it itself: it cannot contain the lock of a cached property.
        return equal_length_batches(self.lengths) if torch.compiler.is_compiling() else self._members

    @property
    def equal_length_groups(self) -> list[tuple[slice | Tensor, int, int]]:
        """The same batches as (rows, count, length): a slice for one segment, an index [count * length] for several."""
        return self._group() if torch.compiler.is_compiling() else self._groups

    @cached_property
    def _runs(self) -> dict[int, list[Segments]]:
        return {}

    @cached_property
    def _members(self) -> list[list[int]]:
        return equal_length_batches(self.lengths)

    @cached_property
    def _groups(self) -> list[tuple[slice | Tensor, int, int]]:
        return self._group()

    def _group(self) -> list[tuple[slice | Tensor, int, int]]:
        starts = [0, *accumulate(self.lengths)]
        return [
            (
                batch_rows([starts[i] for i in members], self.lengths[members[0]], self.offsets.device),
                len(members),
                self.lengths[members[0]],
            )
            for members in self.equal_length_members
        ]


@dataclass(frozen=True)
class FragmentLayout:
    """The origin of every packed token, and which tokens attend to each other.

    The caller's tokens are numbered as if they were concatenated: first the P prefix tokens of each of the B slides,
    then the rows of the caller's patches. No tensor of that size exists.

    Attributes:
        source: int64 [T], number of each packed token among the caller's tokens.
        slides: one segment per slide (NoPE blocks).
        fragments: one segment per (slide, contour) (RoPE blocks).
        batch: B. n_prefix: P.
        n_rows: rows of the caller's patches, those of padding included.
    """

    source: Tensor
    slides: Segments
    fragments: Segments
    batch: int
    n_prefix: int
    n_rows: int

    @property
    def is_prefix(self) -> Tensor:
        """bool [T]: packed tokens that are prefix tokens."""
        return self.source < self.batch * self.n_prefix

    @property
    def prefix_kinds(self) -> Tensor:
        """int64 [T]: which of the P prefix tokens a packed token is (use with `is_prefix`)."""
        return self.source % max(self.n_prefix, 1)

    @property
    def patch_rows(self) -> Tensor:
        """int64 [T]: row of every packed patch; 0 at prefix tokens (use with `is_prefix`)."""
        return (self.source - self.batch * self.n_prefix).clamp_(min=0)

    def unpack_patches(self, packed: Tensor) -> Tensor:
        """Packed tokens [T, E] in the caller's order: [rows, E], without prefix tokens, 0 for rows of padding."""
        # Prefix tokens are written to rows in front of the patches, which are then cut off.
        out = packed.new_zeros((self.batch * self.n_prefix + self.n_rows, packed.shape[-1]))
        return out.index_copy(0, self.source, packed)[self.batch * self.n_prefix :]


def build_ragged_layout(
    n_prefix: int, lengths: Sequence[int], contour_index: Tensor | None, device: torch.device | None = None
) -> FragmentLayout:
    """Sort the tokens of concatenated slides once, for every layer.

    Args:
        n_prefix: number of prefix tokens (CLS and storage tokens) of each slide; never masked.
        lengths: patches of each slide, in order; 0 is a slide without tissue.
        contour_index: integer [sum N], the tissue fragment of each patch; -1 joins the prefix tokens. None: no fragment
            restriction, the prefix tokens included.
        device: device of the layout; default: that of `contour_index`, else the CPU.

    Returns:
        The layout of patches [sum N, ...]; tokens of one segment keep the caller's order.

    Raises:
        SettingsError: lengths and contour_index do not match, or a number is negative or not an integer.
    """
    lengths = [_count("a length of a slide", length) for length in lengths]
    total = sum(lengths)
    if contour_index is not None:
        if contour_index.is_floating_point() or contour_index.is_complex() or contour_index.dtype == torch.bool:
            raise SettingsError(f"contour_index must be an integer tensor, got {contour_index.dtype}")
        if contour_index.shape != (total,):
            raise SettingsError(f"contour_index is {list(contour_index.shape)}, but the slides hold {total} patches")
        device = contour_index.device if device is None else device
        contour_index = contour_index.to(device, torch.int64)
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    return _sorted_layout(n_prefix, counts, total, contour_index)


def build_fragment_layout(n_prefix: int, mask: Tensor, contour_index: Tensor | None = None) -> FragmentLayout:
    """Sort the tokens of a padded batch once, for every layer: the ragged layout of its valid patches.

    Args:
        n_prefix: number of prefix tokens (CLS and storage tokens) of each slide; never masked.
        mask: bool [B, N], True for valid patches.
        contour_index: integer [B, N], the tissue fragment of each patch; -1 joins the prefix tokens. None: no
            fragment restriction, the prefix tokens included.

    Returns:
        The layout of patches [B * N, ...]; tokens of one segment keep the caller's order.

    Raises:
        SettingsError: shapes or dtypes do not match, or n_prefix is negative or not an integer.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise SettingsError(f"mask must be bool [B, N], got {mask.dtype} {list(mask.shape)}")
    if contour_index is not None:
        if contour_index.shape != mask.shape:
            raise SettingsError(f"contour_index is {list(contour_index.shape)}, but mask is {list(mask.shape)}")
        contour_index = _as_integer(contour_index, mask)[mask]
    rows = mask.flatten().nonzero().view(-1)
    layout = _sorted_layout(n_prefix, mask.sum(1), rows.numel(), contour_index)
    n_all_prefix = layout.batch * n_prefix
    if rows.numel() == mask.numel():
        return layout
    # The same order, with the patches numbered by their rows in the padded batch.
    numbers = torch.cat([torch.arange(n_all_prefix, device=mask.device), n_all_prefix + rows])
    return replace(layout, source=numbers[layout.source], n_rows=mask.numel())


def _count(what: str, number: int) -> int:
    if not torch.compiler.is_compiling():  # numbers of a graph have no other type
        try:
            number = index(number)
        except TypeError:
            raise SettingsError(f"{what} must be an integer, got {number!r}") from None
    if number < 0:
        raise SettingsError(f"{what} must not be negative, got {number}")
    return number


def _sorted_layout(n_prefix: int, counts: Tensor, total: int, contour: Tensor | None) -> FragmentLayout:
    """The layout of slides with int64 [B] patches each, `total` in all, and int64 [total] contours or None."""
    n_prefix = _count("n_prefix", n_prefix)
    device, batch = counts.device, counts.numel()
    slides = fragments = Segments.from_lengths(counts + n_prefix)
    # Two stable sorts, the less important key first: the result is sorted by slide, inside a slide by contour, and
    # inside a contour in the caller's order, prefix tokens first. A single slide needs no sort by slide.
    source = torch.arange(batch * n_prefix + total, device=device)
    if contour is not None:
        contour = torch.cat([contour.new_full((batch * n_prefix,), PREFIX_CONTOUR), contour])
        contour, source = torch.sort(contour, stable=True)
    if batch > 1:
        of_slides = torch.arange(batch, device=device)
        of_patches = of_slides.repeat_interleave(counts, output_size=total)
        slide, order = torch.sort(torch.cat([of_slides.repeat_interleave(n_prefix), of_patches])[source], stable=True)
        source = source[order]
        contour = None if contour is None else contour[order]
    if contour is not None:
        # A fragment starts at each token whose contour or slide differs from that of the previous token.
        starts = torch.ones_like(source, dtype=torch.bool)
        starts[1:] = contour.diff() != 0
        if batch > 1:
            starts[1:] |= slide.diff() != 0
        bounds = torch.cat([starts.nonzero().view(-1), torch.tensor([source.numel()], device=device)])
        fragments = Segments.from_lengths(bounds.diff())
    return FragmentLayout(source, slides, fragments, batch, n_prefix, total)


def _as_integer(contour_index: Tensor, mask: Tensor) -> Tensor:
    if contour_index.dtype == torch.bool or contour_index.is_complex():
        raise SettingsError(f"contour_index must be an integer tensor, got {contour_index.dtype}")
    if not contour_index.is_floating_point():
        return contour_index.to(torch.int64)
    # Some tools store it as float. Padding may have any value, NaN included, and must not cause an error.
    clean = torch.where(mask, contour_index, torch.zeros_like(contour_index))
    as_integer = clean.to(torch.int64)
    if not torch.equal(as_integer.to(clean.dtype), clean):
        raise SettingsError(
            "contour_index holds values that are not whole numbers; it must number the tissue fragments"
        )
    return as_integer
