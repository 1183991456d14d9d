"""Survival: Harrell's concordance index, and a Cox probe on a frozen embedding.

Both are short, so they are implemented here: each package for survival analysis has a dozen further dependencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import Estimate, bootstrap, certain_as_share, check_rows, one_thread
from exaonepath.alignment.metrics.probe_rows import numbers, probe_inputs, stratified_folds
from exaonepath.alignment.metrics.probes import FOLDS
from exaonepath.errors import SettingsError

_PENALTIES = (1.0, 10.0, 100.0)  # on coefficients of standardised inputs, as a sum over samples
_CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class SurvivalScores:
    """Out-of-fold concordance of a Cox probe: 0.5 is chance, 1 perfect order; `events` of `n` patients had an event."""

    c_index: Estimate
    n: int
    events: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"c_index": self.c_index.as_dict(), "n": self.n, "events": self.events}


def concordance_index(
    risk: Sequence[float] | np.ndarray,
    time: Sequence[float] | np.ndarray,
    event: Sequence[bool] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> float:
    """Harrell's C (Harrell et al. 1982): share of comparable pairs in which the patient with the earlier event has the
    higher risk.

    A pair is comparable if the earlier time is an event, or if the times are equal and one of the two is an event.
    Equal risks count one half.

    Args:
        risk: [n], higher is worse; time: [n]; event: [n], True if the event was observed, False if censored.
        groups: [n]; only pairs within a group count (risks of different cross-validation folds are not comparable).

    Returns:
        0 to 1; NaN if no pair is comparable.
    """
    r, t, e = np.asarray(risk, np.float64), np.asarray(time, np.float64), np.asarray(event, bool)
    n = check_rows(risk=r, time=t, event=e)
    group = np.zeros(n, np.int64) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if not (np.isfinite(r).all() and np.isfinite(t).all()):
        raise SettingsError("risk and time must be finite; leave out patients without a time")
    concordant = comparable = 0.0
    first = np.flatnonzero(e)
    step = max(1, _CHUNK_ENTRIES // max(n, 1))
    for start in range(0, len(first), step):
        i = first[start : start + step, None]
        pair = (group[i] == group) & ((t[i] < t) | ((t[i] == t) & ~e))
        comparable += float(pair.sum())
        concordant += float((pair & (r[i] > r)).sum()) + 0.5 * float((pair & (r[i] == r)).sum())
    return concordant / comparable if comparable else math.nan


@one_thread()
def cox_probe(
    embedding: Any,
    time: Sequence[float] | np.ndarray,
    event: Sequence[bool] | np.ndarray,
    patients: Sequence[Any] | np.ndarray | None = None,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> SurvivalScores:
    """Concordance of a ridge-penalised Cox model with cross-validation; its penalty is selected inside each fold.

    Args:
        embedding: [n, d]; time: [n]; event: [n]; rows with a missing value (None, NaN, pandas' NA) are left out.
        patients: patient of each row; folds never split a patient.

    Raises:
        SettingsError: there are fewer than two events per fold, or a time is not positive.
    """
    from sklearn.preprocessing import StandardScaler

    x, groups = probe_inputs(embedding, time, patients)
    t, seen = numbers(time), numbers(event)
    known = np.isfinite(t) & np.isfinite(seen)
    x, groups, t, e = x[known], groups[known], t[known], seen[known] != 0
    if (t <= 0).any():
        raise SettingsError(f"survival times must be positive; {int((t <= 0).sum())} are not")
    folds = min(folds, int(e.sum()) // 2)
    if folds < 2:
        raise SettingsError(f"a survival probe needs four events or more, got {int(e.sum())}")
    risk, fold = np.zeros(len(t)), np.zeros(len(t), np.int64)
    for k, (train, test) in enumerate(_folds(e, groups, folds, seed)):
        scaler = StandardScaler().fit(x[train])
        inside = scaler.transform(x[train])
        penalty = _best_penalty(inside, t[train], e[train], groups[train], seed)
        risk[test] = scaler.transform(x[test]) @ fit_cox(inside, t[train], e[train], penalty)
        fold[test] = k

    def c_index(rows: np.ndarray) -> float:
        return concordance_index(risk[rows], t[rows], e[rows], fold[rows])

    estimate = bootstrap(c_index, groups, strata=e, resamples=200, seed=seed)
    return SurvivalScores(certain_as_share(estimate, int(e.sum())), len(t), int(e.sum()))


def fit_cox(x: np.ndarray, time: np.ndarray, event: np.ndarray, penalty: float) -> np.ndarray:
    """Coefficients [d] of a Cox model with penalty / 2 |b|^2, by the partial likelihood with Breslow's method for
    ties."""
    from scipy.optimize import minimize

    order = np.argsort(-time, kind="stable")
    x, time, event = x[order], time[order], event[order]
    # All patients with this time or a later one are at risk. In descending order, these are all up to the last equal
    # time, so a cumulative sum gives the sum over them.
    last = np.searchsorted(-time, -time, side="right") - 1

    def objective(b: np.ndarray) -> tuple[float, np.ndarray]:
        score = x @ b
        shift = score.max()
        weight = np.exp(score - shift)
        total = np.cumsum(weight)[last]
        mean = np.cumsum(weight[:, None] * x, axis=0)[last] / total[:, None]
        loss = -(score - shift - np.log(total))[event].sum() + penalty / 2 * (b @ b)
        return float(loss), -(x - mean)[event].sum(axis=0) + penalty * b

    return np.asarray(minimize(objective, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x)


def _best_penalty(x: np.ndarray, time: np.ndarray, event: np.ndarray, groups: np.ndarray, seed: int) -> float:
    scores = np.zeros(len(_PENALTIES))
    for train, test in _folds(event, groups, 3, seed) if event.sum() >= 6 else ():
        for k, penalty in enumerate(_PENALTIES):
            b = fit_cox(x[train], time[train], event[train], penalty)
            c = concordance_index(x[test] @ b, time[test], event[test])
            scores[k] += 0.5 if math.isnan(c) else c
    return _PENALTIES[int(scores.argmax())] if scores.any() else _PENALTIES[len(_PENALTIES) // 2]


def _folds(event: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> Any:
    """Folds with similar shares of events; not stratified if there are fewer censored patients than folds.

    Otherwise scikit-learn would warn for every such split, and fewer folds would leave less data to fit on.
    """
    strata = event.astype(int) if (~event).sum() >= folds else np.zeros(len(event), int)
    return stratified_folds(strata, groups, folds, seed)
