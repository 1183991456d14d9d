"""Colours of embeddings: patches with similar embeddings get colours that look similar.

The embeddings are projected on their first three principal components. The first two are mapped to the hue plane of
OKLab (B. Ottosson's perceptual colour space, https://bottosson.github.io/posts/oklab), the third to small differences
of lightness. So differences of colours are roughly proportional to distances of embeddings, and no colour is too dark
or too pale.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from exaonepath.errors import SettingsError

_COMPONENTS = 3
_OUTLIER_QUANTILE = 0.95  # rows with a larger distance are moved to this distance before the axes are computed
_RANGE = (0.02, 0.98)  # scores between these quantiles use the full range of colours
_SMALLEST_SPREAD = 0.12  # relative to the first component; a smaller component is noise and is not stretched further
_FLAT = 1e-6  # embeddings with a smaller relative deviation count as equal
_EIGEN_ROWS = 20_000  # with more patches, the axes are computed from an even sample

# Lightness, and chroma at the edge of the hue plane. Yellow is light and blue is dark in the gamut of every display, so
# lightness depends on the yellow-blue axis: this allows more chroma than a constant lightness.
_LIGHTNESS, _LIGHTNESS_BY_B, _LIGHTNESS_BY_THIRD = 0.70, 0.60, 0.05
_CHROMA = 0.165
# Most patches are near the centre, which is grey. This share of the colour depends on ranks, which separates them.
_EVEN = 0.55
_HUE_ANGLE = np.deg2rad(20.0)  # rotation of the hue plane; chosen visually on H&E slides
_MISSING = (176, 176, 176)


class Projection(NamedTuple):
    """Embeddings on their principal components.

    Attributes:
        scores: float64 [N, 3], about -1 to 1 (more for outliers); NaN if the embedding is not finite.
        explained: float64 [3], share of the variance along each component; 0 if there is none.
    """

    scores: np.ndarray
    explained: np.ndarray


def embedding_colors(embedding: np.ndarray) -> np.ndarray:
    """One colour per patch.

    Deterministic, and invariant to rotation, reflection, shift and scale of the embedding space: only distances between
    patches matter. Any N is possible, 0 and 1 too; equal embeddings get equal colours.

    Args:
        embedding: float [N, E]; rows with NaN or infinity become grey.

    Returns:
        uint8 [N, 3], sRGB.

    Raises:
        SettingsError: not a matrix of numbers.
    """
    return score_colors(project(embedding).scores)


def project(embedding: np.ndarray) -> Projection:
    """Robust principal components of embeddings float [N, E]; see `Projection`.

    Rows far from the centre are moved closer before the axes are computed, so that a few patches of ink or dust do not
    determine the colours of all others. The sign of each component is chosen so that its longer tail is positive.

    Raises:
        SettingsError: not a matrix of numbers.
    """
    values = np.asarray(embedding)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise SettingsError(f"an embedding must be a matrix [N, E] of numbers, got {values.dtype} {list(values.shape)}")
    scores = np.zeros((len(values), _COMPONENTS))
    explained = np.zeros(_COMPONENTS)
    finite = np.isfinite(values).all(axis=1)
    scores[~finite] = np.nan
    rows = values[finite].astype(np.float64)
    if len(rows) < 2 or not rows.shape[1]:
        return Projection(scores, explained)
    size = np.sqrt((rows**2).sum(axis=1).max())
    rows -= rows.mean(axis=0)
    distance = np.sqrt((rows**2).sum(axis=1))
    if distance.max() <= _FLAT * size:
        return Projection(scores, explained)
    axes, explained = _axes(rows[:: -(-len(rows) // _EIGEN_ROWS)])
    projected = rows @ axes
    projected -= np.median(projected, axis=0) if len(rows) > 2 else 0.0
    spread = _half_range(projected)
    spread = np.maximum(spread, _SMALLEST_SPREAD * spread[0])
    scores[finite] = projected / spread * _signs(projected)
    return Projection(scores, explained)


def score_colors(scores: np.ndarray) -> np.ndarray:
    """Colours uint8 [N, 3] of principal scores [N, 3]; NaN rows are grey."""
    colors = np.full((len(scores), 3), _MISSING, np.uint8)
    known = ~np.isnan(scores).any(axis=1)
    colors[known] = to_srgb(score_oklab(scores[known]))
    return colors


def score_oklab(scores: np.ndarray) -> np.ndarray:
    """OKLab [N, 3] of finite principal scores [N, 3]. A colour depends on all scores, because ranks are part of it."""
    # Outliers saturate smoothly; a hard clip would give all of them the same colour.
    soft = (1 - _EVEN) * np.tanh(1.1 * scores) + _EVEN * _ranks(scores)
    x, y = soft[:, 0], soft[:, 1]
    # The square of two scores becomes a disc: its corners have no more chroma than its edges.
    x, y = x * np.sqrt(1 - y**2 / 2), y * np.sqrt(1 - x**2 / 2)
    a = _CHROMA * (np.cos(_HUE_ANGLE) * x - np.sin(_HUE_ANGLE) * y)
    b = _CHROMA * (np.sin(_HUE_ANGLE) * x + np.cos(_HUE_ANGLE) * y)
    lightness = _LIGHTNESS + _LIGHTNESS_BY_B * b + _LIGHTNESS_BY_THIRD * soft[:, 2]
    return np.stack([lightness, a, b], axis=1)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks of each column, -1 to 1 and equal for equal scores; near 0 in a column that hardly varies."""
    ranks = np.zeros_like(scores)
    if not len(scores):
        return ranks
    for column, values in enumerate(scores.T):
        ordered = np.sort(values)
        middle = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2
        ranks[:, column] = (2 * middle / max(len(values) - 1, 1) - 1) * min(1.0, float(np.ptp(values)) / 2)
    return ranks


