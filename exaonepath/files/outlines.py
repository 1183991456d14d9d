"""The outlines of a slide's tissue and of the regions that were excluded from it, as stored in the patches file.

All outlines lie in one table: contours first, so that an outline's index is the `contour_index` of its patches, then
their holes, then the excluded regions, each followed by its holes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from exaonepath.errors import DataFileError
from exaonepath.files.hdf5 import StoredFile
from exaonepath.files.hdf5_output import CHUNK_ROWS, Hdf5Output

TISSUE = "tissue"
KINDS = (TISSUE, "excluded", "pen", "blur")  # values 0, 1, 2, 3 of the dataset `outline_kind`
_DATASETS = ("outline_points", "outline_offsets", "outline_parent", "outline_kind")


class Excluded(NamedTuple):
    """A region whose patches are left out.

    Attributes:
        rings: int32 [P, 2] each, level-0 (x, y): the outline of the region, then those of the holes in it.
        reason: "excluded" (given by the user), "pen" or "blur".
    """

    rings: list[np.ndarray]
    reason: str


@dataclass(frozen=True)
class Outlines:
    """The outlines that patches were computed from, in level-0 pixels.

    Attributes:
        contours: int32 [P, 2] each as (x, y); the index of a contour is the `contour_index` of its patches.
        holes: for each contour, its holes, int32 [P, 2] each.
        excluded: regions whose patches were left out.
    """

    contours: list[np.ndarray]
    holes: list[list[np.ndarray]]
    excluded: list[Excluded] = field(default_factory=list)


def write_outlines(file: Hdf5Output, outlines: Outlines) -> None:
    """Write the four datasets of the outlines to a patches file."""
    rings: list[np.ndarray] = list(outlines.contours)
    parents, kinds = [-1] * len(rings), [0] * len(rings)
    for contour, holes in enumerate(outlines.holes):
        rings += holes
        parents += [contour] * len(holes)
        kinds += [0] * len(holes)
    for region in outlines.excluded:
        outer = len(rings)
        rings += region.rings
        parents += [-1] + [outer] * (len(region.rings) - 1)
        kinds += [KINDS.index(region.reason)] * len(region.rings)
    offsets = np.cumsum([0, *map(len, rings)], dtype=np.int64)
    points = file.rows("outline_points", (int(offsets[-1]), 2), "int32", compress=True)
    for batch in _batches(rings):
        points.append(batch)
    points.finish()
    file.array("outline_offsets", offsets)
    file.array("outline_parent", np.array(parents, np.int32))
    file.array("outline_kind", np.array(kinds, np.int8))
    file.attributes({"kinds": ",".join(KINDS)}, of="outline_kind")


def _batches(rings: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The points of all rings in arrays of about a chunk: a slide may have 100,000 rings of four points."""
    waiting: list[np.ndarray] = []
    points = 0
    for ring in rings:
        waiting.append(np.asarray(ring, np.int32).reshape(-1, 2))
        points += len(ring)
        if points >= CHUNK_ROWS:
            yield np.concatenate(waiting)
            waiting, points = [], 0
    if waiting:
        yield np.concatenate(waiting)


def has_outlines(file: StoredFile) -> bool:
    """Whether a patches file holds outlines; files of EXAONE Path and of earlier versions do not."""
    return _DATASETS[0] in file


def parse_outlines(file: StoredFile) -> Outlines:
    """The outlines of an opened patches file.

    Raises:
        DataFileError: there are none, or the datasets contradict each other.
    """
    if not has_outlines(file):
        raise DataFileError(
            f"{file.path} holds no contours: it was made by EXAONE Path, by another program, or by a version that did "
            "not store them; make it again (overwrite) to have them stored"
        )
    file.require(_DATASETS)
    points = file.dataset("outline_points", "iu", (None, 2)).read().astype(np.int32, copy=False)
    offsets = file.dataset("outline_offsets", "iu", (None,)).read()
    count = max(0, len(offsets) - 1)
    parents = file.dataset("outline_parent", "iu", (count,)).read().astype(np.int64)
    kinds = file.dataset("outline_kind", "iu", (count,)).read().astype(np.int64)
    _check_table(file, len(points), offsets, parents, kinds)
    contours: list[np.ndarray] = []
    holes: list[list[np.ndarray]] = []
    excluded: dict[int, Excluded] = {}
    for index, (parent, kind) in enumerate(zip(parents.tolist(), kinds.tolist(), strict=True)):
        ring = points[offsets[index] : offsets[index + 1]]
        if kind == 0 and parent < 0:
            contours.append(ring)
            holes.append([])
        elif kind == 0:
            holes[parent].append(ring)
        elif parent < 0:
            excluded[index] = Excluded([ring], KINDS[kind])
        else:
            excluded[parent].rings.append(ring)
    return Outlines(contours, holes, list(excluded.values()))


def _check_table(file: StoredFile, points: int, offsets: np.ndarray, parents: np.ndarray, kinds: np.ndarray) -> None:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != points or (np.diff(offsets.astype(np.int64)) < 1).any():
        raise DataFileError(f"{file.path}: outline_offsets does not divide the {points} outline_points")
    if ((kinds < 0) | (kinds >= len(KINDS))).any():
        raise DataFileError(f"{file.path}: outline_kind holds other values than 0 to {len(KINDS) - 1}")
    index = np.arange(len(parents))
    tops = parents < 0
    contours = int((tops & (kinds == 0)).sum())
    inner = np.flatnonzero(~tops)
    wrong = (
        not (tops & (kinds == 0))[:contours].all()  # contours come first
        or (parents < -1).any()
        or (parents[inner] >= index[inner]).any()
        or not tops[parents[inner]].all()
        or (kinds[parents[inner]] != kinds[inner]).any()
    )
    if wrong:
        raise DataFileError(f"{file.path}: outline_parent does not name a contour for every hole")
