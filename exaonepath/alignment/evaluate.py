"""Evaluation of a trained model, as one report of plain JSON types."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.analyses.context import Context
from exaonepath.alignment.analyses.external import evaluate_external, open_external
from exaonepath.alignment.analyses.registry import ANALYSES, run_analyses
from exaonepath.alignment.baselines.comparison import compare_retrieval, our_predictions
from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.sites import sites_of
from exaonepath.alignment.metrics.geometry import alignment, effective_rank, uniformity
from exaonepath.alignment.metrics.missing import (
    Subset,
    by_size,
    gain_over_single,
    probe_from_subsets,
    retrieval_from_subsets,
)
from exaonepath.alignment.metrics.projections import direction_reuse, pair_spectrum
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, cross_modal_retrieval, recall_by_group
from exaonepath.alignment.metrics.site import site_retrieval
from exaonepath.alignment.metrics.transfer_probes import LabelTask
from exaonepath.alignment.probing import (
    LabelPredictions,
    Views,
    column,
    embeddings_of,
    held_out_labels,
    held_out_survival,
    label_scores,
    predict_labels,
    read_follow_up,
    transfer_possible,
    transferred_survival,
)
from exaonepath.alignment.subject import Subject, as_subject
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError

logger = logging.getLogger(__name__)

_MOST_CLASSES = 20
_MOST_LABELS = 5  # of those that nobody named: each analysis of a label costs seconds
PROBES = ("train", "held-out")


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the evaluation.

    Attributes:
        labels: columns to probe; empty: every column of the labels with 2 to 20 different values.
        time, event: columns of survival; used if both exist.
        targets: modalities to retrieve from subsets of the others; empty: all.
        missing: whether to compute curves over missing modalities.
        baselines: whether to fit the baselines on the training patients of the split (see `baselines`).
        probes: "train": probes are fitted on the labelled training patients and scored on the test patients;
            "held-out": cross-validation within all held-out patients, also used if the split has no training patients
            or no test patients.
        site: what tells the site of a patient: a column, or "tcga" for barcodes; None: see `data.sites.sites_of`.
        analyses: names of `ANALYSES` to compute; empty: none.
        expression: the modality whose features are predicted from the slide, one by one.
        external: another cohort (a folder or a settings file), to be tested as a whole next to the test patients.
        seed: seed of folds, draws and intervals.
    """

    labels: tuple[str, ...] = ()
    time: str = "time"
    event: str = "event"
    targets: tuple[str, ...] = ()
    missing: bool = True
    baselines: bool = True
    probes: str = "train"
    site: str | None = None
    analyses: tuple[str, ...] = tuple(ANALYSES)
    expression: str = "rna"
    external: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes not in PROBES:
            raise SettingsError(f"probes must be one of {', '.join(PROBES)}, got {self.probes!r}")
        if unknown := [name for name in self.analyses if name not in ANALYSES]:
            raise SettingsError(f"unknown analyses {', '.join(unknown)}; there are {', '.join(ANALYSES)}")


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
    read_follow_up(subject, subject.held_out, settings.time, settings.event)
    external = None if settings.external is None else open_external(subject, Path(settings.external))
    parts = {name: subject.embed(ids) for name, ids in subject.parts.items()}
    embedded = subject.embed(subject.held_out)
    views: list[Views] = []
    if transfer_possible(subject):
        views = [
            embeddings_of(subject, parts[name] if name in parts else subject.embed(()))
            for name in ("train", "val", "test")
        ]
    predicted: dict[str, LabelPredictions] = {}

    def predict(label: str) -> LabelPredictions:
        if label not in predicted:
            predicted[label] = predict_labels(subject, views, label, baselines=settings.baselines)
        return predicted[label]

    report = {
        "modalities": list(subject.modalities),
        "trained_pairs": [list(pair) for pair in subject.model.trained_pairs],
        "parts": {name: _part(part) for name, part in parts.items()},
        "held_out": len(embedded.patients),
        **_probed(subject, parts, embedded, labels, settings, views, predict),
    }
    report["site"] = _site(subject, parts, embedded, settings, views)
    report["missing"] = _missing(subject, parts.get("train"), embedded, labels, settings) if settings.missing else {}
    report["projections"] = _projections(subject, embedded)
    few = labels if settings.labels else labels[:_MOST_LABELS]
    context = Context(subject, parts, views, few, predict, settings.expression, settings.seed)
    if len(few) < len(labels):
        logger.warning("analyses use the labels %s; name others to use them", ", ".join(few))
    report["analyses"] = run_analyses(context, settings.analyses)
    if len(few) < len(labels):
        context.notes.clear()
        context.note(", ".join(labels[_MOST_LABELS:]), f"only the first {_MOST_LABELS} labels are used; name others")
        report["analyses"]["not_evaluated"]["labels"] = list(context.notes)
    report["external"] = {}
    if external is not None:
        context.notes.clear()
        found = evaluate_external(
            context, *external, labels, settings.time, settings.event, baselines=settings.baselines
        )
        report["external"] = {"cohort": settings.external, **found, "not_evaluated": list(context.notes)}
    return report


