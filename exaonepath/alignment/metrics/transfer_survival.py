"""Cox models that are fitted on the training patients and scored on test patients; validation patients choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exaonepath.alignment.metrics.intervals import Estimate, bootstrap, certain_as_share, one_thread
from exaonepath.alignment.metrics.survival import SurvivalScores, concordance_index, fit_cox
from exaonepath.alignment.metrics.transfer_probes import COMPONENTS, shared_rows
from exaonepath.errors import SettingsError

_COX_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
_TINY = 1e-9


@dataclass(frozen=True)
class FollowUp:
    """Survival of all patients of a part; NaN and False where it is not known.

    Attributes:
        time: float64 [n], positive. event: bool [n]. known: bool [n].
    """

    time: np.ndarray
    event: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Risk:
    """Predicted risks of test patients: their rows, risk, time and event, [m] each."""

    rows: np.ndarray
    risk: np.ndarray
    time: np.ndarray
    event: np.ndarray

    def scores(self, seed: int = 0) -> SurvivalScores:
        """Concordance with an interval over patients."""

        def c_index(rows: np.ndarray) -> float:
            return concordance_index(self.risk[rows], self.time[rows], self.event[rows])

        n = np.arange(len(self.risk))
        estimate = bootstrap(c_index, n, strata=self.event, resamples=200, seed=seed)
        return SurvivalScores(certain_as_share(estimate, int(self.event.sum())), len(n), int(self.event.sum()))


@one_thread()
def cox_prediction(
    follow_up: Sequence[FollowUp], embeddings: Sequence[np.ndarray], available: Sequence[np.ndarray], *, pca: bool
) -> Risk:
    """A ridge-penalised Cox model; validation patients choose the penalty, whether every column has the same scale and,
    with `pca`, the number of components.

    Args:
        follow_up: of train, validation and test.
        embeddings: [n, d] of the same parts. available: bool [n], rows that have the embedding.
        pca: whether principal components come first.

    Raises:
        SettingsError: fewer than four training patients or two test patients have an event.
    """
    from sklearn.decomposition import PCA

    use = [np.flatnonzero(part.known & flags) for part, flags in zip(follow_up, available, strict=True)]
    (x, held_out, test), events = [e[r] for e, r in zip(embeddings, use, strict=True)], []
    for part, rows in zip(follow_up, use, strict=True):
        events.append((part.time[rows], part.event[rows]))
    if events[0][1].sum() < 4 or events[2][1].sum() < 2:
        raise SettingsError(
            f"a survival probe needs four events of training patients and two of test patients, got "
            f"{int(events[0][1].sum())} and {int(events[2][1].sum())}"
        )
    best: tuple[float, np.ndarray] | None = None
    can_choose = events[1][1].sum() >= 5
    for count in [k for k in COMPONENTS if k <= min(x.shape)] or [min(x.shape)] if pca else [0]:
        first = PCA(count, random_state=0).fit(x) if pca else None
        parts = [part if first is None or not len(part) else first.transform(part) for part in (x, held_out, test)]
        for common in (False, True) if can_choose else (True,):
            known, chosen, asked = _scaled(parts, common)
            for penalty in _COX_PENALTIES if can_choose else _COX_PENALTIES[2:3]:
                b = fit_cox(known, *events[0], penalty)
                quality = concordance_index(chosen @ b, *events[1]) if can_choose else 0.0
                if best is None or quality > best[0]:
                    best = quality, asked @ b
    assert best is not None
    return Risk(use[2], best[1], *events[2])


def _scaled(parts: Sequence[np.ndarray], common: bool) -> list[np.ndarray]:
    """Training, validation and test rows in deviations of the training rows, each column's own or one for all.

    One deviation keeps the sizes of the directions: columns that hardly vary, which hold noise, stay small. The result
    is rotated onto the directions of the training rows: with a ridge penalty, the risks are the same, and no more
    coefficients than patients are fitted.
    """
    mean, scale = parts[0].mean(0), parts[0].std(0)
    scale = np.full_like(scale, np.sqrt(np.square(scale).mean())) if common else scale
    scale = np.where(scale > _TINY, scale, np.inf)  # a constant column says nothing
    rows = [(part - mean) / scale if len(part) else np.zeros((0, len(mean))) for part in parts]
    _, sizes, axes = np.linalg.svd(rows[0], full_matrices=False)
    axes = axes[: max(1, int((sizes > _TINY * sizes[0]).sum()))]
    return [part @ axes.T for part in rows]


def risk_difference(ours: Risk, theirs: Risk, seed: int = 0) -> Estimate:
    """Concordance of `ours` minus that of `theirs` on the test patients of both; the interval is paired.

    Raises:
        SettingsError: no test patient is in both.
    """
    a, b = shared_rows(ours.rows, theirs.rows)
    time, event = ours.time[a], ours.event[a]

    def difference(rows: np.ndarray) -> float:
        first, second = ours.risk[a[rows]], theirs.risk[b[rows]]
        return concordance_index(first, time[rows], event[rows]) - concordance_index(second, time[rows], event[rows])

    return bootstrap(difference, np.arange(len(a)), strata=event, resamples=200, seed=seed)
