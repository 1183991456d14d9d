"""Probes: prediction of a label from a frozen embedding, by simple models with cross-validation.

Folds never split a patient. All choices (standardisation, penalty, k) are made inside the training part of a fold. The
predictions of all folds are pooled. Intervals are a bootstrap over patients with fixed fitted probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import (
    Estimate,
    bootstrap,
    bootstrap_weighted,
    certain_as_share,
    mean_of_shares,
    one_thread,
)
from exaonepath.alignment.metrics.probe_rows import (
    Columns,
    labelled_rows,
    numbers,
    probe_inputs,
    stratified_folds,
    usable_folds,
    without_rare,
)
from exaonepath.alignment.metrics.retrieval import unit_rows
from exaonepath.errors import SettingsError

FOLDS = 5
_INVERSE_PENALTIES = (1e-3, 3e-2, 1.0)
_RIDGE_PENALTIES = tuple(10.0**k for k in range(-2, 5))
_NEIGHBOURS = (1, 5, 20)
_INNER_FOLDS = 3


@dataclass(frozen=True)
class ProbeScores:
    """Out-of-fold quality of a classifier.

    Attributes:
        balanced_accuracy: mean recall over classes; chance is 1 / classes.
        auroc: area under the ROC curve, macro average of one class against the rest; chance is 0.5. NaN if a class has
            no samples.
        chance: 1 / classes.
        classes: the labels, sorted.
        n: number of samples with a label of one of these classes.
        folds: number of cross-validation folds, limited by the rarest class; None: fitted once, on other patients.
    """

    balanced_accuracy: Estimate
    auroc: Estimate
    chance: float
    classes: tuple[str, ...]
    n: int
    folds: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "balanced_accuracy": self.balanced_accuracy.as_dict(),
            "auroc": self.auroc.as_dict(),
            "chance": self.chance,
            "classes": list(self.classes),
            "n": self.n,
            "folds": self.folds,
        }


@dataclass(frozen=True)
class RegressionScores:
    """Out-of-fold quality of a regression.

    Attributes:
        r2: 1 - residual over total variance (below 0: worse than the mean).
        spearman: rank correlation of prediction and truth.
        n: number of samples with a value.
    """

    r2: Estimate
    spearman: Estimate
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"r2": self.r2.as_dict(), "spearman": self.spearman.as_dict(), "n": self.n}


@one_thread()
def linear_probe(
    embedding: Any, labels: Columns, patients: Columns | None = None, *, folds: int = FOLDS, seed: int = 0
) -> ProbeScores:
    """Logistic regression on the standardised embedding; an inner cross-validation selects its penalty.

    Args:
        embedding: [n, d].
        labels: class of each row; rows without a label (None, NaN, pandas' NA) are left out. Rows of classes with a
            single patient are also left out, with a warning.
        patients: patient of each row; None: every row is a different patient.
        folds: number of stratified, patient-wise folds; fewer if the rarest class has fewer patients.
        seed: seed of folds and intervals.

    Raises:
        SettingsError: there are fewer than two classes with two patients each.
    """
    return _classify(embedding, labels, patients, folds, seed, _INVERSE_PENALTIES, _logistic, standardise=True)


@one_thread()
def knn_probe(
    embedding: Any, labels: Columns, patients: Columns | None = None, *, folds: int = FOLDS, seed: int = 0
) -> ProbeScores:
    """k nearest neighbours by cosine similarity; an inner cross-validation selects k; arguments of `linear_probe`."""
    return _classify(embedding, labels, patients, folds, seed, _NEIGHBOURS, _nearest, standardise=False)


@dataclass(frozen=True)
class FittedProbe:
    """A linear probe of `fit_probe`, fitted once, to be scored on other patients.

    Attributes:
        classes: [K] labels, sorted.
        predict: rows [m, d] to class probabilities [m, K].
        left_out: classes with a single patient in the fit, which the probe does not predict.
    """

    classes: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]
    left_out: tuple[str, ...] = ()

    @one_thread()
    def score(self, embedding: Any, labels: Columns, *, seed: int = 0) -> ProbeScores:
        """Scores on patients that are not part of the fit, one row each.

        Rows without a label, or of a class that the fit left out, are ignored.

        Raises:
            SettingsError: no patient of the fit has a class of these patients.
        """
        x, y, groups = self._known(embedding, labels)
        return class_scores(y, self.predict(x), groups, self.classes, seed)

    @one_thread()
    def hits(self, embedding: Any, labels: Columns) -> tuple[np.ndarray, np.ndarray]:
        """(1.0 if the probe is right, the class as a number), [n] each, for the rows that `score` uses."""
        return self.hits_of_rows(embedding, labels)[:2]

    @one_thread()
    def hits_of_rows(self, embedding: Any, labels: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`hits`, and the row of each in `embedding`, int64 [n]."""
        x, y, rows = self._known(embedding, labels)
        return (self.predict(x).argmax(1) == y).astype(np.float64), np.unique(y, return_inverse=True)[1], rows

    def _known(self, embedding: Any, labels: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the fit's classes: embedding, position in `classes`, patient code."""
        x, wanted, groups = labelled_rows(embedding, labels, None)
        known = ~np.isin(wanted, self.left_out)
        x, wanted, groups = x[known], wanted[known], groups[known]
        if unknown := sorted(set(wanted) - set(self.classes)):
            raise SettingsError(f"test patients have classes that no training patient has: {unknown}")
        return x, np.searchsorted(self.classes, wanted), groups


@one_thread()
def fit_probe(embedding: Any, labels: Columns, *, seed: int = 0) -> FittedProbe:
    """The model of `linear_probe`, fitted on all rows (one per patient); cross-validation selects its penalty.

    Raises:
        SettingsError: there are fewer than two classes with two patients each.
    """
    x, names, groups = labelled_rows(embedding, labels, None)
    keep, rare = without_rare(names, groups, None)
    classes, y = np.unique(names[keep], return_inverse=True)
    x, groups = x[keep], groups[keep]
    usable_folds(y, groups, FOLDS)
    predict = _fit_chosen(x, y, groups, _INVERSE_PENALTIES, _logistic, seed, len(classes), True)
    return FittedProbe(classes, predict, rare)


@one_thread()
def ridge_probe(
    embedding: Any, values: Columns, patients: Columns | None = None, *, folds: int = FOLDS, seed: int = 0
) -> RegressionScores:
    """Ridge regression of a number on the standardised embedding; arguments of `linear_probe`.

    Raises:
        SettingsError: fewer than `folds` patients have a value, or all values are equal.
    """
    from scipy.stats import spearmanr
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler

    x, groups = probe_inputs(embedding, values, patients)
    y = numbers(values)
    keep = np.isfinite(y)
    x, y, groups = x[keep], y[keep], groups[keep]
    if len(np.unique(groups)) < max(folds, 2) or np.ptp(y) == 0:
        raise SettingsError(f"a ridge probe needs {max(folds, 2)} patients or more and a value that varies")
    predicted = np.empty(len(y))
    for train, test in GroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups):
        scaler = StandardScaler().fit(x[train])
        model = RidgeCV(_RIDGE_PENALTIES).fit(scaler.transform(x[train]), y[train])
        predicted[test] = model.predict(scaler.transform(x[test]))

    def r2(rows: np.ndarray) -> float:
        total = np.square(y[rows] - y[rows].mean()).sum()
        return 1 - float(np.square(y[rows] - predicted[rows]).sum() / total) if total else math.nan

    def spearman(rows: np.ndarray) -> float:
        return float(spearmanr(y[rows], predicted[rows]).statistic) if np.ptp(predicted[rows]) else math.nan

    return RegressionScores(
        bootstrap(r2, groups, seed=seed), bootstrap(spearman, groups, seed=seed, resamples=200), len(y)
    )


def _classify(
    embedding: Any,
    labels: Columns,
    patients: Columns | None,
    folds: int,
    seed: int,
    choices: Sequence[float],
    fit: Any,
    *,
    standardise: bool,
) -> ProbeScores:
    x, names, groups = labelled_rows(embedding, labels, patients)
    keep, _ = without_rare(names, groups, patients)
    x, names, groups = x[keep], names[keep], groups[keep]
    classes, y = np.unique(names, return_inverse=True)
    folds = usable_folds(y, groups, folds)
    if not standardise:
        x = unit_rows(x, "embedding")
    probability = np.zeros((len(y), len(classes)))
    for train, test in stratified_folds(y, groups, folds, seed):
        predict = _fit_chosen(x[train], y[train], groups[train], choices, fit, seed, len(classes), standardise)
        probability[test] = predict(x[test])
    return class_scores(y, probability, groups, classes, seed, folds)


def class_scores(
    y: np.ndarray,
    probability: np.ndarray,
    groups: np.ndarray,
    classes: np.ndarray,
    seed: int,
    folds: int | None = None,
) -> ProbeScores:
    """Scores of class probabilities [n, K] of rows whose class is y [n]."""
    right = (probability.argmax(axis=1) == y).astype(np.float64)
    member = y == np.arange(len(classes))[:, None]
    tested = member.any(axis=1)

    def balanced(weights: np.ndarray) -> np.ndarray:
        return np.mean([(weights[:, rows] @ right[rows]) / weights[:, rows].sum(1) for rows in member[tested]], axis=0)

    def auroc(weights: np.ndarray) -> np.ndarray:
        return np.mean([weighted_auc(probability[:, c], rows, weights) for c, rows in enumerate(member)], axis=0)

    accuracy = bootstrap_weighted(balanced, groups, strata=y, seed=seed)
    recalls = [float(right[rows].mean()) for rows in member[tested]]
    if any(recall in (0.0, 1.0) for recall in recalls):
        # The resamples of such a class are all equal.
        patients = [len(np.unique(groups[rows])) for rows in member[tested]]
        low, high = mean_of_shares(recalls, patients)
        accuracy = Estimate(accuracy.value, min(low, accuracy.low), max(high, accuracy.high), accuracy.n)
    smallest = int(min(min(rows.sum(), (~rows).sum()) for rows in member[tested]))
    return ProbeScores(
        accuracy,
        certain_as_share(bootstrap_weighted(auroc, groups, strata=y, seed=seed), smallest),
        1 / len(classes),
        tuple(classes.tolist()),
        len(y),
        folds,
    )


def _logistic(x: np.ndarray, y: np.ndarray, penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=penalty, max_iter=200, tol=1e-3, class_weight="balanced").fit(x, y)


def _nearest(x: np.ndarray, y: np.ndarray, k: float) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    # On unit vectors Euclidean and cosine neighbours are the same.
    return KNeighborsClassifier(min(int(k), len(y))).fit(x, y)


def _fit_chosen(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    choices: Sequence[float],
    fit: Any,
    seed: int,
    n_classes: int,
    standardise: bool,
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit with the best of `choices`; returns rows [m, d] to class probabilities [m, K]."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=standardise, with_std=standardise).fit(x)
    inside = scaler.transform(x)
    model = fit(inside, y, _best_choice(inside, y, groups, choices, fit, seed))

    def predict(rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), n_classes))
        out[:, model.classes_] = model.predict_proba(scaler.transform(rows))
        return out

    return predict


