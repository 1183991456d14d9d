"""Calibration of the probes of labels and of their baselines, on the test patients."""

from __future__ import annotations

from typing import Any

import numpy as np

from exaonepath.alignment.analyses.context import Context
from exaonepath.alignment.metrics.calibration import brier_difference, calibration, with_shares
from exaonepath.alignment.metrics.transfer_probes import LabelTask, Prediction, shared_rows
from exaonepath.errors import SettingsError

_FEWEST = 20


def calibrate(context: Context) -> dict[str, Any]:
    """Reliability of the class probabilities of every label.

    Probes are fitted with equal weights of all classes, so their probabilities are converted to the class shares of the
    training patients first; the error without the conversion is reported too.
    """
    out: dict[str, Any] = {}
    for label, predicted in context.each_label().items():
        shares = class_shares(predicted.task)
        entry: dict[str, Any] = {}
        baselines = [(method, name, found) for method, (name, found) in predicted.baselines.items()]
        for method, name, found in (*((name, "", found) for name, found in predicted.ours.items()), *baselines):
            if len(found.y) < _FEWEST:
                context.note(f"{label} from {method}", f"{len(found.y)} test patients have it, {_FEWEST} are needed")
                continue
            try:
                entry[method] = _scores(found, shares, context.seed)
                if name in predicted.ours:
                    entry[method] |= {"compared_with": name} | _difference(predicted.ours[name], found, shares, context)
            except SettingsError as exc:
                context.note(f"{label} from {method}", exc)
        if entry:
            out[label] = {
                "shares": dict(zip(predicted.task.classes.tolist(), shares.tolist(), strict=True)),
                "methods": entry,
            }
    return out


def class_shares(task: LabelTask) -> np.ndarray:
    """float64 [K]: class shares of the labelled training patients."""
    counts = np.bincount(task.train.y, minlength=len(task.classes))
    return np.asarray(counts / counts.sum())


def _scores(found: Prediction, shares: np.ndarray, seed: int) -> dict[str, Any]:
    scores = calibration(found.y, with_shares(found.probability, shares), shares, seed=seed).as_dict()
    as_fitted = calibration(found.y, found.probability, shares, seed=seed)
    return {**scores, "error_as_fitted": as_fitted.error.as_dict(), "brier_as_fitted": as_fitted.brier.value}


def _difference(ours: Prediction, theirs: Prediction, shares: np.ndarray, context: Context) -> dict[str, Any]:
    """Brier score of ours minus theirs, on the patients of both."""
    a, b = shared_rows(ours.rows, theirs.rows)
    y, seed = ours.y[a], context.seed
    probability = [with_shares(found.probability[rows], shares) for found, rows in ((ours, a), (theirs, b))]
    return {"difference": brier_difference(y, probability[0], probability[1], seed=seed).as_dict()}
