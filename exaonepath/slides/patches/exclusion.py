"""Leaves out the patches of excluded regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exaonepath.files.outlines import Excluded
from exaonepath.slides.patches.rings import strictly_inside


def region_of_patches(coords: np.ndarray, patch: int, excluded: Sequence[Excluded]) -> np.ndarray:
    """The first excluded region that each patch lies in, int64 [N], -1 for none.

    The rule is that of the holes in tissue: a patch lies in a region if its centre is strictly inside it. Integers are
    computed with, so the result is exact.

    Args:
        coords: integer [N, 2], top left corners at level 0.
        patch: side of a patch in level-0 pixels.
        excluded: the regions.
    """
    result = np.full(len(coords), -1, np.int64)
    # The centre of a patch of odd size lies between pixels: all coordinates are doubled.
    centres = 2 * np.asarray(coords, np.int64) + patch
    order = np.argsort(centres[:, 1], kind="stable")
    rows = centres[order, 1]
    for index, region in enumerate(excluded):
        low, high = 2 * int(region.rings[0][:, 1].min()), 2 * int(region.rings[0][:, 1].max())
        near = order[np.searchsorted(rows, low) : np.searchsorted(rows, high, "right")]
        near = near[result[near] < 0]
        if len(near):
            result[near[strictly_inside(region.rings, centres[near], scale=2)]] = index
    return result
