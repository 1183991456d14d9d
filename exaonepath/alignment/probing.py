"""Labels and survival from the embeddings of a model, with the baselines on the same patients.

There are two ways. Probes are fitted on the labelled training patients and scored on the test patients, which uses all
labels and allows baselines; or they are cross-validated within the held-out patients, which needs no training patients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from exaonepath.alignment.baselines.comparison import (
    compare_labels,
    compare_survival,
    label_baselines,
    our_predictions,
    whole_parts,
)
from exaonepath.alignment.baselines.profiles import PARTS, CohortPart
from exaonepath.alignment.metrics.probes import knn_probe, linear_probe
from exaonepath.alignment.metrics.survival import cox_probe
from exaonepath.alignment.metrics.transfer_probes import LabelTask, Prediction, nearest_prediction
from exaonepath.alignment.metrics.transfer_survival import FollowUp, Risk, cox_prediction
from exaonepath.alignment.subject import Subject
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError
from exaonepath.text import few

logger = logging.getLogger(__name__)

Views = Mapping[str, tuple[np.ndarray, np.ndarray]]

# Values in tables for whether the event was observed; "1:DECEASED" is used by cBioPortal.
_EVENTS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "dead", "deceased", "died", "event", "1:deceased"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no", "alive", "living", "censored", "0:living"), 0),
}


def embeddings_of(subject: Subject, embedded: EmbeddedPatients) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (rows, embedding): every modality for its patients, and the fused embedding for all patients.

    A modality is represented by the fused embedding of it alone: its projections into the spaces of all its pairs.
    """
    found = {}
    for name, flags in embedded.available.items():
        rows = np.flatnonzero(flags)
        if len(rows):
            found[name] = (rows, subject.fuse(embedded, (name,))[rows])
    found["fused"] = (np.arange(len(embedded.patients)), embedded.fused)
    return found


def transfer_possible(subject: Subject) -> bool:
    """Whether the split has training and test patients, so that probes can be fitted on the one and scored on the
    other."""
    return {"train", "test"} <= set(subject.parts)


@dataclass(frozen=True)
class LabelPredictions:
    """Class probabilities of a label, of the test patients.

    Attributes:
        task: the label, and its training, validation and test patients.
        ours: embedding to the linear probe's prediction.
        baselines: method to (the embedding that it is compared with, its prediction).
    """

    task: LabelTask
    ours: dict[str, Prediction]
    baselines: dict[str, tuple[str, Prediction]]


def external_part(external: Subject | None) -> CohortPart | None:
    """The patients of another cohort, as test patients of the baselines."""
    return None if external is None else CohortPart(external.data, external.data.split["test"])


def predict_labels(
    subject: Subject,
    views: Sequence[Views],
    label: str,
    *,
    baselines: bool,
    external: Subject | None = None,
) -> LabelPredictions:
    """Predictions of a label by probes that are fitted on training patients, and by the baselines.

    Args:
        subject: the model and the cohort.
        views: of train, validation and test patients: see `embeddings_of`.
        label: the column.
        baselines: whether to fit baselines.
        external: another cohort, whose patients are the test patients; None: those of the split.

    Raises:
        SettingsError: see `LabelTask.of`.
    """
    tested = external or subject
    values = [
        column(subject if part != "test" else tested, (subject if part != "test" else tested).data.split[part], label)
        for part in PARTS
    ]
    task = LabelTask.of(*values)
    theirs = {}
    if baselines:
        names = [name for name in subject.modalities if name in tested.modalities]
        theirs = label_baselines(subject.data, names, task, test=external_part(external))
    return LabelPredictions(task, our_predictions(task, views), theirs)


