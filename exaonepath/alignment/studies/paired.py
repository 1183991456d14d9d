"""Variants of a study compared with its base: paired over seeds and patients, corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import LEVEL, Estimate, across_runs, bootstrap_mean
from exaonepath.errors import SettingsError


@dataclass(frozen=True)
class PairedDifference:
    """A variant minus the base.

    Attributes:
        difference: mean over seeds and patients, with its interval over both.
        p: probability of such a difference by chance, for this variant alone (normal approximation).
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
    limits = [(run - mean + over_patients.low, run - mean + over_patients.high) for run in values.mean(1).tolist()]
    both = across_runs(values.mean(1).tolist(), limits)
    half = max(both.high - both.value, both.value - both.low)
    quantile = NormalDist().inv_cdf((1 + LEVEL) / 2)
    p = 1.0 if not half else 2 * NormalDist().cdf(-abs(mean) * quantile / half)
    return PairedDifference(Estimate(mean, both.low, both.high, len(patients)), p)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Names to p-values corrected for their number: the chance of one false finding among all stays what it says."""
    out: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[name]))
        out[name] = largest
    return out


def compare_variants(
    runs: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], base: str
) -> dict[str, dict[str, PairedDifference]]:
    """Variant to measure to its difference to the base.

    Args:
        runs: variant to one mapping for each seed: measure to patient to value.
        base: name of the base variant.
    """
    out: dict[str, dict[str, PairedDifference]] = {name: {} for name in runs if name != base}
    for measure in {name: None for run in runs[base] for name in run}:
        found = {}
        for variant in out:
            if all(measure in run for run in (*runs[variant], *runs[base])):
                both = ([run[measure] for run in runs[name]] for name in (variant, base))
                found[variant] = paired_over_seeds(*both)
        corrected = holm({variant: difference.p for variant, difference in found.items()})
        for variant, difference in found.items():
            out[variant][measure] = PairedDifference(difference.difference, difference.p, corrected[variant])
    return out
