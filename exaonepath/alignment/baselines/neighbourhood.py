"""Statistics of neighbouring patches: a simple baseline for what the arrangement of patches shows.

For each principal component of the patch features, and for several distances, the autocorrelation of patches at that
distance inside a fragment (Moran 1950). It takes neither a network nor a choice: if it is as good as a slide encoder
with positions, the encoder has learned nothing that ten lines do not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from exaonepath.alignment.baselines.bags import PatientBag, bags_of
from exaonepath.alignment.baselines.profiles import CohortPart

COMPONENTS = 8
# Distances in units of the grid: next to each other, diagonal included, then further away.
RINGS = ((0.5, 1.2), (1.2, 1.7), (1.7, 2.7), (2.7, 3.7), (3.7, 5.5))
_PATCHES_OF_SLIDE = 64  # of each training slide, for the components
_MOST_PATCHES = 4096  # of a fragment: the first in their order, which are neighbours
_TINY = 1e-12

Slide = tuple[np.ndarray, np.ndarray, np.ndarray]  # features [N, C], coords [N, 2], contour_index [N]


def patch_components(slides: Iterable[Slide]) -> np.ndarray:
    """Axes [C, k] of the principal components of some patches of every slide.

    The mean of a slide is taken off first, because differences of slides say nothing about neighbours.
    """
    rng = np.random.default_rng(0)
    products: np.ndarray | float = 0.0
    for features, _, _ in slides:
        x = np.asarray(features, np.float64)
        chosen = x if len(x) <= _PATCHES_OF_SLIDE else x[rng.choice(len(x), _PATCHES_OF_SLIDE, replace=False)]
        deviations = chosen - x.mean(0)
        products = products + deviations.T @ deviations
    _, vectors = np.linalg.eigh(products)
    axes: np.ndarray = vectors[:, ::-1][:, :COMPONENTS]
    return axes


def neighbourhood_statistics(slide: Slide, axes: np.ndarray) -> np.ndarray:
    """float64 [k * rings + k]: autocorrelation of each component at each distance, and the log of its variance.

    Autocorrelations are means over fragments, weighted by their pairs of patches at the distance; 0 without such pairs.

    Args:
        slide: patch features, coordinates in any unit, fragments.
        axes: [C, k], of `patch_components`.
    """
    from scipy.spatial import cKDTree

    features, coords, contours = slide
    k = axes.shape[1]
    total, pairs, variance = np.zeros((len(RINGS), k)), np.zeros(len(RINGS)), np.zeros(k)
    for fragment in np.unique(contours):
        rows = np.flatnonzero(contours == fragment)[:_MOST_PATCHES]
        if len(rows) < 3:
            continue
        x = np.asarray(features[rows], np.float64) @ axes
        x -= x.mean(0)
        spread = np.square(x).mean(0)
        variance += len(rows) / len(contours) * spread
        tree = cKDTree(coords[rows])
        nearest, _ = tree.query(coords[rows], 2)
        unit = max(float(np.median(nearest[:, 1])), _TINY)
        close = tree.query_pairs(RINGS[-1][1] * unit, output_type="ndarray")
        distance = np.linalg.norm((coords[rows][close[:, 0]] - coords[rows][close[:, 1]]) / unit, axis=1)
        for at, (low, high) in enumerate(RINGS):
            i, j = close[(distance >= low) & (distance < high)].T
            total[at] += (x[i] * x[j]).sum(0) / np.maximum(spread, _TINY)
            pairs[at] += len(i)
    found = total / np.maximum(pairs, 1)[:, None]
    return np.concatenate([found.ravel(), np.log(np.maximum(variance, _TINY))])


def read_neighbourhoods(parts: Mapping[str, CohortPart]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Part to (statistics [n, F], who has a slide with coordinates, bool [n]): means over the slides of a patient.

    Args:
        parts: "train" and others to their patients; "train" gives the components. Slides are read one at a time.

    Raises:
        DataFileError: a features file cannot be read.
    """
    bags = {name: bags_of(part.data, part.patients) for name, part in parts.items()}
    train = [bags["train"][patient] for patient in parts["train"].patients if patient in bags["train"]]
    axes = patch_components(slide for bag in train for slide in _slides(bag)) if train else np.zeros((0, 0))
    out = {}
    for name, part in parts.items():
        has = np.array([patient in bags[name] for patient in part.patients], bool) & bool(train)
        values = np.zeros((len(has), axes.shape[1] * (len(RINGS) + 1)))
        for at in np.flatnonzero(has):
            found = [neighbourhood_statistics(slide, axes) for slide in _slides(bags[name][part.patients[at]])]
            values[at] = np.mean(found, axis=0)
        out[name] = values, has
    return out


def _slides(bag: PatientBag) -> Iterator[Slide]:
    """The slides of a patient, one at a time in memory."""
    for slide in bag.slides:
        rows = bag.data.cache.read(slide)
        yield rows.features.numpy(), rows.coords.numpy(), rows.contour_index.numpy()
