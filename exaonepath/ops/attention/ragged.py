"""The fragment layout of concatenated slides, [sum N, ...], without padding.

In a batch padded to the longest slide, up to half of the rows can be padding. Training reads slides of different
lengths, so its batches are concatenated instead, and the packed order is computed from the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import PREFIX_CONTOUR, FragmentLayout, Segments


@dataclass(frozen=True)
class RaggedLayout(FragmentLayout):
    """A `FragmentLayout` for patches [1, sum N, ...], slide after slide.

    `source` numbers the tokens as if all slides were padded to the longest, `n_patches`, but no tensor of that size
    exists.

    Attributes:
        rows: int64 [T], row in [sum N] of every packed patch; 0 at prefix tokens.
        patches_per_slide: N of each slide.
    """

    rows: Tensor
    patches_per_slide: tuple[int, ...]

    @property
    def patch_rows(self) -> Tensor:
        """int64 [T]: row in [sum N] of every packed patch; 0 at prefix tokens (use with `is_prefix`)."""
        return self.rows

    def unpack_patches(self, packed: Tensor) -> Tensor:
        """Packed tokens [T, E] in the caller's order: [1, sum N, E], without prefix tokens."""
        is_patch = ~self.is_prefix
        out = packed.new_zeros((sum(self.patches_per_slide), packed.shape[-1]))
        return out.index_copy(0, self.rows[is_patch], packed[is_patch])[None]


def build_ragged_layout(
    n_prefix: int, lengths: Sequence[int], contour_index: Tensor | None, device: torch.device | None = None
) -> RaggedLayout:
    """Sort the tokens of concatenated slides once, for every layer.

    Args:
        n_prefix: number of prefix tokens in front of each slide's patches.
        lengths: patches of each slide, in order; 0 is a slide without tissue.
        contour_index: integer [sum N], the tissue fragment of each patch (-1 joins the prefix tokens); None: no
            fragment restriction, the prefix tokens included.
        device: device of the layout; default: that of `contour_index`, else the CPU.

    Returns:
        The layout; tokens of one segment keep the caller's order, as in `build_fragment_layout`.

    Raises:
        SettingsError: lengths and contour_index do not match.
    """
    if any(length < 0 for length in lengths):
        raise SettingsError(f"lengths of slides must not be negative, got {list(lengths)}")
    batch, total = len(lengths), sum(lengths)
    if contour_index is not None:
        if contour_index.is_floating_point() or contour_index.is_complex() or contour_index.dtype == torch.bool:
            raise SettingsError(f"contour_index must be an integer tensor, got {contour_index.dtype}")
        if contour_index.shape != (total,):
            raise SettingsError(f"contour_index is {list(contour_index.shape)}, but the slides hold {total} patches")
        device = contour_index.device if device is None else device
    device = torch.device("cpu") if device is None else device
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    slides = torch.arange(batch, device=device)
    patch_slide = torch.repeat_interleave(slides, counts, output_size=total)
    patch_rows = torch.arange(total, device=device)
    first_row = counts.cumsum(0) - counts

    slide = torch.cat([slides.repeat_interleave(n_prefix), patch_slide])
    within = torch.cat(
        [torch.arange(n_prefix, device=device).repeat(batch), n_prefix + patch_rows - first_row[patch_slide]]
    )
    rows = torch.cat([torch.zeros(batch * n_prefix, dtype=torch.int64, device=device), patch_rows])
    prefix_contour = torch.full((batch * n_prefix,), PREFIX_CONTOUR, dtype=torch.int64, device=device)
    order = torch.arange(slide.numel(), device=device)
    contour = None
    if contour_index is not None:
        contour = torch.cat([prefix_contour, contour_index.to(device, torch.int64)])
        order = torch.sort(contour, stable=True).indices
    # Two stable sorts, the less important key first: the result is sorted by slide, inside a slide by contour, and
    # inside a contour in the caller's order.
    order = order[torch.sort(slide[order], stable=True).indices]

    slide = slide[order]
    slide_segments = Segments.from_lengths(counts + n_prefix)
    fragments = slide_segments
    if contour is not None:
        contour = contour[order]
        starts = torch.ones_like(slide, dtype=torch.bool)
        starts[1:] = (contour.diff() != 0) | (slide.diff() != 0)
        bounds = torch.cat([starts.nonzero().view(-1), torch.tensor([slide.numel()], device=device)])
        fragments = Segments.from_lengths(bounds.diff())
    longest = max(lengths, default=0)
    return RaggedLayout(
        source=slide * (n_prefix + longest) + within[order],
        slides=slide_segments,
        fragments=fragments,
        batch=batch,
        n_prefix=n_prefix,
        n_patches=longest,
        rows=rows[order],
        patches_per_slide=tuple(int(n) for n in lengths),
    )
