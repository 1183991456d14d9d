"""Directions that several modalities share, estimated from all pairs together.

The covariance of two modalities is estimated from the patients who have both, and its weak directions are mostly noise.
If the same few processes of a tumour show in more than two modalities, the other pairs know more about them: mutations
find the directions that copy number shares with them better from RNA, which is exact, than from copy number, which is
not. So the covariances of all pairs, after whitening, are the blocks of one matrix, of which the best approximation of
low rank is used: generalised canonical correlation analysis (Kettenring 1971) with unknown diagonal blocks, which are
completed by the approximation itself, as in principal factor analysis (Harman 1976).

Where a pair shares much that the others lack, a low rank loses it. So a cross-validation within the training patients,
and the validation patients, choose for every pair: one of some ranks, or the pair by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exaonepath.alignment.baselines.cca import (
    FEWEST_TO_CHOOSE,
    Directions,
    Principal,
    evidence_weights,
    reciprocal_rank,
    shared_directions,
)
from exaonepath.alignment.baselines.profiles import Profiles

RANKS = (8, 16, 32)
_FOLDS = 5
_FEWEST = 50  # patients with both modalities; below, a fold is too small to choose by
_ROUNDS = 8  # completions of the diagonal blocks; more change the third digit of the blocks
_TINY = 1e-12

Pair = tuple[str, str]
Factors = dict[str, np.ndarray]  # modality to V [r, K]; the block of a pair (a, b) is V_a V_b^T


@dataclass(frozen=True)
class Whitened:
    """Whitened coordinates of the training patients, pair by pair.

    Attributes:
        factor: modality to float64 [r]: from scores along the principal axes to whitened coordinates.
        rows: pair to the coordinates [n, r] and [n, s] of the patients with both modalities.
        fold: pair to int64 [n]: the fold of each of these patients, the same one in every pair.
    """

    factor: Mapping[str, np.ndarray]
    rows: Mapping[Pair, tuple[np.ndarray, np.ndarray]]
    fold: Mapping[Pair, np.ndarray]

    @staticmethod
    def of(
        axes: Mapping[str, Principal],
        train: Mapping[str, Profiles],
        pairs: Sequence[Pair],
        shrinkage: Mapping[str, float],
    ) -> Whitened:
        """Coordinates for the shrinkage of each modality; pairs with fewer than two common patients are left out."""
        factor = {name: axes[name].whitening(shrinkage[name]) for name in shrinkage}
        everyone = sorted({patient for profiles in train.values() for patient in profiles.patients})
        place = dict(zip(everyone, np.random.default_rng(0).permutation(len(everyone)) % _FOLDS, strict=True))
        scores = {name: axes[name].scores(train[name].values) * factor[name] for name in factor}
        rows, fold = {}, {}
        for a, b in pairs:
            x, y = (Profiles(train[name].patients, scores[name]) for name in (a, b))
            both = Profiles.common(x, y)
            if len(both[0]) > 1:
                known = set(train[b].patients)
                rows[a, b] = both
                fold[a, b] = np.array([place[patient] for patient in train[a].patients if patient in known])
        return Whitened(factor, rows, fold)

    def covariances(self, without: int | None = None) -> dict[Pair, np.ndarray]:
        """Pair to its covariance [r, s]; `without`: of the patients outside this fold."""
        out = {}
        for pair, (x, y) in self.rows.items():
            keep = slice(None) if without is None else self.fold[pair] != without
            out[pair] = x[keep].T @ y[keep] / max(len(x[keep]), 1)
        return out


def low_rank(covariances: Mapping[Pair, np.ndarray], rank: int) -> Factors:
    """The best factors V of the blocks of all pairs.

    Args:
        covariances: pair (a, b) to its block [r_a, r_b]; blocks of other pairs count as 0.
        rank: K; the result has fewer columns if the blocks have a lower rank.
    """
    from scipy.sparse.linalg import eigsh

    widths: dict[str, int] = {}
    for (a, b), block in covariances.items():
        widths[a], widths[b] = block.shape
    ends = np.cumsum(list(widths.values()))
    part = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}
    size = int(ends[-1])
    whole = np.zeros((size, size))
    for (a, b), block in covariances.items():
        whole[part[a], part[b]], whole[part[b], part[a]] = block, block.T
    rank = min(rank, size - 1)
    first = np.random.default_rng(0).standard_normal(size)  # eigsh draws one from the global generator
    for _ in range(_ROUNDS):
        values, vectors = eigsh(whole, rank, which="LA", v0=first) if rank < size // 2 else np.linalg.eigh(whole)
        values, vectors = values[-rank:], vectors[:, -rank:]
        factors = (vectors * np.sqrt(values.clip(0)))[:, values > _TINY]
        for rows in part.values():
            whole[rows, rows] = factors[rows] @ factors[rows].T
    return {name: factors[rows] for name, rows in part.items()}


def pair_directions(left: np.ndarray, right: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular vectors u [r, k], v [s, k] and values [k] of left @ right.T, without forming it."""
    p, a = np.linalg.qr(left)
    q, b = np.linalg.qr(right)
    u, s, vt = np.linalg.svd(a @ b.T)
    keep = np.flatnonzero(s > 1e-8 * max(float(s.max(initial=0.0)), _TINY))[:most]
    return p @ u[:, keep], q @ vt[keep].T, s[keep]


