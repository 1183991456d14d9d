"""Analysis of the projections W_ij: number of directions in use, and overlap of the directions of both sides of a
pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.errors import SettingsError

_ENERGY = 0.9  # share of the variance in the directions that are compared


@dataclass(frozen=True)
class PairSpectrum:
    """The shared space of one pair (i, j).

    Attributes:
        left, right: names of the modalities.
        left_spectrum, right_spectrum: [d], singular values of h_i W_ij and h_j W_ji over patients (rows of unit length,
            centred), as shares of their sum, descending.
        left_rank, right_rank: exponential of the entropy of those shares: number of directions in use.
        overlap: mean squared cosine of the principal angles between the directions with 90 % of each side's variance;
            1: the same directions, `chance`: unrelated directions.
        chance: value of `overlap` for random subspaces of these dimensions.
        correlation: similarity of the patients' coordinates on both sides (linear CKA, Kornblith et al. 2019), 0 to 1,
            over patients with both modalities.
        n: number of those patients.
    """

    left: str
    right: str
    left_spectrum: np.ndarray
    right_spectrum: np.ndarray
    left_rank: float
    right_rank: float
    overlap: float
    chance: float
    correlation: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        out: dict[str, Any] = {key: getattr(self, key) for key in self.__dataclass_fields__}
        out["left_spectrum"], out["right_spectrum"] = self.left_spectrum.tolist(), self.right_spectrum.tolist()
        return out


def pair_spectrum(left: str, right: str, u: np.ndarray, v: np.ndarray) -> PairSpectrum:
    """Compare both sides of a pair over patients that have both.

    Args:
        left, right: names.
        u, v: [n, d] unit vectors of the same patients, row by row.

    Raises:
        SettingsError: shapes differ, or there are fewer than two patients.
    """
    x, y = np.asarray(u, np.float64), np.asarray(v, np.float64)
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise SettingsError(f"{left}, {right}: need the same patients, two or more; got {x.shape} and {y.shape}")
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    _, sx, dx = np.linalg.svd(x, full_matrices=False)
    _, sy, dy = np.linalg.svd(y, full_matrices=False)
    kx, ky = _leading(sx), _leading(sy)
    cosines = np.linalg.svd(dx[:kx] @ dy[:ky].T, compute_uv=False)
    cross = np.square(np.linalg.norm(x.T @ y))
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return PairSpectrum(
        left,
        right,
        _shares(sx),
        _shares(sy),
        _rank(sx),
        _rank(sy),
        float(np.square(cosines).mean()),
        max(kx, ky) / x.shape[1],
        float(cross / norms) if norms else 0.0,
        len(x),
    )


def direction_reuse(weights: Mapping[str, np.ndarray], embedding: np.ndarray) -> dict[tuple[str, str], float]:
    """Similarity of the projections of one modality for its different partners.

    Args:
        weights: partner j -> W_ij [E, d] of one modality i.
        embedding: [n, E], its embeddings over patients.

    Returns:
        (j, k) -> linear CKA between h W_ij and h W_ik, 0 to 1; 1: both projections contain the same information.
    """
    h = np.asarray(embedding, np.float64)
    h = h - h.mean(axis=0)
    seen = {name: h @ np.asarray(w, np.float64) for name, w in weights.items()}
    names = list(seen)
    out = {}
    for a, first in enumerate(names):
        for second in names[a + 1 :]:
            x, y = seen[first], seen[second]
            norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
            out[first, second] = float(np.square(np.linalg.norm(x.T @ y)) / norms) if norms else 0.0
    return out


def _leading(values: np.ndarray) -> int:
    energy = np.cumsum(np.square(values))
    return int(np.searchsorted(energy, _ENERGY * energy[-1]) + 1) if energy[-1] > 0 else 1


def _shares(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else values


def _rank(values: np.ndarray) -> float:
    share = _shares(values)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0
