"""Evaluation of a trained model, as one report of plain JSON types."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.metrics.geometry import alignment, effective_rank, uniformity
from exaonepath.alignment.metrics.missing import (
    Subset,
    by_size,
    gain_over_single,
    probe_from_subsets,
    retrieval_from_subsets,
)
from exaonepath.alignment.metrics.probes import knn_probe, linear_probe
from exaonepath.alignment.metrics.projections import direction_reuse, pair_spectrum
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, cross_modal_retrieval, recall_by_group
from exaonepath.alignment.metrics.survival import cox_probe
from exaonepath.alignment.subject import Subject, as_subject
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError
from exaonepath.text import few

logger = logging.getLogger(__name__)

# Values in tables for whether the event was observed; "1:DECEASED" is used by cBioPortal.
_EVENTS = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "dead", "deceased", "died", "event", "1:deceased"), 1),
    **dict.fromkeys(("0", "0.0", "false", "no", "alive", "living", "censored", "0:living"), 0),
}
_MOST_CLASSES = 20


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the evaluation.

    Attributes:
        labels: columns to probe; empty: every column of the labels with 2 to 20 different values.
        time, event: columns of survival; used if both exist.
        targets: modalities to retrieve from subsets of the others; empty: all.
        missing: whether to compute curves over missing modalities.
        seed: seed of folds and intervals.
    """

    labels: tuple[str, ...] = ()
    time: str = "time"
    event: str = "event"
    targets: tuple[str, ...] = ()
    missing: bool = True
    seed: int = 0


