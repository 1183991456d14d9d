"""Fragments of patches whose contours are not known: connected pieces of the grid."""

from __future__ import annotations

import numpy as np


def grid_step(coords: np.ndarray, patch_size: int) -> int:
    """Distance between neighbouring patches in level-0 pixels, inferred from their coordinates int [N, 2]."""
    found = _gaps(coords)
    return int(np.median(found)) if len(found) else int(patch_size)


def _gaps(coords: np.ndarray) -> np.ndarray:
    """Distances between patches that follow each other in a row or in a column."""
    gaps = []
    for along, across in ((0, 1), (1, 0)):
        ordered = coords[np.lexsort((coords[:, along], coords[:, across]))].astype(np.int64)
        same_line = np.diff(ordered[:, across]) == 0
        gap = np.diff(ordered[:, along])[same_line]
        gaps.append(gap[gap > 0])
    return np.concatenate(gaps)


def fragments_of_grid(coords: np.ndarray, patch_size: int) -> np.ndarray:
    """A fragment for each patch: patches that touch or overlap, also at a corner, belong to the same one. A gap of one
    pixel counts as touching: grids of other programs are rounded.

    Other programs store no contours. Contours of tissue pieces whose patches touch become one fragment, and a piece in
    which a row of patches is missing becomes two; otherwise the fragments are those of the contours. In a grid with
    gaps between all patches, the smallest distance takes the place of the patch size.

    Args:
        coords: int [N, 2], corners in level-0 pixels, which fit into 32 bits.
        patch_size: in level-0 pixels.

    Returns:
        int32 [N], numbered from 0 in the order of their first patches.
    """
    if not len(coords):
        return np.empty(0, np.int32)
    # The smallest distance, not the usual one: of many small pieces, most distances are those between pieces.
    gaps = _gaps(coords)
    reach = max(int(patch_size), int(gaps.min()) if len(gaps) else 0, 1) + 1
    # Cells of the size of a patch: two patches in one cell, or in cells side by side if they are near enough along that
    # axis, are connected. Only cells that meet at a corner need their patches to be looked at one by one.
    points = coords.astype(np.int64)
    cells, cell = np.unique(points // reach, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    order = np.argsort(cell, kind="stable")
    starts = np.searchsorted(cell[order], np.arange(len(cells) + 1))
    low = np.minimum.reduceat(points[order], starts[:-1], axis=0)
    high = np.maximum.reduceat(points[order], starts[:-1], axis=0)
    edges = []
    for axis in (0, 1):
        first, second = _neighbours(cells, (1 - axis, axis))
        near = low[second, axis] - high[first, axis] <= reach
        edges.append((first[near], second[near]))
    labels = _components(len(cells), edges)
    for down in (1, -1):
        first, second = _neighbours(cells, (1, down))
        gap = low[second, 1] - high[first, 1] if down == 1 else low[first, 1] - high[second, 1]
        near = (low[second, 0] - high[first, 0] <= reach) & (gap <= reach) & (labels[first] != labels[second])
        first, second = first[near], second[near]
        sure = (np.diff(starts)[first] == 1) & (np.diff(starts)[second] == 1)
        for at in np.flatnonzero(~sure):
            of = [points[order[starts[c] : starts[c + 1]]] * (1, down) for c in (first[at], second[at])]
            sure[at] = _corner_met(of[0], of[1], reach)
        edges.append((first[sure], second[sure]))
    labels = _components(len(cells), edges)[cell]
    _, where, number = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(where), np.int32)
    rank[np.argsort(where, kind="stable")] = np.arange(len(where))
    return rank[number.reshape(-1)]


def _neighbours(cells: np.ndarray, offset: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the cells that have a neighbour at this offset, and of those neighbours."""
    shifted = cells - cells.min(axis=0) + 1
    width = int(shifted[:, 1].max()) + 2
    keys = shifted[:, 0] * width + shifted[:, 1]  # sorted, since the cells are
    wanted = keys + offset[0] * width + offset[1]
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = np.flatnonzero(keys[at] == wanted)
    return found, at[found]


def _corner_met(first: np.ndarray, second: np.ndarray, reach: int) -> bool:
    """Whether a point of `second` [n, 2] is at most `reach` beyond a point of `first` [m, 2] along both axes."""
    ordered = first[np.argsort(-first[:, 0], kind="stable")]
    farthest = np.maximum.accumulate(ordered[:, 1])
    # Of the points that are near enough along the first axis, the farthest along the second decides.
    count = np.searchsorted(-ordered[:, 0], reach - second[:, 0], side="right")
    usable = count > 0
    return bool((second[usable, 1] - farthest[count[usable] - 1] <= reach).any())


def _components(count: int, edges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The smallest node of the connected component of each of `count` nodes."""
    labels = np.arange(count)
    first, second = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    while True:
        joined = labels.copy()
        smaller = np.minimum(labels[first], labels[second])
        np.minimum.at(joined, labels[first], smaller)
        np.minimum.at(joined, labels[second], smaller)
        while not np.array_equal(joined, joined[joined]):
            joined = joined[joined]
        if np.array_equal(joined, labels):
            return labels
        labels = joined
