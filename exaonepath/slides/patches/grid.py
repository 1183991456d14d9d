"""Computes patch coordinates from tissue contours: a grid over each contour's bounding box, reduced to the tissue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.slides.patches.polygons import Grids, Polygons, locate

# Contours are processed in groups: a slide may have 100,000 small ones, or one with millions of points.
_GROUP_VERTICES, _GROUP_POINTS = 1 << 18, 1 << 20


class PatchGrid(NamedTuple):
    """Patches of a slide. coords int32 [N, 2]: top left corners (x, y) at level 0; contour_index int32 [N]."""

    coords: np.ndarray
    contour_index: np.ndarray


def patch_grid(
    contours: Sequence[np.ndarray],
    holes: Sequence[Sequence[np.ndarray]],
    patch: int,
    step: tuple[int, int],
) -> PatchGrid:
    """Coordinates of the patches on tissue, contour by contour, each row by row from its top left corner.

    A patch is kept if at least one of four points around its centre is in or on the contour, and its centre is not
    strictly inside one of the contour's holes. Patches of neighbouring contours may overlap.

    Args:
        contours: int32 [P, 2] each, P >= 1, level-0 (x, y).
        holes: for each contour, its holes, int32 [P, 2] each.
        patch: patch width in level-0 pixels; as in EXAONE Path, it is used for both axes here.
        step: distance between patches, (x, y) in level-0 pixels.

    Raises:
        SettingsError: patch or step is not positive, or the number of hole lists differs from the number of contours.
    """
    if patch <= 0 or min(step) <= 0:
        raise SettingsError(f"patch and step must be positive, not {patch} and {step}")
    if len(contours) != len(holes):
        raise SettingsError(f"{len(contours)} contours with {len(holes)} lists of holes")
    coords, owners = [np.empty((0, 2), np.int32)], [np.empty(0, np.int32)]
    for start, stop in _groups(contours, step):
        group, owner = _group_grid(contours[start:stop], holes[start:stop], patch, step)
        coords.append(group.astype(np.int32))
        owners.append((owner + start).astype(np.int32))
    return PatchGrid(np.concatenate(coords), np.concatenate(owners))


def _groups(contours: Sequence[np.ndarray], step: tuple[int, int]) -> Iterator[tuple[int, int]]:
    start = vertices = points = 0
    for index, contour in enumerate(contours):
        _, _, width, height = cv2.boundingRect(contour)
        size = ((width - 1) // step[0] + 1) * ((height - 1) // step[1] + 1)
        if index > start and (vertices + len(contour) > _GROUP_VERTICES or points + size > _GROUP_POINTS):
            yield start, index
            start, vertices, points = index, 0, 0
        vertices, points = vertices + len(contour), points + size
    if len(contours) > start:
        yield start, len(contours)


def _group_grid(
    contours: Sequence[np.ndarray], holes: Sequence[Sequence[np.ndarray]], patch: int, step: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """coords int64 [N, 2], and the index of the contour in the group, int64 [N]."""
    outer, low, high = _polygons(contours)
    columns, rows = ((high - low) // np.array(step) + 1).T
    corners = Grids(low[:, 0], low[:, 1], columns, rows, *step)
    half = patch // 2
    shift = half // 2
    kept = np.zeros(corners.offsets[-1], bool)
    for y in (half - shift, half + shift):
        probes = Grids(corners.x, corners.y + y, corners.columns, corners.rows, *step)
        for location in locate(outer, probes, (half - shift, half + shift)):
            kept |= location.covered
    inside = [hole for group in holes for hole in group]
    if inside:
        parents = np.repeat(np.arange(len(holes)), [len(group) for group in holes])
        kept[_in_holes(inside, parents, corners, patch)] = False
    contour, row, column = corners.places(np.flatnonzero(kept))
    x = corners.x[contour] + column * step[0]
    y = corners.y[contour] + row * step[1]
    return np.stack([x, y], axis=1), contour


def _in_holes(holes: list[np.ndarray], parents: np.ndarray, corners: Grids, patch: int) -> np.ndarray:
    """Flat indices of the patches whose centre is strictly inside one of their contour's holes."""
    # The centre of a patch of odd size lies between pixels: all coordinates are doubled, so that they stay integers.
    polygons, low, high = _polygons(holes, scale=2)
    step = np.array([2 * corners.step_x, 2 * corners.step_y])
    origin = np.stack([2 * corners.x[parents] + patch, 2 * corners.y[parents] + patch], axis=1)
    limit = np.stack([corners.columns[parents], corners.rows[parents]], axis=1)
    # Only the part of the contour's grid that is covered by the hole's bounding box is tested.
    first = np.clip(-((origin - low) // step), 0, limit)
    count = np.maximum(np.clip((high - origin) // step + 1, 0, limit) - first, 0)
    x, y = (origin + first * step).T
    columns, rows = count.T
    centres = Grids(x, y, columns, rows, int(step[0]), int(step[1]))
    (location,) = locate(polygons, centres)
    hole, row, column = centres.places(np.flatnonzero(location.strictly_inside))
    parent = parents[hole]
    row, column = row + first[hole, 1], column + first[hole, 0]
    return corners.offsets[parent] + row * corners.columns[parent] + column


def _polygons(outlines: Sequence[np.ndarray], scale: int = 1) -> tuple[Polygons, np.ndarray, np.ndarray]:
    """The outlines multiplied by `scale`, and the low and high corners of their bounding boxes, int64 [n, 2] each."""
    lengths = np.array([len(outline) for outline in outlines], np.int64)
    vertices = np.concatenate(outlines).astype(np.int64 if scale != 1 else np.int32, copy=False) * scale
    begins = np.cumsum(lengths) - lengths
    low = np.minimum.reduceat(vertices, begins, axis=0).astype(np.int64)
    high = np.maximum.reduceat(vertices, begins, axis=0).astype(np.int64)
    return Polygons(vertices, lengths), low, high