def evaluate(
    subject: Subject | str | os.PathLike[str],
    settings: EvaluationSettings | None = None,
    *,
    cohort: str | os.PathLike[str] | None = None,
    split: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a cohort.

    Retrieval and geometry are reported for each part of the split; probes, survival, missing modalities and projections
    for the held-out patients.

    Args:
        subject: from `open_subject`; or the folder of a run or of a model.
        settings: settings of the evaluation.
        cohort, split: if `subject` is a folder: see `open_subject`.

    Returns:
        The report, of plain JSON types; `alignment.report.write_report` writes it with tables and figures.

    Raises:
        SettingsError: the cohort lacks a label, or columns of survival cannot be read; raised before any computation.
    """
    settings = settings or EvaluationSettings()
    subject = as_subject(subject, cohort, split)
    labels = _labels(subject, settings)
    _follow_up(subject, subject.held_out, settings)
    parts = {name: subject.embed(ids) for name, ids in subject.parts.items()}
    embedded = subject.embed(subject.held_out)
    return {
        "modalities": list(subject.model.modalities),
        "trained_pairs": [list(pair) for pair in subject.model.trained_pairs],
        "parts": {name: _part(part) for name, part in parts.items()},
        "held_out": len(embedded.patients),
        "probes": {label: _probes(subject, embedded, label, settings.seed) for label in labels},
        "survival": _survival(subject, embedded, settings),
        "missing": _missing(subject, parts.get("train"), embedded, labels, settings) if settings.missing else {},
        "projections": _projections(subject, embedded),
    }


def require_labels(cohort: Cohort, labels: Iterable[str]) -> None:
    """Raise `SettingsError` if the cohort lacks a label, or all its patients have the same value of it."""
    columns = cohort.labels
    if missing := [label for label in labels if label not in columns]:
        raise SettingsError(
            f"the cohort has no label {', '.join(missing)}; it has {', '.join(map(str, columns)) or 'none'}"
        )
    for label in labels:
        if columns[label].reindex(cohort.patients).dropna().nunique() < 2:
            raise SettingsError(f"label {label}: the cohort's patients have fewer than two values of it")


def _labels(subject: Subject, settings: EvaluationSettings) -> list[str]:
    if settings.labels:
        require_labels(subject.cohort, settings.labels)
        return list(settings.labels)
    columns, skipped = subject.cohort.labels, (settings.time, settings.event)
    return [
        str(name) for name in columns if name not in skipped and 2 <= columns[name].dropna().nunique() <= _MOST_CLASSES
    ]


def _part(part: EmbeddedPatients) -> dict[str, Any]:
    present = np.stack([*part.available.values()]).sum(0)
    count = {patient: int(n) for patient, n in zip(part.patients, present, strict=True)}
    groups = recall_by_group(part.pairs, count)
    return {
        "patients": len(part.patients),
        "available": {name: int(flags.sum()) for name, flags in part.available.items()},
        "retrieval": {name: score.as_dict() for name, score in cross_modal_retrieval(part.pairs).items()},
        "recall_by_modalities": {str(n): value.recall.as_dict() for n, value in groups.items()},
        "geometry": {
            name: {"effective_rank": effective_rank(h), "uniformity": uniformity(h)}
            for name, h in ((name, part.modality[name][part.available[name]]) for name in part.modality)
            if len(h) > 1
        },
        "alignment": {f"{pair.left}-{pair.right}": alignment(*_common(pair)) for pair in part.pairs},
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


def _probes(subject: Subject, embedded: EmbeddedPatients, label: str, seed: int) -> dict[str, Any]:
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


def _survival(subject: Subject, embedded: EmbeddedPatients, settings: EvaluationSettings) -> dict[str, Any]:
    found = _follow_up(subject, embedded.patients, settings)
    if found is None:
        return {}
    time, event, known = found
    out = {}
    for name, (rows, x) in embeddings_of(subject, embedded).items():
        x, rows = x[known[rows]], rows[known[rows]]
        try:
            out[name] = cox_probe(x, time[rows], event[rows], seed=settings.seed).as_dict()
        except SettingsError as exc:
            logger.warning("no survival probe from %s: %s", name, exc)
    return out


def _follow_up(
    subject: Subject, patients: Sequence[str], settings: EvaluationSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(time, whether the event was observed, whether both are known), [n] each; None without such columns.

    Raises:
        SettingsError: a time is no number, or an event is neither yes nor no (the values are named).
    """
    if not {settings.time, settings.event} <= set(subject.cohort.labels):
        return None
    raw = pd.Series(column(subject, patients, settings.time))
    time = pd.to_numeric(raw, errors="coerce")
    if wrong := sorted({str(v) for v in raw[time.isna() & raw.notna()]}):
        raise SettingsError(f"column {settings.time} must hold times, got {few(wrong)}; name another with --time")
    events = pd.Series(column(subject, patients, settings.event))
    words = events.map(lambda v: str(v).strip().lower())
    event = words.map(_EVENTS)
    if wrong := sorted({str(v) for v in events[event.isna() & events.notna()]}):
        raise SettingsError(
            f"column {settings.event} must state whether the event was observed (1 or 0, true or false, deceased or "
            f"living), got {few(wrong)}; name another with --event"
        )
    known = time.notna() & event.notna()
    return time.to_numpy(np.float64), event.fillna(0).to_numpy() > 0, known.to_numpy(bool)


def _missing(
    subject: Subject,
    train: EmbeddedPatients | None,
    embedded: EmbeddedPatients,
    labels: Sequence[str],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Curves over the patients who have all modalities."""
    rows = complete_rows(embedded)
    patients = np.asarray(embedded.patients)[rows]
    if len(rows) < 2:
        logger.warning("%d held-out patients have every modality: no curves over missing ones", len(rows))
        return {}
    spaces = {pair: (u[rows], v[rows]) for pair, (u, v) in subject.shared_spaces(embedded).items()}
    targets = settings.targets or subject.model.modalities
    out: dict[str, Any] = {"patients": len(rows), "retrieval": {}, "probes": {}}
    for target in targets:
        found = retrieval_from_subsets(spaces, patients, target)
        out["retrieval"][target] = _subsets({subset: score.as_dict() for subset, score in found.items()}) | {
            "curve": by_size({subset: score.recall[1].value for subset, score in found.items()}),
            "chance": next(iter(found.values())).chance[1],
        }
    train_rows = np.zeros(0, np.int64) if train is None else complete_rows(train)
    for label in labels:
        if train is not None and len(train_rows):
            out["probes"][label] = _missing_probes(subject, train, train_rows, embedded, rows, label, settings.seed)
    return out


def _missing_probes(
    subject: Subject,
    train: EmbeddedPatients,
    train_rows: np.ndarray,
    embedded: EmbeddedPatients,
    rows: np.ndarray,
    label: str,
    seed: int,
) -> dict[str, Any]:
    cache: dict[Subset, tuple[np.ndarray, np.ndarray]] = {}

    def fused(subset: Subset) -> tuple[np.ndarray, np.ndarray]:
        if subset not in cache:
            cache[subset] = subject.fuse(train, subset)[train_rows], subject.fuse(embedded, subset)[rows]
        return cache[subset]

    known, asked = column(subject, train.patients, label)[train_rows], column(subject, embedded.patients, label)[rows]
    out: dict[str, Any] = {}
    for name, refit in (("refitted", True), ("deployed", False)):
        try:
            found = probe_from_subsets(fused, subject.model.modalities, known, asked, refit=refit, seed=seed)
        except SettingsError as exc:
            logger.warning("no curve of %s over missing modalities: %s", label, exc)
            return {}
        out[name] = _subsets({subset: score.balanced_accuracy.as_dict() for subset, score in found.items()}) | {
            "curve": by_size({subset: score.balanced_accuracy.value for subset, score in found.items()}),
            "chance": next(iter(found.values())).chance,
        }
    try:
        gains = gain_over_single(fused, subject.model.modalities, known, asked, seed=seed)
        out["gain_over_single"] = {name: gain.as_dict() for name, gain in gains.items()}
    except SettingsError as exc:
        logger.warning("all modalities were not compared with single ones for %s: %s", label, exc)
    return out


def _projections(subject: Subject, embedded: EmbeddedPatients) -> dict[str, Any]:
    spaces = subject.shared_spaces(embedded)
    spectra = []
    for (a, b), (u, v) in spaces.items():
        both = embedded.available[a] & embedded.available[b]
        if both.sum() > 1:
            spectra.append(pair_spectrum(a, b, u[both], v[both]).as_dict())
    reuse = {}
    for name in subject.model.modalities:
        partners = [b if a == name else a for a, b in subject.model.trained_pairs if name in (a, b)]
        weights = {p: subject.model.projection(name, p).detach().float().cpu().numpy() for p in partners}
        rows = embedded.available[name]
        if len(partners) > 1 and rows.sum() > 1:
            found = direction_reuse(weights, embedded.modality[name][rows])
            reuse[name] = {"-".join(pair): value for pair, value in found.items()}
    return {"pairs": spectra, "reuse": reuse}


def complete_rows(embedded: EmbeddedPatients) -> np.ndarray:
    """Rows of the patients who have every modality of the model."""
    return np.flatnonzero(np.stack([*embedded.available.values()]).all(0))


def column(subject: Subject, patients: Sequence[str], label: str) -> np.ndarray:
    """Values of a label, as objects, in the order of the patients; NaN if unknown."""
    found = subject.cohort.labels[label].reindex(list(patients)).astype(object)
    values: np.ndarray = found.where(found.notna(), np.nan).to_numpy(object)
    return values


def _common(pair: PairEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the patients on both sides of a pair, one per patient."""
    right = {patient: at for at, patient in enumerate(pair.right_patients)}
    both = [(at, right[p]) for at, p in enumerate(pair.left_patients) if p in right]
    return pair.u[[a for a, _ in both]], pair.v[[b for _, b in both]]


def _subsets(values: Mapping[Subset, Any]) -> dict[str, Any]:
    return {"subsets": {"+".join(subset): value for subset, value in values.items()}}
