"""Probes that are fitted on the labelled training patients and scored on test patients.

Validation patients choose the hyperparameters, in the same way for the model's embeddings and for the baselines, so
that they can be compared. Embeddings of training patients are those the model was trained on: a choice among them by
cross-validation would be too optimistic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import (
    Estimate,
    bootstrap_weighted,
    mean_of_shares,
    one_thread,
)
from exaonepath.alignment.metrics.probes import ProbeScores, class_scores, weighted_auc
from exaonepath.errors import SettingsError
from exaonepath.text import few

logger = logging.getLogger(__name__)

Predict = Callable[[np.ndarray], np.ndarray]
_INVERSE_PENALTIES = (1e-3, 1e-2, 0.1, 1.0)
_NEIGHBOURS = (1, 5, 20, 50)
COMPONENTS = (10, 30, 100)
_USUAL = 1  # place of the choice that is used if validation patients cannot choose


@dataclass(frozen=True)
class LabelledPart:
    """Patients with a label.

    Attributes:
        rows: int64 [n], their rows among all patients of the part.
        y: int64 [n], classes as numbers.
    """

    rows: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class LabelTask:
    """A label, and the patients to fit, to choose, and to test.

    Attributes:
        classes: [K] names, those with two training patients or more.
        train, validation, test: see `LabelledPart`; all have a label of one of these classes.
    """

    classes: np.ndarray
    train: LabelledPart
    validation: LabelledPart
    test: LabelledPart

    @staticmethod
    def of(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> LabelTask:
        """The task of labels (objects, NaN or None where unknown) of all patients of the three parts.

        Raises:
            SettingsError: fewer than two classes have two training patients, or no test patient has a label of one.
        """
        known = {name: _text(values) for name, values in (("train", train), ("val", validation), ("test", test))}
        names, counts = np.unique(known["train"][known["train"] != ""], return_counts=True)
        classes = names[counts > 1]
        if len(classes) < 2:
            raise SettingsError(
                f"a probe needs two classes or more with two training patients each; they have "
                f"{dict(zip(names.tolist(), counts.tolist(), strict=True))}"
            )
        left_out = sorted({*known["test"]} - {*classes, ""})
        if left_out:
            logger.warning(
                "test patients of classes with fewer than two training patients are left out: %s",
                few([str(name) for name in left_out]),
            )
        parts = {}
        for name, values in known.items():
            rows = np.flatnonzero(np.isin(values, classes))
            parts[name] = LabelledPart(rows, np.searchsorted(classes, values[rows]))
        if not len(parts["test"].rows):
            raise SettingsError("no test patient has a label of a class with two training patients or more")
        return LabelTask(classes, parts["train"], parts["val"], parts["test"])

    def restricted(self, available: Sequence[np.ndarray]) -> LabelTask:
        """The task of the patients that are available: bool [n] of all patients of train, validation and test.

        Raises:
            SettingsError: the training patients are left with one class, or there is no test patient.
        """
        parts = [
            LabelledPart(part.rows[flags[part.rows]], part.y[flags[part.rows]])
            for part, flags in zip((self.train, self.validation, self.test), available, strict=True)
        ]
        if len(np.unique(parts[0].y)) < 2 or not len(parts[2].rows):
            raise SettingsError("too few labelled patients have the modality")
        return LabelTask(self.classes, *parts)

    def can_choose(self) -> bool:
        """Whether validation patients can choose: ten or more, of two classes."""
        return len(self.validation.y) >= 10 and len(np.unique(self.validation.y)) > 1


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of the test patients of a task.

    Attributes:
        rows: rows of the test patients. probability: float64 [m, K]. y: int64 [m]. classes: [K].
    """

    rows: np.ndarray
    probability: np.ndarray
    y: np.ndarray
    classes: np.ndarray

    def scores(self, seed: int = 0) -> ProbeScores:
        """Balanced accuracy and AUROC with intervals over patients."""
        return class_scores(self.y, self.probability, np.arange(len(self.y)), self.classes, seed)