def _best_choice(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, choices: Sequence[float], fit: Any, seed: int
) -> float:
    """The choice with the best inner out-of-fold balanced accuracy; the middle one if there are too few patients."""
    fewest = min(len(np.unique(groups[y == c])) for c in np.unique(y))
    if fewest < 2:
        return choices[len(choices) // 2]
    scores = np.zeros(len(choices))
    for train, test in stratified_folds(y, groups, min(_INNER_FOLDS, fewest), seed):
        for k, choice in enumerate(choices):
            model = fit(x[train], y[train], choice)
            scores[k] += _balanced_accuracy(y[test], model.predict(x[test]) == y[test])
    return choices[int(scores.argmax())]


def _balanced_accuracy(truth: np.ndarray, right: np.ndarray) -> float:
    """Share of correct predictions of each class in `truth`, mean over classes."""
    count = np.bincount(truth)
    return float((np.bincount(truth, right)[count > 0] / count[count > 0]).mean())


def weighted_auc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Areas under the ROC curve [R] of scores [n] and positives bool [n], with weights [R, n] of the rows.

    Ties count one half. NaN without positives or without negatives.
    """
    order = np.argsort(score, kind="stable")
    ordered, is_positive = score[order], positive[order]
    w = weights[:, order]
    below = np.cumsum(np.where(is_positive, 0, w), axis=1)
    below = np.concatenate([np.zeros((len(w), 1)), below], axis=1)
    # Negatives below the first of equal scores count fully, those with an equal score half.
    first, last = np.searchsorted(ordered, ordered, "left"), np.searchsorted(ordered, ordered, "right")
    wins = (below[:, first] + below[:, last]) / 2
    pairs = np.where(is_positive, w, 0).sum(axis=1) * below[:, -1]
    total = (np.where(is_positive, w, 0) * wins).sum(axis=1)
    return np.divide(total, pairs, out=np.full(len(w), math.nan), where=pairs > 0)
