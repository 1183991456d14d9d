"""Variants of a study compared with its base: paired over draws, seeds and patients, corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import LEVEL, Estimate, across_draws, across_runs, bootstrap_mean
from exaonepath.errors import SettingsError

_LOG_SMALLEST = math.log(1e-12)  # p-values below it are all the same to a reader
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PairedDifference:
    """A variant minus the base.

    Attributes:
        difference: mean over draws, seeds and patients, with its interval over all of them.
        p: probability of such a difference by chance, for this variant alone: 1 - the level of the interval that ends
            at 0.
        p_corrected: the same, corrected for the number of variants (Holm 1979).
    """

    difference: Estimate
    p: float
    p_corrected: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        out = {"difference": self.difference.as_dict(), "p": self.p, "p_corrected": self.p_corrected}
        return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in out.items()}


def paired_over_seeds(variant: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> PairedDifference:
    """The difference of two variants, by seed and patient.

    Each seed gives every patient two values; their differences are averaged over seeds for each patient. The interval
    over patients is a bootstrap of these averages. That over seeds is Student's. Both are combined in quadrature, as in
    `across_runs`.

    Args:
        variant, base: patient to value, for each seed, in the same order of seeds.

    Raises:
        SettingsError: the numbers of seeds differ, or no patient is in all runs.
    """
    if len(variant) != len(base) or not base:
        raise SettingsError(f"a paired comparison needs the same seeds, got {len(variant)} and {len(base)} runs")
    patients = sorted(set.intersection(*(set(run) for run in (*variant, *base))))
    if not patients:
        raise SettingsError("a paired comparison needs patients that are in all runs")
    values = np.array([[a[p] - b[p] for p in patients] for a, b in zip(variant, base, strict=True)])
    over_patients = bootstrap_mean(values.mean(0), patients)
    mean = over_patients.value
    of_runs = values.mean(1).tolist()
    both = across_runs(of_runs, [(run - mean + over_patients.low, run - mean + over_patients.high) for run in of_runs])
    return _with_p(Estimate(mean, both.low, both.high, len(patients)), of_runs)


def paired_over_draws(
    variant: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]], draws: int
) -> PairedDifference:
    """The difference of two variants over several draws of a cohort: `paired_over_seeds` of each, then `across_draws`.

    Args:
        variant, base: as in `paired_over_seeds`: all seeds of the first draw, then those of the second, and so on.
        draws: number of draws; 1: the same as `paired_over_seeds`.

    Raises:
        SettingsError: as `paired_over_seeds`; or the runs cannot be divided among the draws.
    """
    if draws < 1 or len(base) % draws or len(variant) != len(base):
        raise SettingsError(f"{len(variant)} and {len(base)} runs are no runs of {draws} draws with the same seeds")
    if draws == 1:
        return paired_over_seeds(variant, base)
    seeds = len(base) // draws
    parts = [slice(start, start + seeds) for start in range(0, len(base), seeds)]
    found = [paired_over_seeds(variant[part], base[part]).difference for part in parts]
    both = across_draws(found)
    of_draws = [estimate.value for estimate in found]
    return _with_p(Estimate(both.value, both.low, both.high, sum(estimate.n for estimate in found)), of_draws)


def _with_p(difference: Estimate, runs: Sequence[float]) -> PairedDifference:
    """With the p-value.

    Half of the interval towards 0 is sqrt(a^2 + b^2), with Student's interval a over the runs (or draws) and an
    interval b over patients. Their widths change differently with the level: that of Student's distribution, which has
    few degrees of freedom, more than the normal one of the patients. If all patients differ by the same amount, nothing
    varies, and the p-value is that of the sign test.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm, t

    half = difference.value - difference.low if difference.value > 0 else difference.high - difference.value
    degrees = len(runs) - 1
    between = float(np.std(runs, ddof=1) / math.sqrt(len(runs))) if degrees else 0.0
    usual = (1 - LEVEL) / 2
    of_patients = math.sqrt(max(half**2 - (between * t.isf(usual, degrees)) ** 2, 0.0)) if degrees else half
    of_patients /= norm.isf(usual)

    def excess(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        student = between * t.isf(tail, degrees) if degrees else 0.0
        return math.hypot(student, of_patients * norm.isf(tail)) - abs(difference.value)

    if not difference.value:
        return PairedDifference(difference, 1.0)
    if max(between, of_patients) <= _ROUNDING * abs(difference.value):
        return PairedDifference(difference, max(min(1.0, 2 * 0.5**difference.n), math.exp(_LOG_SMALLEST)))
    if excess(_LOG_SMALLEST) < 0:
        return PairedDifference(difference, math.exp(_LOG_SMALLEST))
    return PairedDifference(difference, math.exp(brentq(excess, _LOG_SMALLEST, 0.0)))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Names to p-values corrected for their number: the chance of one false finding among all stays what it says."""
    out: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[name]))
        out[name] = largest
    return out


def compare_variants(
    runs: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], base: str, draws: int = 1
) -> dict[str, dict[str, PairedDifference]]:
    """Variant to measure to its difference to the base.

    Args:
        runs: variant to one mapping for each run: measure to patient to value.
        base: name of the base variant.
        draws: draws of the cohort; the runs of the first one come first.
    """
    out: dict[str, dict[str, PairedDifference]] = {name: {} for name in runs if name != base}
    for measure in {name: None for run in runs[base] for name in run}:
        found = {}
        for variant in out:
            if all(measure in run for run in (*runs[variant], *runs[base])):
                both = [[run[measure] for run in runs[name]] for name in (variant, base)]
                found[variant] = paired_over_draws(both[0], both[1], draws)
        corrected = holm({variant: difference.p for variant, difference in found.items()})
        for variant, difference in found.items():
            out[variant][measure] = PairedDifference(difference.difference, difference.p, corrected[variant])
    return out