def _probed(
    subject: Subject,
    parts: Mapping[str, EmbeddedPatients],
    embedded: EmbeddedPatients,
    labels: Sequence[str],
    settings: EvaluationSettings,
    views: Sequence[Views],
    predict: Callable[[str], LabelPredictions],
) -> dict[str, Any]:
    """The entries "probes", "survival", "probe_patients" and "baselines" of the report."""
    seed, time, event = settings.seed, settings.time, settings.event
    can = bool(views)
    if settings.baselines and not can:
        logger.warning("no baselines: the split has no training patients, or no test patients, of this cohort")
    baselines = settings.baselines and can
    compared: dict[str, Any] = {"retrieval": {}, "probes": {}, "survival": {}}
    if baselines:
        pairs = [pair for pair in subject.model.trained_pairs if set(pair) <= set(subject.modalities)]
        compared["retrieval"] = compare_retrieval(subject.data, parts["test"].pairs, pairs, seed=seed)
    if settings.probes == "held-out" or not can:
        probes = {label: held_out_labels(subject, embedded, label, seed) for label in labels}
        survival = held_out_survival(subject, embedded, time, event, seed)
        where = "held-out"
    else:
        probes = {}
        for label in labels:
            try:
                found = predict(label)
            except SettingsError as exc:
                logger.warning("no probe of %s: %s", label, exc)
                probes[label] = {}
                continue
            probes[label], theirs = label_scores(found, views, seed=seed)
            if theirs:
                compared["probes"][label] = theirs
        survival, compared["survival"] = transferred_survival(
            subject, views, time, event, baselines=baselines, seed=seed
        )
        where = "test"
    return {
        "probe_patients": where,
        "probes": probes,
        "survival": survival,
        "baselines": compared if baselines else {},
    }


def _site(
    subject: Subject,
    parts: Mapping[str, EmbeddedPatients],
    embedded: EmbeddedPatients,
    settings: EvaluationSettings,
    views: Sequence[Views],
) -> dict[str, Any]:
    """Retrieval by site, and probes of the site; {} if the site is known of fewer than two sites' patients."""
    source = settings.site if settings.site is not None else subject.data.settings.site
    sites = sites_of(subject.cohort, source)
    asked = parts.get("test", embedded)
    found = site_retrieval(asked.pairs, sites, seed=settings.seed)
    if found is None:
        return {}
    if found.is_suspicious:
        logger.warning("%s", found.advice())
    out: dict[str, Any] = {"retrieval": found.as_dict(), "probes": {}, "shared": []}
    if views:
        known = {
            name: [sites.get(patient) for patient in subject.data.split[name]] for name in ("train", "val", "test")
        }
        out["shared"] = sorted(set(filter(None, known["train"])) & set(filter(None, known["test"])))
        often = {site for site, count in Counter(known["train"]).items() if site is not None and count > 1}
        try:
            task = LabelTask.of(
                *(np.array([site if site in often else None for site in found], object) for found in known.values())
            )
        except SettingsError as exc:
            logger.info("no probe of the site: %s", exc)  # as with a split by site: no test patient has a known one
            return out
        out["probes"] = {
            name: prediction.scores(settings.seed).as_dict()
            for name, prediction in our_predictions(task, views).items()
        }
    return out


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


def _common(pair: PairEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the patients on both sides of a pair, one per patient."""
    right = {patient: at for at, patient in enumerate(pair.right_patients)}
    both = [(at, right[p]) for at, p in enumerate(pair.left_patients) if p in right]
    return pair.u[[a for a, _ in both]], pair.v[[b for _, b in both]]


def _subsets(values: Mapping[Subset, Any]) -> dict[str, Any]:
    return {"subsets": {"+".join(subset): value for subset, value in values.items()}}
