"""Regularised canonical correlation analysis of two modalities, in closed form.

Both modalities are whitened, with a covariance that is shrunk towards a multiple of the identity, and the singular
vectors of what is left of their covariance are the shared directions (Vinod 1976; Hardoon et al. 2004). A direction
counts in proportion to its canonical correlation. The model's linear encoders can start there
(`training.closed_form_start`), and it is one of the baselines of an evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exaonepath.alignment.metrics.retrieval import rank_queries
from exaonepath.errors import SettingsError

# Shares of the identity in the covariance.
SHRINKAGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
# Used if no validation patients can choose; the middle of what they chose in our cohorts (docs/evaluation.md).
USUAL_SHRINKAGE = 0.2
FEWEST_TO_CHOOSE = 10
# Directions of a modality, those with the largest variance. Each choice of shrinkage decomposes a matrix of this size.
MOST_DIRECTIONS = 512
_EIGENVALUE = 1e-10  # relative to the largest one; smaller ones are rounding errors
_FOLDS = 5
_MOST_CORRELATED = 0.99
_TINY = 1e-12
_CONSTANT = 1e-6  # relative to the mean; smaller deviations are rounding errors of float32


@dataclass(frozen=True)
class Principal:
    """Principal axes of one modality over its training patients, after standardisation of each feature.

    Attributes:
        mean: float64 [F]. axes: float64 [F, r], from deviations of the mean to scores, by falling variance.
        variance: float64 [r], of the scores. scale: the mean variance of a direction, to which the covariance shrinks.
    """

    mean: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    scale: float

    @staticmethod
    def of(x: np.ndarray, most: int = MOST_DIRECTIONS) -> Principal:
        """The axes of x [n, F], at most `most` of them.

        Raises:
            SettingsError: there are fewer than two rows, or all rows are equal.
        """
        x = np.asarray(x, np.float64)
        if len(x) < 2:
            raise SettingsError(f"principal axes need two patients or more, got {len(x)}")
        mean, deviation = x.mean(0), x.std(0)
        deviation[deviation <= _CONSTANT * np.maximum(1, np.abs(mean))] = np.inf  # a constant feature counts nowhere
        centred = (x - mean) / deviation
        n, width = len(centred), int(np.isfinite(deviation).sum())
        # The smaller of the two products has the same eigenvalues.
        wide = n <= centred.shape[1]
        small = centred @ centred.T if wide else centred.T @ centred
        values, vectors = np.linalg.eigh(small / n)
        values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
        rank = min(int((values > _EIGENVALUE * max(values[0], 0)).sum()), most)
        if not rank:
            raise SettingsError("all patients have the same values: there is no direction of variance")
        axes = vectors[:, :rank]
        if wide:
            axes = centred.T @ axes / np.sqrt(n * values[:rank])
        axes = axes / deviation[:, None]
        return Principal(mean, axes, values[:rank], float(values.clip(0).sum() / max(1, min(n, width))))

    def scores(self, x: np.ndarray) -> np.ndarray:
        """x [n, F] along the axes: float64 [n, r]."""
        return np.asarray((np.asarray(x, np.float64) - self.mean) @ self.axes)

    def whitening(self, shrinkage: float) -> np.ndarray:
        """float64 [r]: factors that bring the shrunk covariance to the identity."""
        return np.asarray(1 / np.sqrt((1 - shrinkage) * self.variance + shrinkage * self.scale))


@dataclass(frozen=True)
class Directions:
    """Shared directions of two modalities, in the coordinates of their principal axes.

    Attributes:
        left: float64 [r, k]; right: float64 [s, k]: multiplied by the weights of the directions.
        correlations: float64 [k], falling (of the shrunk covariances, so 1 at most, up to patients with one modality).
        shrinkage: of the left and of the right covariance.
    """

    left: np.ndarray
    right: np.ndarray
    correlations: np.ndarray
    shrinkage: tuple[float, float]

    def weighted(self, weights: np.ndarray) -> Directions:
        """The same directions with other weights [k] in place of the correlations."""
        factor = weights / np.maximum(self.correlations, _TINY)
        return dataclasses.replace(self, left=self.left * factor, right=self.right * factor)


def shared_directions(
    left: Principal,
    right: Principal,
    scores: tuple[np.ndarray, np.ndarray],
    shrinkage: tuple[float, float],
    most: int | None = None,
) -> Directions:
    """Directions of two modalities for given shrinkages.

    Args:
        left, right: principal axes, from all training patients with the modality.
        scores: [n, r] and [n, s] of the n training patients with both, along the axes.
        shrinkage: shares of the identity in both covariances.
        most: largest number of directions; None: all.
    """
    a, b = left.whitening(shrinkage[0]), right.whitening(shrinkage[1])
    covariance = scores[0].T @ scores[1] / len(scores[0])
    u, s, vt = np.linalg.svd(a[:, None] * covariance * b, full_matrices=False)
    u, s, v = u[:, :most], s[:most], vt[:most].T
    return Directions(a[:, None] * u * s, b[:, None] * v * s, s, shrinkage)


def choose_directions(
    left: Principal,
    right: Principal,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None,
    most: int | None = None,
) -> Directions:
    """Directions with the shrinkages that find most validation patients.

    The criterion is the mean reciprocal rank, because recall@1 of few patients has many ties. Both shrinkages are
    varied together first, then each alone.

    Args:
        left, right: principal axes of both modalities.
        train: profiles [n, F] and [n, G] of the training patients with both modalities.
        validation: those of the validation patients with both; None, or fewer than ten: `USUAL_SHRINKAGE`.
        most: largest number of directions.

    Raises:
        SettingsError: fewer than two training patients have both modalities.
    """
    if len(train[0]) < 2:
        raise SettingsError(f"shared directions need two patients with both modalities, got {len(train[0])}")
    scores = left.scores(train[0]), right.scores(train[1])
    if validation is None or len(validation[0]) < FEWEST_TO_CHOOSE:
        return shared_directions(left, right, scores, (USUAL_SHRINKAGE, USUAL_SHRINKAGE), most)
    held_out = left.scores(validation[0]), right.scores(validation[1])
    found: dict[tuple[float, float], tuple[float, Directions]] = {}

    def score(shrinkage: tuple[float, float]) -> float:
        if shrinkage not in found:
            directions = shared_directions(left, right, scores, shrinkage, most)
            rank = reciprocal_rank(held_out[0] @ directions.left, held_out[1] @ directions.right)
            found[shrinkage] = rank, directions
        return found[shrinkage][0]

    best = max(((s, s) for s in SHRINKAGES), key=score)
    best = max(((s, best[1]) for s in SHRINKAGES), key=score)
    best = max(((best[0], s) for s in SHRINKAGES), key=score)
    return found[best][1]


def choose_weights(
    left: Principal,
    right: Principal,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None,
    directions: Directions,
) -> Directions:
    """The directions, weighted by their evidence if that finds more validation patients.

    Correlations of the training patients are too high for directions that hold noise. Cross-validation within the
    training patients gives the correlation of the k-th direction on other patients, r_k, made falling. If all of them
    are normal, the evidence for "the same patient" grows with r / (1 - r^2) times the product of both coordinates.

    Args: as `choose_directions`, and its result.
    """
    if validation is None or len(validation[0]) < FEWEST_TO_CHOOSE or len(train[0]) < 2 * _FOLDS:
        return directions
    correlations = held_out_correlations(left, right, train, directions)
    weighted = directions.weighted(np.sqrt(correlations / (1 - np.square(correlations))))
    held_out = left.scores(validation[0]), right.scores(validation[1])
    found = [reciprocal_rank(held_out[0] @ d.left, held_out[1] @ d.right) for d in (directions, weighted)]
    return weighted if found[1] > found[0] else directions


def held_out_correlations(
    left: Principal, right: Principal, train: tuple[np.ndarray, np.ndarray], directions: Directions
) -> np.ndarray:
    """float64 [k], falling: correlations of the k-th directions of other folds on the patients of a fold."""
    x, y = left.scores(train[0]), right.scores(train[1])
    fold = np.random.default_rng(0).permutation(len(x)) % _FOLDS
    k = len(directions.correlations)
    coordinates = []
    for number in range(_FOLDS):
        inside, outside = fold != number, fold == number
        found = shared_directions(left, right, (x[inside], y[inside]), directions.shrinkage, k)
        coordinates.append((x[outside] @ found.left, y[outside] @ found.right))
    return falling_correlations(coordinates, k)


def falling_correlations(coordinates: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> np.ndarray:
    """float64 [k], falling: mean correlations, over folds, of coordinates [n, <= k] of the patients of a fold."""
    from sklearn.isotonic import IsotonicRegression

    total = np.zeros(k)
    patients = max(sum(len(u) for u, _ in coordinates), 1)
    for u, v in coordinates:
        norms = np.sqrt(np.square(u).sum(0) * np.square(v).sum(0))
        total[: u.shape[1]] += (len(u) / patients * (u * v).sum(0) / np.maximum(norms, _TINY))[:k]
    falling: np.ndarray = IsotonicRegression(increasing=False).fit_transform(np.arange(k), total)
    return falling.clip(_TINY, _MOST_CORRELATED)


def evidence_weights(coordinates: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> np.ndarray:
    """float64 [k]: weights of directions by their evidence (`choose_weights`), arguments as `falling_correlations`."""
    correlations = falling_correlations(coordinates, k)
    return np.asarray(np.sqrt(correlations / (1 - np.square(correlations))))


def fit_cca(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray] | None = None
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function from profiles [m, F] and [m, G] to their coordinates [m, k] in the shared space.

    Args:
        train: profiles of the training patients with both modalities, one row a patient.
        validation: those of the validation patients, which choose the shrinkages.

    Raises:
        SettingsError: there are fewer than two training patients, or one modality is constant.
    """
    left, right = Principal.of(train[0]), Principal.of(train[1])
    directions = choose_directions(left, right, train, validation)
    return lambda x, y: (left.scores(x) @ directions.left, right.scores(y) @ directions.right)


def reciprocal_rank(u: np.ndarray, v: np.ndarray) -> float:
    """Mean reciprocal rank of row i of v for row i of u, and the reverse; mean of both directions."""
    return float(reciprocal_ranks(u, v).mean())


def reciprocal_ranks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """float64 [n]: the mean of both directions for each row; see `reciprocal_rank`."""
    rows = np.arange(len(u))
    ranks = [rank_queries(a, b, rows, rows, recall_at=()).rank for a, b in ((u, v), (v, u))]
    return np.asarray(np.mean([1 / rank for rank in ranks], axis=0))
