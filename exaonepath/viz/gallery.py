"""Example patches for the colours: a few groups of similar embeddings, and images of their patches."""

from __future__ import annotations

import logging

import cv2
import numpy as np

from exaonepath.errors import SlideReadError
from exaonepath.slides.image import SlideImage

logger = logging.getLogger(__name__)

_ROUNDS = 25
_MOST = 20_000  # of more patches, an even sample is grouped


def exemplars(scores: np.ndarray, coords: np.ndarray, patch_size: int, groups: int, each: int) -> list[np.ndarray]:
    """Representative patches for the colours of the picture.

    Args:
        scores: float [N, 3], principal scores (finite).
        coords: int [N, 2], corners at level 0.
        patch_size: level-0 pixels; patches of one group do not overlap on the slide, if possible.
        groups, each: largest number of groups, and of patches in a group.

    Returns:
        For each group the indices of its patches, int64, the most typical first; groups in the order of their first
        component. Fewer if there are fewer distinct patches.
    """
    chosen = np.arange(0, len(scores), max(1, -(-len(scores) // _MOST)))
    points = np.clip(scores[chosen], -1.5, 1.5)
    centres = _centres(points, groups)
    label = _nearest(points, centres)
    result = []
    for group in np.argsort(centres[:, 0], kind="stable"):
        members = chosen[label == group]
        distance = ((scores[members] - centres[group]) ** 2).sum(axis=1)
        members = members[np.argsort(distance, kind="stable")]
        result.append(_apart(members, coords, patch_size, each))
    return [group for group in result if len(group)]


def read_tile(slide: SlideImage, corner: np.ndarray, patch_size: int, side: int) -> np.ndarray:
    """One patch as uint8 RGB [side, side, 3]; grey if it cannot be read, with a warning."""
    pixels = tile_or_none(slide, corner, patch_size, side)
    return np.full((side, side, 3), 200, np.uint8) if pixels is None else pixels


def tile_or_none(slide: SlideImage, corner: np.ndarray, patch_size: int, side: int) -> np.ndarray | None:
    """One patch as uint8 RGB [side, side, 3], black outside the slide; None if it cannot be read, with a warning."""
    # Read from the level with about the needed resolution, to avoid full-size reads of 24 patches.
    level = slide.get_best_level_for_downsample(max(1.0, patch_size / side))
    down = slide.level_downsamples[level]
    size = max(1, round(patch_size / down[0])), max(1, round(patch_size / down[1]))
    try:
        pixels = slide.read_region((int(corner[0]), int(corner[1])), level, size)
    except SlideReadError as exc:
        logger.warning("%s; shown grey in the picture", exc)
        return None
    return cv2.resize(np.ascontiguousarray(pixels[..., :3]), (side, side), interpolation=cv2.INTER_AREA)


def _centres(points: np.ndarray, groups: int) -> np.ndarray:
    """k-means, initialised with points that are far from each other: deterministic, and includes rare colours."""
    first = int(((points - np.median(points, axis=0)) ** 2).sum(axis=1).argmin())
    centres = [points[first]]
    gap = ((points - centres[0]) ** 2).sum(axis=1)
    while len(centres) < groups and gap.max() > 1e-9:
        centres.append(points[int(gap.argmax())])
        gap = np.minimum(gap, ((points - centres[-1]) ** 2).sum(axis=1))
    found = np.array(centres)
    for _ in range(_ROUNDS):
        label = _nearest(points, found)
        moved = np.array(
            [points[label == k].mean(axis=0) if (label == k).any() else found[k] for k in range(len(found))]
        )
        if np.allclose(moved, found, atol=1e-6):
            break
        found = moved
    return found


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)


def _apart(members: np.ndarray, coords: np.ndarray, patch_size: int, each: int) -> np.ndarray:
    """The first `each` members that do not overlap; if there are fewer, overlapping ones are added."""
    taken: list[int] = []
    for index in members:
        gaps = np.abs(coords[taken].astype(np.int64) - coords[index].astype(np.int64)).max(axis=1) if taken else []
        if not taken or min(gaps) >= patch_size:
            taken.append(int(index))
        if len(taken) == each:
            break
    rest = [int(index) for index in members[: 4 * each] if int(index) not in taken]
    return np.array((taken + rest)[:each], np.int64)
