"""Principal components and clusters of patch vectors: of the unit rows, so that distances follow the cosine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from exaonepath.viz.colors import Projection, project, score_colors
from exaonepath.viz.values.vectors import UnitRows

_SAMPLE = 20_000  # rows that the axes are computed from; of more, an even sample
_CLUSTER_SAMPLE = 20_000
_CLUSTER_WIDTH = 32  # components that clusters are found in
_ROUNDS = 40
_STARTS = 4
_BLOCK = 16_384
MOST_CLUSTERS = 12
NO_CLUSTER = 255  # of a vector that is not usable


class Components(NamedTuple):
    """Patches on the principal components of their vectors.

    Attributes:
        points: float32 [N, 2], the first two components, about -1 to 1; NaN for vectors that are not usable.
        colours: uint8 [N, 3], sRGB: patches with similar vectors have similar colours; grey if not usable.
        explained: share of the variance along the first three components.
    """

    points: np.ndarray
    colours: np.ndarray
    explained: tuple[float, ...]


def components(unit: UnitRows) -> Components:
    """Principal components of the vectors of a slide, and colours from them. Deterministic."""
    found = _projection(unit)
    points = found.scores[:, :2].astype(np.float32)
    return Components(points, score_colors(found.scores), tuple(float(share) for share in found.explained))


def _projection(unit: UnitRows) -> Projection:
    """`viz.colors.project` of all rows, by way of the first components if there are many: 100,000 rows of 768 numbers
    would take gigabytes in double precision."""
    usable = np.flatnonzero(unit.usable)
    if len(unit) <= _SAMPLE:
        rows = np.array(unit.rows, np.float32)
        rows[~unit.usable] = np.nan
        return project(rows)
    # The components that matter lie within the first few of a sample; distances to them are kept by the projection.
    found = _reduced(unit, usable)
    reduced = np.full((len(unit), found.shape[1]), np.nan, np.float32)
    reduced[usable] = found
    return project(reduced)


def clusters(unit: UnitRows, count: int, seed: int = 0) -> np.ndarray:
    """k-means clusters of the vectors of a slide: uint8 [N], numbered by size, the largest 0; 255 if not usable.

    Several starts (k-means++) on an even sample; the best is refined on all rows. The same input gives the same result.

    Args:
        unit: the vectors.
        count: number of clusters, 2 to `MOST_CLUSTERS`; fewer are found if there are fewer distinct vectors.
        seed: of the random starts.
    """
    labels = np.full(len(unit), NO_CLUSTER, np.uint8)
    usable = np.flatnonzero(unit.usable)
    if not len(usable):
        return labels
    points = _reduced(unit, usable)
    sample = points[:: -(-len(points) // _CLUSTER_SAMPLE)]
    generator = np.random.default_rng(seed)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(_STARTS):
        centres = _lloyd(sample, _seeds(sample, count, generator))
        loss = float(_nearest(sample, centres)[1].sum())
        if best is None or loss < best[0]:
            best = loss, centres
    assert best is not None
    centres = _lloyd(points, best[1], rounds=3) if len(sample) < len(points) else best[1]
    found = _nearest(points, centres)[0]
    sizes = np.bincount(found, minlength=len(centres))
    rank = np.empty(len(centres), np.uint8)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(centres))
    labels[usable] = rank[found]
    return labels


def _reduced(unit: UnitRows, usable: np.ndarray) -> np.ndarray:
    """The usable rows on their first principal components, float32 [M, at most _CLUSTER_WIDTH]."""
    sample = np.asarray(unit.rows[usable[:: -(-len(usable) // _SAMPLE)]], np.float64)
    centre = sample.mean(axis=0)
    sample -= centre
    gram = sample @ sample.T if len(sample) < sample.shape[1] else sample.T @ sample
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:_CLUSTER_WIDTH], vectors[:, ::-1][:, :_CLUSTER_WIDTH]
    if len(sample) < sample.shape[1]:  # from the axes of the samples to those of the columns
        vectors = sample.T @ (vectors / np.sqrt(np.maximum(values, 1e-12 * max(values[0], 1e-30))))
    axes = vectors.astype(np.float32)
    shift = centre.astype(np.float32) @ axes
    reduced = np.empty((len(usable), axes.shape[1]), np.float32)
    for start in range(0, len(usable), _BLOCK):
        rows = usable[start : start + _BLOCK]
        reduced[start : start + len(rows)] = unit.rows[rows] @ axes - shift
    return reduced


def _seeds(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each centre is drawn with a probability that grows with the distance to the others."""
    centres = [points[int(generator.integers(len(points)))]]
    gap = ((points - centres[0]) ** 2).sum(axis=1)
    while len(centres) < count and gap.max() > 1e-12:
        draw = generator.random() * float(gap.sum(dtype=np.float64))
        chosen = min(int(np.searchsorted(np.cumsum(gap, dtype=np.float64), draw)), len(points) - 1)
        centres.append(points[chosen])
        gap = np.minimum(gap, ((points - points[chosen]) ** 2).sum(axis=1))
    return np.array(centres)


def _lloyd(points: np.ndarray, centres: np.ndarray, rounds: int = _ROUNDS) -> np.ndarray:
    for _ in range(rounds):
        labels, _ = _nearest(points, centres)
        counts = np.bincount(labels, minlength=len(centres))
        sums = np.stack(
            [np.bincount(labels, points[:, column], len(centres)) for column in range(points.shape[1])], axis=1
        )
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres).astype(np.float32)
        if np.allclose(moved, centres, atol=1e-6):
            return moved
        centres = moved
    return centres


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest centre, and the squared distance to it."""
    distance = (centres**2).sum(axis=1) - 2 * (points @ centres.T)
    labels = distance.argmin(axis=1)
    nearest = distance[np.arange(len(points)), labels] + (points**2).sum(axis=1)
    return labels, np.maximum(nearest, 0)
