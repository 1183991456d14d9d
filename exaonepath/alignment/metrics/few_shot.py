"""Labels from few labelled patients: repeated draws, and scores over draws and test patients together.

The draws are the same for all methods. A larger draw contains the smaller one, so that a curve does not change by other
patients. No patient chooses a hyperparameter: with one labelled patient a class there is none to choose by. So inputs
are scaled by all training patients, which needs no labels, and the penalty is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exaonepath.alignment.metrics.intervals import LEVEL, Estimate, mean_of_shares, one_thread

SHOTS = (1, 2, 4, 8, 16, 32)
REPEATS = 10
# Inputs have a mean square length of 1, so that one penalty fits embeddings of any width.
_INVERSE_PENALTY = 10.0
_RESAMPLES = 1000


def draw_shots(y: np.ndarray, k: int, repeats: int, seed: int) -> list[np.ndarray]:
    """Rows of k patients of every class, one array per draw; rows of a smaller k are part of those of a larger one.

    Args:
        y: int64 [n], classes of the labelled training patients; every class has k patients or more.
    """
    members = [np.flatnonzero(y == c) for c in np.unique(y)]
    draws = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        draws.append(np.sort(np.concatenate([rng.permutation(rows)[:k] for rows in members])))
    return draws


def scaled_by(train: np.ndarray, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Parts [m, d], centred by the training patients [n, d], who get a mean square length of 1."""
    mean = train.mean(0)
    length = float(np.sqrt(np.square(train - mean).sum(1).mean()))
    return [np.asarray((part - mean) / (length if length > 0 else 1.0)) for part in parts]


@one_thread()
def few_shot_hits(
    draws: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray, test: np.ndarray, test_y: np.ndarray
) -> np.ndarray:
    """float64 [R, m]: 1 where the logistic regression of a draw names the class of a test patient.

    Args:
        draws: rows of `x` that are labelled, R of them.
        x: [n, d] training inputs, scaled; y: [n] their classes.
        test: [m, d]; test_y: [m].
    """
    from sklearn.linear_model import LogisticRegression

    out = np.zeros((len(draws), len(test)))
    for at, rows in enumerate(draws):
        model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000, tol=1e-3, class_weight="balanced")
        out[at] = model.fit(x[rows], y[rows]).predict(test) == test_y
    return out


def score_draws(hits: np.ndarray, y: np.ndarray, *, shares: bool = True, seed: int = 0) -> Estimate:
    """Balanced accuracy, mean over draws, with an interval over draws and test patients.

    Patients are resampled within their class, and draws with all patients.

    Args:
        hits: [R, m] hits of every draw, or differences of hits.
        y: [m] classes.
        shares: whether `hits` are hits; if a class has none, or nothing else, its interval is Wilson's.
    """
    count = len(hits)
    members = [np.flatnonzero(y == c) for c in np.unique(y)]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES) / count
    values = np.zeros(_RESAMPLES)
    for rows in members:
        weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _RESAMPLES) / len(rows)
        values += ((draws @ hits[:, rows]) * weights).sum(1) / len(members)
    recalls = [float(hits[:, rows].mean()) for rows in members]
    value = float(np.mean(recalls))
    low, high = (float(q) for q in np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    sizes = [len(rows) for rows in members]
    if shares and any(recall in (0.0, 1.0) for recall in recalls):
        # All resamples of such a class are equal, and would claim certainty.
        wide = mean_of_shares(recalls, sizes)
        low, high = min(low, wide[0]), max(high, wide[1])
    if not shares and not hits.any():
        half = mean_of_shares([0.0] * len(members), sizes)[1]
        low, high = -half, half
    return Estimate(value, low, high, len(y))