def label_scores(
    found: LabelPredictions, views: Sequence[Views], *, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of our probes, and of the baselines with the differences; plain JSON types."""
    out = {}
    for name, prediction in found.ours.items():
        parts, flags = whole_parts(name, views)
        near = nearest_prediction(found.task.restricted(flags), *parts)
        out[name] = {"linear": prediction.scores(seed).as_dict(), "knn": near.scores(seed).as_dict()}
    return out, compare_labels(found.ours, found.baselines, seed=seed)


def transferred_survival(
    subject: Subject,
    views: Sequence[Views],
    time: str,
    event: str,
    *,
    baselines: bool,
    seed: int,
    external: Subject | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cox probes that are fitted on training patients, and the baselines; plain JSON types.

    Arguments as for `predict_labels`; {} if a cohort has no such columns.
    """
    tested = external or subject
    found = [
        read_follow_up(where, where.data.split[part], time, event)
        for part, where in (("train", subject), ("val", subject), ("test", tested))
    ]
    follow_up = [part for part in found if part is not None]
    if len(follow_up) < len(PARTS):
        return {}, {}
    ours: dict[str, Risk] = {}
    for name in views[0]:
        try:
            ours[name] = cox_prediction(follow_up, *whole_parts(name, views), pca=False)
        except (SettingsError, KeyError) as exc:
            logger.warning("no survival probe from %s: %s", name, exc)
    out = {name: risk.scores(seed).as_dict() for name, risk in ours.items()}
    if not baselines:
        return out, {}
    names = [name for name in subject.modalities if name in tested.modalities]
    return out, compare_survival(subject.data, names, follow_up, ours, test=external_part(external), seed=seed)


def held_out_labels(subject: Subject, embedded: EmbeddedPatients, label: str, seed: int) -> dict[str, Any]:
    """Probes of a label by cross-validation within the held-out patients; plain JSON types."""
    values = column(subject, embedded.patients, label)
    out = {}
    for name, (rows, x) in embeddings_of(subject, embedded).items():
        try:
            found = [probe(x, values[rows], seed=seed).as_dict() for probe in (linear_probe, knn_probe)]
        except SettingsError as exc:
            logger.warning("no probe of %s from %s: %s", label, name, exc)
            continue
        out[name] = dict(zip(("linear", "knn"), found, strict=True))
    return out


def held_out_survival(subject: Subject, embedded: EmbeddedPatients, time: str, event: str, seed: int) -> dict[str, Any]:
    """Cox probes by cross-validation within the held-out patients; plain JSON types."""
    found = read_follow_up(subject, embedded.patients, time, event)
    if found is None:
        return {}
    out = {}
    for name, (rows, x) in embeddings_of(subject, embedded).items():
        x, rows = x[found.known[rows]], rows[found.known[rows]]
        try:
            out[name] = cox_probe(x, found.time[rows], found.event[rows], seed=seed).as_dict()
        except SettingsError as exc:
            logger.warning("no survival probe from %s: %s", name, exc)
    return out


def read_follow_up(subject: Subject, patients: Sequence[str], time: str, event: str) -> FollowUp | None:
    """Survival of the patients; None without such columns.

    Raises:
        SettingsError: a time is no number, or an event is neither yes nor no (the values are named).
    """
    if not {time, event} <= set(subject.cohort.labels):
        return None
    raw = pd.Series(column(subject, patients, time))
    times = pd.to_numeric(raw, errors="coerce")
    if wrong := sorted({str(v) for v in raw[times.isna() & raw.notna()]}):
        raise SettingsError(f"column {time} must hold times, got {few(wrong)}; name another with --time")
    events = pd.Series(column(subject, patients, event))
    words = events.map(lambda v: str(v).strip().lower())
    seen = words.map(_EVENTS)
    if wrong := sorted({str(v) for v in events[seen.isna() & events.notna()]}):
        raise SettingsError(
            f"column {event} must state whether the event was observed (1 or 0, true or false, deceased or living), "
            f"got {few(wrong)}; name another with --event"
        )
    known = times.notna() & seen.notna()
    return FollowUp(times.to_numpy(np.float64), seen.fillna(0).to_numpy() > 0, known.to_numpy(bool))


def column(subject: Subject, patients: Sequence[str], label: str) -> np.ndarray:
    """Values of a label, as objects, in the order of the patients; NaN if unknown."""
    found = subject.cohort.labels[label].reindex(list(patients)).astype(object)
    values: np.ndarray = found.where(found.notna(), np.nan).to_numpy(object)
    return values