def joint_directions(
    white: Whitened,
    axes: Mapping[str, Principal],
    validation: Mapping[str, Profiles],
    own: Mapping[Pair, Directions],
    most: int,
) -> tuple[dict[Pair, Directions], dict[Pair, int]]:
    """The directions of every pair, and the rank that they are from; 0: the pair by itself.

    The criterion is the mean reciprocal rank over the patients of all folds and the validation patients.

    Args:
        white: of the training patients, for the pairs of `own`.
        axes: principal axes of the modalities.
        validation: profiles of the validation patients.
        own: directions of every pair by itself, with their final weights.
        most: largest number of directions.
    """
    best, ranks = dict(own), dict.fromkeys(own, 0)
    if len(white.factor) < 3 or min(len(x) for x, _ in white.rows.values()) < _FEWEST:
        return best, ranks  # two modalities have one pair; a small fold is too small to choose by
    trials = {pair: _Trial(pair, white, axes, validation) for pair in own}
    scores = {pair: trials[pair].of_own(directions) for pair, directions in own.items()}
    covariances = white.covariances()
    folds = [white.covariances(without=number) for number in range(_FOLDS)]
    for rank in RANKS:
        factors, of_folds = low_rank(covariances, rank), [low_rank(blocks, rank) for blocks in folds]
        for pair, trial in trials.items():
            directions, score = trial.of_factors(factors, of_folds, most)
            if score > scores[pair]:
                best[pair], ranks[pair], scores[pair] = directions, rank, score
    return best, ranks


class _Trial:
    """Directions of one pair, with their score on patients that they were not fitted on."""

    def __init__(
        self, pair: Pair, white: Whitened, axes: Mapping[str, Principal], validation: Mapping[str, Profiles]
    ) -> None:
        self.names, (self.x, self.y), self.fold = pair, white.rows[pair], white.fold[pair]
        self.axes = axes[pair[0]], axes[pair[1]]
        self.factor = white.factor[pair[0]], white.factor[pair[1]]
        held_out = Profiles.common(validation[pair[0]], validation[pair[1]])
        self.held_out = self.axes[0].scores(held_out[0]), self.axes[1].scores(held_out[1])

    def of_own(self, directions: Directions) -> float:
        """Score of the pair's own directions: in a fold, those of the other folds with the same weights."""
        ratio = _norms(directions.left / self.axes[0].whitening(directions.shrinkage[0])[:, None])
        ratio /= np.maximum(directions.correlations, _TINY)
        scores = self.x / self.factor[0], self.y / self.factor[1]
        coordinates = []
        for number in range(_FOLDS):
            inside = self.fold == number
            rest = scores[0][~inside], scores[1][~inside]
            found = shared_directions(*self.axes, rest, directions.shrinkage, len(ratio))
            found = found.weighted(found.correlations * ratio[: len(found.correlations)])
            coordinates.append((scores[0][inside] @ found.left, scores[1][inside] @ found.right))
        return self._score(coordinates, directions)

    def of_factors(self, factors: Factors, of_folds: Sequence[Factors], most: int) -> tuple[Directions, float]:
        """Directions from factors of low rank, weighted by their evidence in other folds, and their score."""
        a, b = self.names
        u, v, s = pair_directions(factors[a], factors[b], most)
        found = Directions(self.factor[0][:, None] * u * s, self.factor[1][:, None] * v * s, s, (0.0, 0.0))
        coordinates = []
        for number, of in enumerate(of_folds):
            p, q, _ = pair_directions(of[a], of[b], len(s))
            coordinates.append((self.x[self.fold == number] @ p, self.y[self.fold == number] @ q))
        weights = evidence_weights(coordinates, len(s))
        found = found.weighted(weights)
        weighted = [(x * weights[: x.shape[1]], y * weights[: y.shape[1]]) for x, y in coordinates]
        return found, self._score(weighted, found)

    def _score(self, coordinates: Sequence[tuple[np.ndarray, np.ndarray]], directions: Directions) -> float:
        """Mean reciprocal rank over the patients of the folds and the validation patients."""
        held_out = self.held_out[0] @ directions.left, self.held_out[1] @ directions.right
        enough = (1,) * len(coordinates) + (FEWEST_TO_CHOOSE - 1,)
        parts = [both for both, n in zip((*coordinates, held_out), enough, strict=True) if len(both[0]) > n]
        return float(np.average([reciprocal_rank(*both) for both in parts], weights=[len(u) for u, _ in parts]))


def _norms(columns: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(columns, axis=0))


def beyond(white: Whitened, known: str, shrinkage: float, rank: int) -> Factors:
    """Factors of what the other modalities share beyond what one of them, `known`, shows; strongest first.

    Their covariances minus those that go through the whitened `known` are their covariances after a ridge regression on
    it. After whitening with shrinkage s, the ridge that corresponds to s is a multiple of the identity, 1 / (1 - s).

    Args:
        white: whitened training patients.
        known: a modality of some of the pairs. shrinkage: that of its whitening.
        rank: largest number of factors.
    """
    covariances, through = white.covariances(), {}
    for (a, b), block in covariances.items():
        if known in (a, b):
            through[a if known == b else b] = block if known == b else block.T
    blocks = {
        (a, b): block - (1 - shrinkage) * through[a] @ through[b].T if a in through and b in through else block
        for (a, b), block in covariances.items()
        if known not in (a, b)
    }
    return {name: factor[:, ::-1] for name, factor in low_rank(blocks, rank).items()} if blocks else {}