@one_thread()
def linear_prediction(task: LabelTask, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Prediction:
    """Logistic regression; validation patients choose its penalty and the scaling (each direction, or all together).

    A common scale keeps the relative sizes of the directions of an embedding, which may say how certain they are.

    Args:
        task: the label.
        train, validation, test: embeddings [n, d] of all patients of the parts; the task selects rows.
    """

    def fit(x: np.ndarray, y: np.ndarray, choice: tuple[bool, float]) -> Predict:
        return _scaled_logistic(x, y, len(task.classes), *choice)

    choices = [(common, penalty) for penalty in _INVERSE_PENALTIES for common in (True, False)]
    return _fit(task, (train, validation, test), choices, fit)


@one_thread()
def nearest_prediction(task: LabelTask, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Prediction:
    """k nearest neighbours by cosine similarity; validation patients choose k; arguments of `linear_prediction`."""
    from sklearn.neighbors import KNeighborsClassifier

    def fit(x: np.ndarray, y: np.ndarray, choice: int) -> Predict:
        model = KNeighborsClassifier(min(choice, len(y))).fit(_unit(x), y)
        return lambda rows: _all_classes(model, _unit(rows), len(task.classes))

    return _fit(task, (train, validation, test), list(_NEIGHBOURS), fit)


@one_thread()
def pca_prediction(task: LabelTask, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Prediction:
    """Principal components, then logistic regression: validation patients choose number, penalty and scaling.

    The components are those of the training patients with a label; arguments of `linear_prediction`.
    """
    from sklearn.decomposition import PCA

    scores: dict[int, tuple[Any, np.ndarray]] = {}

    def fit(x: np.ndarray, y: np.ndarray, choice: tuple[int, bool, float]) -> Predict:
        count = min(choice[0], *x.shape)
        if count not in scores:
            model = PCA(count, svd_solver="full" if min(x.shape) < 500 else "randomized", random_state=0).fit(x)
            scores[count] = model, model.transform(x)
        components, inside = scores[count]
        predict = _scaled_logistic(inside, y, len(task.classes), *choice[1:])
        return lambda rows: predict(components.transform(rows))

    choices = [(k, c, p) for p in _INVERSE_PENALTIES for k in COMPONENTS for c in (True, False)]
    return _fit(task, (train, validation, test), choices, fit)


@dataclass(frozen=True)
class Difference:
    """A paired difference of two predictions of the same test patients."""

    balanced_accuracy: Estimate
    auroc: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"balanced_accuracy": self.balanced_accuracy.as_dict(), "auroc": self.auroc.as_dict()}


def paired_difference(ours: Prediction, theirs: Prediction, seed: int = 0) -> Difference:
    """`ours` minus `theirs` on the test patients of both; patients are resampled, each with both predictions.

    Raises:
        SettingsError: no test patient is in both.
    """
    a, b = shared_rows(ours.rows, theirs.rows)
    y, first, second = ours.y[a], ours.probability[a], theirs.probability[b]
    member = [y == c for c in np.unique(y)]
    right = (first.argmax(1) == y).astype(float) - (second.argmax(1) == y)

    def balanced(weights: np.ndarray) -> np.ndarray:
        return np.mean([(weights[:, rows] @ right[rows]) / weights[:, rows].sum(1) for rows in member], axis=0)

    def auroc(weights: np.ndarray) -> np.ndarray:
        return np.mean(
            [
                weighted_auc(first[:, c], y == c, weights) - weighted_auc(second[:, c], y == c, weights)
                for c in range(len(ours.classes))
            ],
            axis=0,
        )

    found = [bootstrap_weighted(s, np.arange(len(y)), strata=y, seed=seed) for s in (balanced, auroc)]
    if not right.any():
        # No discordant patient: all resamples are equal, and the interval is that of none among so many.
        _, high = mean_of_shares([0.0] * len(member), [int(rows.sum()) for rows in member])
        found[0] = Estimate(found[0].value, -high, high, found[0].n)
    return Difference(*found)


def shared_rows(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the test patients that two predictions have in common, in each of them.

    Raises:
        SettingsError: there is none.
    """
    rows, a, b = np.intersect1d(ours, theirs, return_indices=True)
    if not len(rows):
        raise SettingsError("the two predictions have no test patient in common")
    return a, b


def _fit(
    task: LabelTask,
    parts: Sequence[np.ndarray],
    choices: Sequence[Any],
    fit: Callable[[np.ndarray, np.ndarray, Any], Predict],
) -> Prediction:
    train, validation, test = (
        np.asarray(x, np.float64)[part.rows]
        for x, part in zip(parts, (task.train, task.validation, task.test), strict=True)
    )
    predict = fit(train, task.train.y, choices[_USUAL])
    if task.can_choose():
        best = -np.inf
        for choice in choices:
            candidate = fit(train, task.train.y, choice)
            quality = _quality(task.validation.y, candidate(validation))
            if quality > best:
                best, predict = quality, candidate
    return Prediction(task.test.rows, predict(test), task.test.y, task.classes)


def _quality(y: np.ndarray, probability: np.ndarray) -> float:
    """Balanced accuracy; ties are broken by the probability of the true class."""
    right = probability.argmax(1) == y
    count = np.bincount(y)
    balanced = (np.bincount(y, right)[count > 0] / count[count > 0]).mean()
    return float(balanced + 1e-3 * probability[np.arange(len(y)), y].mean())


def _scaled_logistic(x: np.ndarray, y: np.ndarray, classes: int, common: bool, penalty: float) -> Predict:
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(0), x.std(0)
    scale = np.full_like(scale, np.sqrt(np.square(scale).mean())) if common else scale
    scale[scale == 0] = 1
    model = LogisticRegression(C=penalty, max_iter=300, tol=1e-3, class_weight="balanced").fit((x - mean) / scale, y)
    return lambda rows: _all_classes(model, (rows - mean) / scale, classes)


def _all_classes(model: Any, rows: np.ndarray, classes: int) -> np.ndarray:
    out = np.zeros((len(rows), classes))
    if len(rows):
        out[:, model.classes_] = model.predict_proba(rows)
    return out


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norm > 0, norm, 1))


def _text(values: np.ndarray) -> np.ndarray:
    """Labels as text, "" where unknown."""
    from exaonepath.alignment.metrics.probe_rows import is_missing

    return np.array(["" if is_missing(value) else str(value) for value in values], object).astype(str)
