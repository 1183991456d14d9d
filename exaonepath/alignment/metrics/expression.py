"""Prediction of many continuous features (genes) at once, with a score, an interval and a test for each of them.

A gene's correlation is over patients that trained nothing. With thousands of genes some correlations are large by
chance, so a gene counts as predicted after the correction of Benjamini & Hochberg (1995) only, and the same count after
patients were permuted shows whether the correction holds on these data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import LEVEL, Estimate, one_thread
from exaonepath.errors import SettingsError

# Penalties in multiples of the mean squared singular value of the standardised inputs.
PENALTIES = tuple(10.0**k for k in range(-2, 4))
_USUAL_PENALTY = 10.0
_FEWEST_TO_CHOOSE = 10
FEWEST_PATIENTS = 4  # a correlation of three points has no interval
FALSE_DISCOVERIES = 0.05
_RESAMPLES = 1000
_PERMUTATIONS = 100
_CHUNK = 512  # genes whose resamples are in memory at once: 30 MB
_CONSTANT = 1e-10


@dataclass(frozen=True)
class GeneScores:
    """Scores of G genes on the same test patients; NaN where a gene, or its prediction, is constant.

    Attributes:
        genes: their names.
        n: int64 [G], test patients with a value.
        pearson, low, high: float64 [G], correlation and its 95 % interval (bootstrap over patients).
        spearman, spearman_low, spearman_high: the same of ranks (interval of Bonett & Wright 2000).
        p: float64 [G], of a correlation that is not positive (Student's t). q: p after Benjamini & Hochberg.
        mean_pearson: mean over genes, with its interval over patients.
        explained: share of the variance of all genes together; below 0: worse than the mean of the test patients.
        false: mean number of significant genes after permutations of the patients, and the largest one.
    """

    genes: tuple[str, ...]
    n: np.ndarray
    pearson: np.ndarray
    low: np.ndarray
    high: np.ndarray
    spearman: np.ndarray
    spearman_low: np.ndarray
    spearman_high: np.ndarray
    p: np.ndarray
    q: np.ndarray
    mean_pearson: Estimate
    explained: Estimate
    false: tuple[float, int]

    @property
    def significant(self) -> np.ndarray:
        """bool [G]: q is at most `FALSE_DISCOVERIES`."""
        return np.asarray(np.nan_to_num(self.q, nan=1.0) <= FALSE_DISCOVERIES)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the values of single genes."""
        defined = self.pearson[np.isfinite(self.pearson)]
        quantiles = np.quantile(defined, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() if len(defined) else []
        return {
            "genes": len(self.genes),
            "not_defined": len(self.genes) - len(defined),
            "mean_pearson": self.mean_pearson.as_dict(),
            "mean_spearman": float(np.nanmean(self.spearman)) if len(defined) else None,
            "quantiles": dict(zip(("5", "25", "50", "75", "95"), quantiles, strict=False)),
            "explained": self.explained.as_dict(),
            "significant": int(self.significant.sum()),
            "significant_permuted": {"mean": self.false[0], "most": self.false[1]},
        }


@one_thread()
def fit_ridge_map(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray] | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression of all genes, with one penalty; a function from inputs [m, d] to predictions [m, G].

    Args:
        train: inputs [n, d] and genes [n, G]; NaN in a gene counts as its mean.
        validation: the same of validation patients, who choose the penalty by the squared error; None, or fewer than
            ten: 10 times the mean squared singular value.

    Raises:
        SettingsError: fewer than two training patients, or all have the same inputs.
    """
    x, y = (np.asarray(part, np.float64) for part in train)
    if len(x) < 2:
        raise SettingsError(f"a regression needs two training patients or more, got {len(x)}")
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > _CONSTANT * np.maximum(1, np.abs(mean)), scale, np.inf)
    measured = ~np.isnan(y)
    count = measured.sum(0)
    centre = np.where(measured, y, 0).sum(0) / np.maximum(count, 1)
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    if not s.any():
        raise SettingsError("all training patients have the same inputs: there is nothing to regress on")
    target = u.T @ np.where(measured, y - centre, 0)
    size = float(np.square(s).mean())

    def predictor(penalty: float) -> Callable[[np.ndarray], np.ndarray]:
        weights = vt.T @ ((s / (np.square(s) + penalty * size))[:, None] * target)
        return lambda rows: np.asarray((np.asarray(rows, np.float64) - mean) / scale @ weights + centre)

    if validation is None or len(validation[0]) < _FEWEST_TO_CHOOSE:
        return predictor(_USUAL_PENALTY)
    errors = [float(np.nanmean(np.square(predictor(c)(validation[0]) - validation[1]))) for c in PENALTIES]
    return predictor(PENALTIES[int(np.argmin(errors))])


def score_genes(
    predictions: Sequence[np.ndarray], truth: np.ndarray, genes: Sequence[str], *, seed: int = 0
) -> tuple[list[GeneScores], list[Estimate]]:
    """Scores of predictions of the same genes and patients by several methods.

    Args:
        predictions: float [m, G] of each method.
        truth: float [m, G], one row per patient; NaN: not measured.
        genes: G names.
        seed: seed of resamples and permutations.

    Returns:
        The scores of each method; and for each method after the first, the mean correlation of the first minus its
        own, over the genes that both define, with an interval that resamples patients with all their genes.

    Raises:
        SettingsError: shapes differ, or there are fewer than four patients.
    """
    truth = np.asarray(truth, np.float64)
    guesses = [np.asarray(found, np.float64) for found in predictions]
    if truth.ndim != 2 or truth.shape[1] != len(genes) or any(found.shape != truth.shape for found in guesses):
        raise SettingsError(
            f"predictions and truth must be [patients, {len(genes)}], got {[list(g.shape) for g in guesses]} and "
            f"{list(truth.shape)}"
        )
    if len(truth) < FEWEST_PATIENTS:
        raise SettingsError(f"correlations need {FEWEST_PATIENTS} test patients or more, got {len(truth)}")
    n = len(truth)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(np.float64)
    weights = np.concatenate([np.ones((1, n)), draws])  # the first row is the sample itself
    resampled = [_Resampled.of(found, truth, weights) for found in guesses]
    scores = [_scores(found, guess, truth, tuple(genes), seed) for found, guess in zip(resampled, guesses, strict=True)]
    return scores, [_mean_difference(resampled[0], other, n) for other in resampled[1:]]


def adjusted(p: np.ndarray) -> np.ndarray:
    """p values after Benjamini & Hochberg; NaN stays NaN, and does not count as a test."""
    out = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    raw = p[order] * len(order) / np.arange(1, len(order) + 1)
    out[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1)
    return out


@dataclass(frozen=True)
class _Resampled:
    """Statistics of the sample (first row) and of every resample.

    Attributes:
        pearson: float32 [1 + R, G]. residual, total: float64 [1 + R], sums of squares over all genes.
    """

    pearson: np.ndarray
    residual: np.ndarray
    total: np.ndarray

    @staticmethod
    def of(guess: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> _Resampled:
        pearson = np.empty((len(weights), truth.shape[1]), np.float32)
        residual, total = np.zeros(len(weights)), np.zeros(len(weights))
        for start in range(0, truth.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            pearson[:, part], residuals, totals = _correlation(guess[:, part], truth[:, part], weights)
            residual += residuals
            total += totals
        return _Resampled(pearson, residual, total)


def _correlation(
    guess: np.ndarray, truth: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlations [R, g] of columns of guess and truth [n, g] with weights [R, n]; residual and total squares [R]."""
    known = np.isfinite(truth)
    # Centred first: differences of large sums of squares would lose the digits of a gene that varies little.
    count = np.maximum(known.sum(0), 1)
    y = np.where(known, truth, 0)
    y = np.where(known, y - y.sum(0) / count, 0)
    shift = np.where(known, guess, 0).sum(0) / count
    p = np.where(known, guess - shift, 0)
    error = np.where(known, truth - guess, 0)
    w = weights @ known
    safe = np.maximum(w, 1)
    sy, sp = weights @ y, weights @ p
    yy = weights @ np.square(y) - np.square(sy) / safe
    pp = weights @ np.square(p) - np.square(sp) / safe
    yp = weights @ (y * p) - sy * sp / safe
    # A column is constant if what is left of its squares is rounding error of what was there.
    floor_y = _CONSTANT * np.maximum(np.square(np.where(known, truth, 0)).sum(0), 1e-300)
    floor_p = _CONSTANT * np.maximum(np.square(np.where(known, guess, 0)).sum(0), 1e-300)
    defined = (yy > floor_y) & (pp > floor_p) & (w > 1)
    r = np.full(w.shape, np.nan)
    r[defined] = np.clip(yp[defined] / np.sqrt(yy[defined] * pp[defined]), -1, 1)
    return r, (weights @ np.square(error)).sum(1), np.where(yy > floor_y, yy, 0).sum(1)


def _scores(found: _Resampled, guess: np.ndarray, truth: np.ndarray, genes: tuple[str, ...], seed: int) -> GeneScores:
    n = np.isfinite(truth).sum(0)
    pearson = found.pearson[0].astype(np.float64)
    low, high = _limits(found.pearson[1:])
    spearman = _spearman(guess, truth)
    spearman[~np.isfinite(pearson)] = np.nan
    # Bonett & Wright 2000: the variance of the transformed rank correlation is (1 + r^2 / 2) / (n - 3).
    half = _quantile() * np.sqrt((1 + np.square(spearman) / 2) / np.maximum(n - 3, 1))
    centre = np.arctanh(np.clip(spearman, -1 + 1e-12, 1 - 1e-12))
    p = _p_values(pearson, n)
    mean = np.nanmean(found.pearson, 1) if np.isfinite(pearson).any() else np.full(len(found.pearson), np.nan)
    share = 1 - found.residual / np.where(found.total > 0, found.total, np.nan)
    return GeneScores(
        genes, n, pearson, low, high, spearman, np.tanh(centre - half), np.tanh(centre + half), p, adjusted(p),
        _estimate(mean, len(truth)), _estimate(share, len(truth)), _permuted(guess, truth, n, seed),
    )  # fmt: skip


def _permuted(guess: np.ndarray, truth: np.ndarray, n: np.ndarray, seed: int) -> tuple[float, int]:
    """Mean and largest number of significant genes if predictions belong to other patients."""
    rng, counts, alone = np.random.default_rng([seed, 1]), [], np.ones((1, len(truth)))
    for _ in range(_PERMUTATIONS):
        r = _correlation(guess[rng.permutation(len(guess))], truth, alone)[0][0]
        counts.append(int((np.nan_to_num(adjusted(_p_values(r, n)), nan=1) <= FALSE_DISCOVERIES).sum()))
    return float(np.mean(counts)), max(counts)


def _p_values(r: np.ndarray, n: np.ndarray) -> np.ndarray:
    """One-sided p of correlations [G] of n [G] patients, by Student's t with n - 2 degrees of freedom."""
    from scipy.stats import t

    degrees = np.maximum(n - 2, 1)
    p = np.asarray(t.sf(r * np.sqrt(degrees / np.maximum(1 - np.square(r), 1e-15)), degrees))
    return np.where(np.isfinite(r) & (n >= FEWEST_PATIENTS), p, np.nan)


def _spearman(guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    known = np.isfinite(truth)
    whole = known.all(0)
    ranks = [np.full(truth.shape, np.nan), np.full(truth.shape, np.nan)]
    for out, values in zip(ranks, (guess, truth), strict=True):
        if whole.any():
            out[:, whole] = rankdata(values[:, whole], axis=0)
        for column in np.flatnonzero(~whole):
            rows = known[:, column]
            out[rows, column] = rankdata(values[rows, column])
    r: np.ndarray = _correlation(np.nan_to_num(ranks[0]), ranks[1], np.ones((1, len(truth))))[0][0]
    return r


def _mean_difference(first: _Resampled, other: _Resampled, n: int) -> Estimate:
    both = np.isfinite(first.pearson[0]) & np.isfinite(other.pearson[0])
    if not both.any():
        return Estimate(np.nan, np.nan, np.nan, n)
    return _estimate(np.nanmean(first.pearson[:, both] - other.pearson[:, both], 1), n)


def _estimate(values: np.ndarray, n: int) -> Estimate:
    """The first value, with the percentiles of the others."""
    rest = values[1:][np.isfinite(values[1:])]
    if not len(rest) or not np.isfinite(values[0]):
        return Estimate(float(values[0]), np.nan, np.nan, n)
    low, high = np.quantile(rest, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(values[0]), float(low), float(high), n)


def _limits(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles [G] of resamples [R, G]; NaN where fewer than half of them are defined."""
    defined = np.isfinite(resampled)
    out = np.full((2, resampled.shape[1]), np.nan)
    levels = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    whole = defined.all(0)
    if whole.any():
        out[:, whole] = np.quantile(resampled[:, whole], levels, axis=0)
    for column in np.flatnonzero(~whole & (defined.mean(0) > 0.5)):
        out[:, column] = np.quantile(resampled[defined[:, column], column], levels)
    return out[0], out[1]


def _quantile() -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + LEVEL) / 2)
