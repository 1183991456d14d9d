"""Confidence intervals by the bootstrap over patients.

Rows of one patient (several slides) are not independent, so patients are resampled, never rows. Intervals are
percentiles of the resampled statistic (Efron & Tibshirani 1993, chapter 13). For predictions, the fitted models are
fixed: the interval includes the variation of the test patients, but not that of the training patients.

Where nobody is a hit, or everybody, all resamples are equal, and their percentiles would claim certainty. Shares have
Wilson's interval there (Wilson 1927), and means of shares its combination (Zou & Donner 2008).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exaonepath.errors import MissingDependencyError, SettingsError

LEVEL = 0.95
_RESAMPLES = 1000
_FEWEST_DEFINED = 0.5  # share of resamples in which the statistic must exist for an interval to be given


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the statistic on all rows; NaN if it is not defined.
        low, high: limits of the 95 % interval; NaN if it is not defined.
        n: number of patients (or runs).
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes null."""
        return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(self).items()}

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one BLAS thread for small fits: the start of a second one costs ten times more than it saves."""
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError as exc:
        raise MissingDependencyError('probes need scikit-learn: pip install "exaonepath[train]"') from exc
    with threadpool_limits(1):
        yield


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    patients: Sequence[Any] | np.ndarray,
    *,
    strata: Sequence[Any] | np.ndarray | None = None,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Interval of any statistic of rows.

    Args:
        statistic: function of row indices int64 [n]; NaN if it is not defined (for example, for a single class).
        patients: patient of each row [N].
        strata: [N]; patients are resampled within the stratum of their first row, so that no class is lost.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    groups, members = _members(patients)
    if not len(groups):
        return Estimate(math.nan, math.nan, math.nan, 0)
    blocks = [np.arange(len(groups))]
    if strata is not None:
        label = np.unique(np.asarray(strata)[[rows[0] for rows in members]], return_inverse=True)[1]
        blocks = [np.flatnonzero(label == value) for value in range(label.max() + 1)]
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    single = np.concatenate(members) if len(members) == len(patients) else None  # one row per patient
    for k in range(resamples):
        drawn = np.concatenate([block[generator.integers(0, len(block), len(block))] for block in blocks])
        values[k] = statistic(np.concatenate([members[g] for g in drawn]) if single is None else single[drawn])
    value = float(statistic(np.arange(len(patients))))
    return Estimate(value, *_percentiles(values), len(groups))


def bootstrap_mean(
    values: np.ndarray,
    patients: Sequence[Any] | np.ndarray,
    *,
    shares: bool = False,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Interval of the mean of per-row values float [N]; like `bootstrap`, but with one matrix product.

    With `shares`, values are hits between 0 and 1. If all are 0, or all are 1, the interval is Wilson's, for the number
    of patients. Without, values are differences of hits. If all are 0, the interval is that of no discordant patient,
    to both sides.
    """
    values = np.asarray(values, np.float64)
    group = np.unique(np.asarray(patients), return_inverse=True)[1]
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    n = int(group.max()) + 1
    sums, counts = np.bincount(group, values, n), np.bincount(group, minlength=n)
    value = float(values.mean())
    if shares and values.min() == values.max() and value in (0.0, 1.0):
        return Estimate(value, *wilson(value, n), n)
    if not shares and not values.any():
        return Estimate(0.0, -wilson(0.0, n)[1], wilson(0.0, n)[1], n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    means = (weights @ sums) / (weights @ counts)
    return Estimate(value, *_percentiles(means), n)


def wilson(share: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share of n independent patients; (NaN, NaN) for n = 0."""
    if n < 1:
        return math.nan, math.nan
    z = _normal_quantile(level)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Rounding must not exclude the share itself at 0 and 1.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def mean_of_shares(shares: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Interval of the mean of shares of independent groups, from the Wilson intervals of each (Zou & Donner 2008).

    Args:
        shares: share of each group. counts: patients of each group, positive.
    """
    value = float(np.mean(shares))
    limits = np.array([wilson(share, n) for share, n in zip(shares, counts, strict=True)])
    distance = np.abs(limits - np.asarray(shares)[:, None])
    low, high = np.sqrt(np.square(distance).sum(0)) / len(shares)
    return max(0.0, value - float(low)), min(1.0, value + float(high))


def certain_as_share(estimate: Estimate, n: int) -> Estimate:
    """The estimate; if it is 0 or 1 in every resample, with Wilson's interval of n patients."""
    if estimate.value in (0.0, 1.0) and estimate.low == estimate.high == estimate.value:
        return Estimate(estimate.value, *wilson(estimate.value, n), estimate.n)
    return estimate


def _normal_quantile(level: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + level) / 2)


def bootstrap_weighted(
    statistic: Callable[[np.ndarray], np.ndarray],
    patients: Sequence[Any] | np.ndarray,
    *,
    strata: Sequence[Any] | np.ndarray | None = None,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`bootstrap` of a statistic of weights instead of rows: all resamples at once, a hundred times faster.

    Args:
        statistic: weights float64 [R, N] (how often each row was drawn) to values [R].
        patients, strata, resamples, seed: as in `bootstrap`.
    """
    group = np.unique(np.asarray(patients), return_inverse=True)[1]
    if not len(group):
        return Estimate(math.nan, math.nan, math.nan, 0)
    n = int(group.max()) + 1
    first = np.unique(group, return_index=True)[1]
    label = np.zeros(n, np.int64) if strata is None else np.unique(np.asarray(strata)[first], return_inverse=True)[1]
    generator = np.random.default_rng(seed)
    weights = np.zeros((resamples, n))
    for value in range(int(label.max()) + 1):
        members = np.flatnonzero(label == value)
        weights[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    whole = float(statistic(np.ones((1, len(group))))[0])
    return Estimate(whole, *_percentiles(statistic(weights[:, group])), n)


def across_runs(values: Sequence[float], intervals: Sequence[tuple[float, float]] = ()) -> Estimate:
    """Mean over runs (seeds), with an interval over runs and patients.

    Args:
        values: value of each run.
        intervals: (low, high) of each run over patients. All runs are evaluated on the same patients, so these
            intervals do not become smaller with more runs: their mean widths are combined in quadrature with Student's
            interval over the runs. If missing: Student's interval only, and none for a single run.
    """
    numbers = np.asarray(values, np.float64)
    n = len(numbers)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(numbers.mean())
    own = np.abs(np.asarray(intervals, np.float64) - numbers[:, None]).mean(0) if len(intervals) else np.full(2, np.nan)
    half = 0.0
    if n > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
        own = np.nan_to_num(own)
    low, high = np.hypot(half, own)
    return Estimate(mean, mean - float(low), mean + float(high), n)


def across_draws(draws: Sequence[Estimate]) -> Estimate:
    """Mean over independent draws of a cohort, with an interval over draws, and over the seeds and patients of each.

    The patients of different draws are different, so that the intervals of the draws become smaller with their number.
    They are combined in quadrature with Student's interval over the draws, which contains part of the same variation:
    the result is rather too wide than too narrow.

    Args:
        draws: mean over the runs of each draw, with its interval (`across_runs`); one draw is returned as it is.
    """
    if len(draws) == 1:
        return draws[0]
    limits = [(draw.low, draw.high) for draw in draws]
    between = across_runs([draw.value for draw in draws])
    own = np.abs(np.asarray(limits, np.float64) - np.array([[draw.value] for draw in draws], np.float64)).mean(0)
    low, high = np.hypot(between.high - between.value, np.nan_to_num(own) / math.sqrt(max(len(draws), 1)))
    return Estimate(between.value, between.value - float(low), between.value + float(high), len(draws))


def check_rows(**columns: Any) -> int:
    """The common length of the columns; raises `SettingsError` with the lengths if they differ."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise SettingsError(f"columns must have one row per sample, got lengths {shown}")
    return next(iter(lengths.values()))


def _members(patients: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    names, group = np.unique(np.asarray(patients), return_inverse=True)
    order = np.argsort(group, kind="stable")
    return names, np.split(order, np.cumsum(np.bincount(group, minlength=len(names)))[:-1]) if len(names) else []


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    defined = values[np.isfinite(values)]
    if len(defined) < _FEWEST_DEFINED * len(values):
        return math.nan, math.nan
    low, high = np.quantile(defined, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
