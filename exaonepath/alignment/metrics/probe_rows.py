"""Rows of a probe: their labels, patients and folds."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.intervals import check_rows
from exaonepath.alignment.metrics.retrieval import unit_rows
from exaonepath.errors import SettingsError

logger = logging.getLogger(__name__)

Columns = Sequence[Any] | np.ndarray


def probe_inputs(embedding: Any, labels: Columns, patients: Columns | None) -> tuple[np.ndarray, np.ndarray]:
    """Checked embedding float64 [n, d] and patient codes int64 [n]."""
    unit_rows(embedding, "embedding")  # shape and finiteness
    x = np.array(embedding, np.float64)
    groups = np.arange(len(x)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    check_rows(embedding=x, labels=labels, patients=groups)
    return x, groups


def labelled_rows(
    embedding: Any, labels: Columns, patients: Columns | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding, label text and patient code of the rows that have a label."""
    x, groups = probe_inputs(embedding, labels, patients)
    known = np.array([not is_missing(label) for label in labels], bool)
    return x[known], np.array([str(label) for label in np.asarray(labels, object)[known]]), groups[known]


def is_missing(value: Any) -> bool:
    """Whether a cell is None, NaN, NaT or pandas' NA."""
    try:
        return value is None or bool(value != value)  # NaN is not equal to itself
    except TypeError:
        return True  # a comparison with NA gives NA, which has no truth value


def numbers(values: Columns) -> np.ndarray:
    """float64 [n], NaN for missing values."""
    return np.array([math.nan if is_missing(value) else float(value) for value in values], np.float64)


def without_rare(names: np.ndarray, groups: np.ndarray, patients: Columns | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(bool [n], rows whose class has two patients or more; the other classes).

    The only patient of a class cannot be in the training part and in the test part.
    """
    rare = tuple(name for name in np.unique(names).tolist() if len(np.unique(groups[names == name])) < 2)
    keep = ~np.isin(names, rare)
    if rare:
        ids = None if patients is None else np.unique(np.asarray(patients))
        shown = []
        for name in rare:
            who = groups[names == name][0]
            shown.append(f"{name!r} ({f'row {who}' if ids is None else f'patient {ids[who]}'})")
        logger.warning(
            "%d class(es) have a single patient, who cannot be both fitted and tested, and are left out of the probe: "
            "%s",
            len(rare),
            ", ".join(shown[:5]) + (f", ... ({len(shown)} in all)" if len(shown) > 5 else ""),
        )
    return keep, rare


def stratified_folds(y: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> Any:
    """(train, test) row indices of folds that preserve the shares of the classes and never split a group."""
    from sklearn.model_selection import StratifiedGroupKFold

    return StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(y, y, groups)


def usable_folds(y: np.ndarray, groups: np.ndarray, folds: int) -> int:
    """`folds`, or the number of patients of the rarest class if it is smaller.

    Raises:
        SettingsError: there are fewer than two folds, or fewer than two classes with two patients each.
    """
    if folds < 2:
        raise SettingsError(f"cross-validation needs two folds or more, got {folds}")
    fewest = [len(np.unique(groups[y == c])) for c in range(int(y.max(initial=-1)) + 1)]
    if len(fewest) < 2 or min(fewest) < 2:
        raise SettingsError(
            f"a probe needs two classes or more with two patients each; patients per class are {fewest}"
        )
    return min(folds, *fewest)
