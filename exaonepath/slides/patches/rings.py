"""Geometry of closed rings: clipping to the slide, and which points lie in a region. Even-odd rule throughout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PAIRS = 1 << 21  # pairs of an edge and a point that are tested at a time


def clipped(ring: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of a ring, float64 [P, 2], on the pixels of a slide: 0 <= x <= width - 1, 0 <= y <= height - 1.

    Where a ring leaves the slide, its outline follows the border; pieces of a concave ring stay joined along it.
    """
    for axis, limit in enumerate(size):
        for sign, bound in ((1.0, limit - 1.0), (-1.0, 0.0)):
            if len(ring):
                ring = _cut(ring, axis, sign, bound)
    return ring


def _cut(ring: np.ndarray, axis: int, sign: float, bound: float) -> np.ndarray:
    value = ring[:, axis]
    inside = sign * value <= sign * bound
    if inside.all():
        return ring
    following = np.roll(ring, -1, axis=0)
    crosses = inside != np.roll(inside, -1)
    step = np.where(crosses, following[:, axis] - value, 1.0)
    meeting = ring + ((bound - value) / step)[:, None] * (following - ring)
    meeting[:, axis] = bound
    both = np.stack([ring, meeting], axis=1).reshape(-1, 2)
    return both[np.stack([inside, crosses], axis=1).reshape(-1)]


def is_degenerate(ring: np.ndarray) -> bool:
    """Whether all points of an integer ring [P, 2] lie on one line, so that it has no area."""
    points = np.asarray(ring, np.int64)
    if len(points) < 3:
        return True
    offset = points - points[0]
    far = offset[np.abs(offset).sum(1).argmax()]
    return bool((far[0] * offset[:, 1] == far[1] * offset[:, 0]).all())


def strictly_inside(rings: Sequence[np.ndarray], points: np.ndarray, scale: int = 1) -> np.ndarray:
    """Which points lie in a region: strictly inside its first ring, and neither in nor on one of the others (holes).

    Args:
        rings: integer [P, 2] each.
        points: int64 [n, 2], `scale` times their positions; products of coordinates must fit into 64 bits.
        scale: an integer.

    Returns:
        bool [n]
    """
    odd, on_edge = _locate(rings[0], points, scale)
    result = odd & ~on_edge
    for hole in rings[1:]:
        within = np.flatnonzero(result)
        if not len(within):
            break
        odd, on_edge = _locate(hole, points[within], scale)
        result[within[odd | on_edge]] = False
    return result


def _locate(ring: np.ndarray, points: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """(inside by the even-odd rule, on the outline), bool [n] each; the first is not defined on the outline.

    Points are sorted by y, so that an edge meets only the points between its ends.
    """
    odd, on_edge = np.zeros(len(points), bool), np.zeros(len(points), bool)
    end = np.asarray(ring, np.int64) * scale
    begin = np.roll(end, 1, axis=0)
    low, high = end.min(0), end.max(0)
    near = np.flatnonzero(((points >= low) & (points <= high)).all(1))
    near = near[np.argsort(points[near, 1], kind="stable")]
    x, y = points[near].T
    top, bottom = np.minimum(begin[:, 1], end[:, 1]), np.maximum(begin[:, 1], end[:, 1])
    first, last = np.searchsorted(y, top, "left"), np.searchsorted(y, bottom, "right")
    counts = last - first
    crossings, touched = np.zeros(len(near), np.int64), np.zeros(len(near), bool)
    edges = np.flatnonzero(counts)
    for group in np.split(edges, np.flatnonzero(np.diff(np.cumsum(counts[edges]) // _PAIRS)) + 1):
        times = counts[group]
        edge = np.repeat(group, times)
        at = np.arange(len(edge)) - np.repeat(np.cumsum(times) - times - first[group], times)
        (x0, y0), (x1, y1) = begin[edge].T, end[edge].T
        # Twice the signed area of (begin, end, point): 0 on the line, positive left of an edge that goes down.
        side = (x1 - x0) * (y[at] - y0) - (x[at] - x0) * (y1 - y0)
        on = (side == 0) & (x[at] >= np.minimum(x0, x1)) & (x[at] <= np.maximum(x0, x1))
        touched[at[on]] = True
        # The lower end of an edge does not belong to it: a vertex that the outline passes through counts once.
        right = ((side > 0) == (y1 > y0)) & (y[at] < bottom[edge])
        np.add.at(crossings, at[right], 1)
    odd[near], on_edge[near] = crossings % 2 == 1, touched
    return odd, on_edge
