"""Tissue fragments of patches whose files do not state them: patches that touch or overlap are of one fragment.

This differs from the contours of segmentation where two pieces of tissue are less than a patch apart (one fragment
here), and where a row of patches was left out inside of a piece (two fragments here). A gap of one pixel counts as
touching: grids at other scales are rounded.
"""

from __future__ import annotations

import numpy as np

from exaonepath.errors import SettingsError

_PAIRS = 1 << 22  # pairs of patches that are compared at a time


def connected_fragments(coords: np.ndarray, patch_size: int) -> np.ndarray:
    """Number the groups of patches that touch or overlap, also at a corner.

    Args:
        coords: int [N, 2], top left corners in level-0 pixels.
        patch_size: side of a patch in level-0 pixels.

    Returns:
        int32 [N], from 0, in the order of the first patch of each group. Time grows as N log N, memory as N.

    Raises:
        SettingsError: the patches are too small for coordinates that lie so far apart.
    """
    n = len(coords)
    if n == 0:
        return np.empty(0, np.int32)
    points = np.asarray(coords, np.int64)
    reach = patch_size + 1
    # Patches in one cell of this side are less than a side apart along both axes, so they touch: cells are joined.
    cell = np.floor_divide(points, reach)
    if np.prod((np.ptp(cell, axis=0) + 3).astype(float)) > 2.0**62:
        raise SettingsError(f"patches of {patch_size} pixels are too small for coordinates that lie so far apart")
    cells, of = np.unique(cell, axis=0, return_inverse=True)
    of = of.reshape(-1)
    order = np.argsort(of, kind="stable")
    bounds = np.searchsorted(of[order], np.arange(len(cells) + 1))
    low = np.minimum.reduceat(points[order], bounds[:-1], axis=0)
    high = np.maximum.reduceat(points[order], bounds[:-1], axis=0)
    labels = np.arange(len(cells))
    # In cells side by side, the other axis differs by less than a side: only the gap along this axis counts.
    for axis in (0, 1):
        a, b = _neighbours(cells, (1, 0) if axis == 0 else (0, 1))
        near = low[b, axis] - high[a, axis] <= reach
        labels = _joined(labels, a[near], b[near])
    # In cells that meet at a corner, both gaps count, and they have to be those of one pair.
    for step in ((1, 1), (1, -1)):
        a, b = _neighbours(cells, step)
        open_ = labels[a] != labels[b]
        a, b = a[open_], b[open_]
        near = _any_pair(points, order, bounds, a, b, reach)
        labels = _joined(labels, a[near], b[near])
    found = labels[of]
    _, first, number = np.unique(found, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[number.reshape(-1)]


def _neighbours(cells: np.ndarray, step: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs of cells (rows sorted, int64 [C, 2]) that lie a step apart."""
    low, high = cells.min(axis=0) - 1, cells.max(axis=0) + 1
    width = int(high[1] - low[1]) + 1
    keys = (cells[:, 0] - low[0]) * width + (cells[:, 1] - low[1])  # increasing, since the rows are sorted
    wanted = keys + step[0] * width + step[1]
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    hit = np.flatnonzero(keys[at] == wanted)
    return hit, at[hit]


def _any_pair(
    points: np.ndarray, order: np.ndarray, bounds: np.ndarray, a: np.ndarray, b: np.ndarray, reach: int
) -> np.ndarray:
    """For each pair of cells, whether a patch of the one and a patch of the other touch: bool [P]."""
    result = np.zeros(len(a), bool)
    count_a, count_b = np.diff(bounds)[a], np.diff(bounds)[b]
    counts = count_a * count_b
    ends = np.cumsum(counts)
    start = 0
    while start < len(a):
        stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + _PAIRS, "right")))
        part = np.arange(start, stop)
        pair = np.repeat(part, counts[part])
        within = np.arange(len(pair)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        one = points[order[bounds[a[pair]] + within // count_b[pair]]]
        other = points[order[bounds[b[pair]] + within % count_b[pair]]]
        result[pair[(np.abs(one - other) <= reach).all(axis=1)]] = True
        start = stop
    return result


def _joined(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Labels after the groups of each pair (a, b) were united; the label of a group is its smallest member."""
    labels = labels.copy()
    while True:
        one, other = labels[a], labels[b]
        differ = one != other
        if not differ.any():
            return labels
        np.minimum.at(labels, np.maximum(one, other)[differ], np.minimum(one, other)[differ])
        while not np.array_equal(labels[labels], labels):
            labels = labels[labels]
