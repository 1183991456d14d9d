"""Calibration of class probabilities: whether patients with a probability of 0.8 are right in 80 % of the cases.

The expected calibration error (Naeini et al. 2015) compares the probability of the predicted class with the share of
hits, in bins with equal numbers of patients. It cannot be negative, so it is above 0 for perfect probabilities, and the
more so the fewer patients there are. Therefore it comes with its mean for labels drawn from the probabilities
themselves: what lies above that is miscalibration. Resamples have fewer different patients, which raises their error:
the interval is that of the resamples less this rise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import (
    LEVEL,
    Estimate,
    bootstrap_mean,
    check_rows,
    wilson,
)
from exaonepath.errors import SettingsError

BINS = 10
_FEWEST_OF_BIN = 15
_RESAMPLES = 1000
_EQUAL = 1e-9


@dataclass(frozen=True)
class CalibrationScores:
    """Calibration of the probabilities of n patients.

    Attributes:
        error: expected calibration error, with an interval over patients.
        error_if_perfect: mean error of labels drawn from the probabilities: the bias. p: share of such errors that are
            as large as the one found.
        brier: mean squared distance of the probabilities from the class, 0 (perfect) to 2.
        brier_of_shares: that of the training patients' class shares, the simplest prediction.
        curve: bins by rising probability: mean probability, share of hits with limits (Wilson), patients.
        n: number of patients.
    """

    error: Estimate
    error_if_perfect: float
    p: float
    brier: Estimate
    brier_of_shares: float
    curve: tuple[dict[str, float], ...]
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "error": self.error.as_dict(),
            "error_if_perfect": self.error_if_perfect,
            "p": self.p,
            "brier": self.brier.as_dict(),
            "brier_of_shares": self.brier_of_shares,
            "curve": list(self.curve),
            "n": self.n,
        }


def calibration(
    y: np.ndarray, probability: np.ndarray, shares: np.ndarray, *, bins: int = BINS, seed: int = 0
) -> CalibrationScores:
    """Calibration of class probabilities of test patients, one row each.

    Args:
        y: int64 [n], classes. probability: float64 [n, K], rows that sum to 1.
        shares: float64 [K], class shares of the training patients.
        bins: largest number of bins; fewer, so that each has 15 patients.
        seed: seed of resamples.

    Raises:
        SettingsError: there is no patient, or a row is no distribution.
    """
    check_rows(y=y, probability=probability)
    p = np.asarray(probability, np.float64)
    if not len(y) or p.ndim != 2 or not np.allclose(p.sum(1), 1, atol=1e-6) or (p < -1e-9).any():
        raise SettingsError("calibration needs patients, and probabilities that sum to 1")
    chosen = p.argmax(1)
    confidence, hit = p.max(1), (chosen == y).astype(np.float64)
    bins = max(1, min(bins, len(y) // _FEWEST_OF_BIN))
    generator = np.random.default_rng(seed)
    drawn = _draw(p, _RESAMPLES, generator) == chosen
    perfect = np.array([_error(confidence, row.astype(np.float64), bins) for row in drawn])
    resampled = np.empty(_RESAMPLES)
    for at in range(_RESAMPLES):
        rows = generator.integers(0, len(y), len(y))
        resampled[at] = _error(confidence[rows], hit[rows], bins)
    found = _error(confidence, hit, bins)
    low, high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) - (resampled.mean() - found)
    brier = bootstrap_mean(brier_of(y, p), np.arange(len(y)), seed=seed)
    if hit.min() == hit.max():
        # No patient contradicts the others, so resamples claim certainty: the limit is that of Wilson's share of hits.
        surprise = abs(float(hit[0]) - wilson(float(hit[0]), len(y))[0 if hit[0] else 1])
        high = max(high, found + surprise)
        brier = replace(brier, high=max(brier.high, brier.value + 2 * surprise))
    curve = []
    for rows in _bins(confidence, bins):
        share, n = float(hit[rows].mean()), len(rows)
        limits = wilson(share, n)
        curve.append(
            {
                "probability": float(confidence[rows].mean()),
                "hits": share,
                "low": limits[0],
                "high": limits[1],
                "patients": n,
            }
        )
    return CalibrationScores(
        Estimate(found, max(0.0, min(float(low), found)), max(float(high), found), len(y)),
        float(perfect.mean()),
        float((1 + (perfect >= found).sum()) / (1 + len(perfect))),
        brier,
        float(brier_of(y, np.broadcast_to(np.asarray(shares, np.float64), p.shape)).mean()),
        tuple(curve),
        len(y),
    )


def brier_of(y: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """float64 [n]: squared distance of each row of probabilities from its class."""
    truth = np.zeros(probability.shape)
    truth[np.arange(len(y)), y] = 1
    return np.asarray(np.square(probability - truth).sum(1))


def brier_difference(y: np.ndarray, ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0) -> Estimate:
    """Brier score of `ours` minus that of `theirs` [n, K], of the same patients; the interval is paired."""
    found = bootstrap_mean(brier_of(y, ours) - brier_of(y, theirs), np.arange(len(y)), seed=seed)
    if (ours.argmax(1) == y).all() and (theirs.argmax(1) == y).all():
        # An error that none of so many patients shows would cost up to 2 on either side.
        surprise = 2 * wilson(0.0, len(y))[1]
        return replace(found, low=min(found.low, found.value - surprise), high=max(found.high, found.value + surprise))
    return found


def with_shares(probability: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Probabilities of a classifier that was fitted with equal weights of all classes, for classes of these shares.

    Bayes' rule: each probability is multiplied by the share of its class, and the row by a factor.
    """
    weighted = probability * shares
    return np.asarray(weighted / weighted.sum(1, keepdims=True))


def _error(confidence: np.ndarray, hit: np.ndarray, bins: int) -> float:
    order = np.argsort(confidence, kind="stable")
    gap = np.cumsum((confidence - hit)[order])
    return float(np.abs(np.diff(gap[_ends(confidence[order], bins)], prepend=0.0)).sum() / len(gap))


def _bins(confidence: np.ndarray, bins: int) -> list[np.ndarray]:
    """Rows of each bin, as in `_error`."""
    order = np.argsort(confidence, kind="stable")
    return np.split(order, _ends(confidence[order], bins)[:-1] + 1)


def _ends(ascending: np.ndarray, bins: int) -> np.ndarray:
    """Last place of each bin; equal probabilities are in one bin, since their order has no meaning."""
    places = (np.arange(1, bins + 1) * len(ascending)) // bins - 1
    return np.unique(np.searchsorted(ascending, ascending[places] + _EQUAL, "right") - 1)


def _draw(probability: np.ndarray, repeats: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [repeats, n]: classes drawn from the rows."""
    edges = np.cumsum(probability, 1)[:, :-1]
    return np.asarray((generator.random((repeats, len(probability), 1)) > edges).sum(2))