def _axes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First principal axes [E, 3] of centred rows [N, E], outliers pulled in, and their share of the variance [3]."""
    distance = np.sqrt((rows**2).sum(axis=1))
    limit = np.quantile(distance, _OUTLIER_QUANTILE)
    if limit > 0:
        rows = rows * np.minimum(1.0, limit / np.maximum(distance, limit))[:, None]
        rows = rows - rows.mean(axis=0)
    n, width = rows.shape
    # Both products have the same eigenvalues; the smaller matrix is faster.
    gram = rows @ rows.T if n < width else rows.T @ rows
    values, vectors = np.linalg.eigh(gram)
    keep = min(_COMPONENTS, len(values))
    values, vectors = np.maximum(values[::-1][:keep], 0), vectors[:, ::-1][:, :keep]
    axes = np.zeros((width, _COMPONENTS))
    share = np.zeros(_COMPONENTS)
    real = values > 1e-12 * values[0]
    if n < width:
        vectors = rows.T @ vectors / np.sqrt(np.where(real, values, 1.0))
    axes[:, :keep] = np.where(real, vectors, 0.0)
    share[:keep] = np.where(real, values, 0.0) / np.trace(gram)
    return axes, share


def _half_range(projected: np.ndarray) -> np.ndarray:
    low, high = np.quantile(projected, _RANGE, axis=0)
    half = (high - low) / 2
    # If nearly all patches are equal, the quantiles are equal too. The maximum then gives different patches a colour.
    half = np.where(half > _FLAT * np.abs(projected).max(), half, np.abs(projected).max(axis=0))
    return np.where(half > 0, half, 1.0)


def _signs(projected: np.ndarray) -> np.ndarray:
    third = (projected**3).sum(axis=0)
    total = (np.abs(projected) ** 3).sum(axis=0)
    # Without a longer tail (for example, with two patches) the first of the farthest patches determines the sign.
    far = np.abs(projected) >= 0.999 * np.abs(projected).max(axis=0)
    first = projected[far.argmax(axis=0), np.arange(projected.shape[1])]
    return np.where(np.where(np.abs(third) > 1e-6 * total, third, first) < 0, -1.0, 1.0)


_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_LMS_TO_RGB, _LAB_TO_LMS = np.linalg.inv(_RGB_TO_LMS), np.linalg.inv(_LMS_TO_LAB)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab [..., 3] of sRGB uint8 [..., 3]."""
    table = np.arange(256) / 255.0
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4).astype(np.float32)[rgb]
    return np.cbrt(linear @ _RGB_TO_LMS.T.astype(np.float32)) @ _LMS_TO_LAB.T.astype(np.float32)


def to_srgb(lab: np.ndarray) -> np.ndarray:
    """SRGB uint8 [..., 3] of OKLab [..., 3]; colours outside the sRGB gamut are clipped."""
    linear = np.clip((lab @ _LAB_TO_LMS.T.astype(lab.dtype)) ** 3 @ _LMS_TO_RGB.T.astype(lab.dtype), 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)
