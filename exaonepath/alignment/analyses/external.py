"""An external cohort: the model and the baselines of the training patients, on all patients of another cohort."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exaonepath.alignment.analyses.context import NO_TRANSFER, Context
from exaonepath.alignment.baselines.comparison import compare_retrieval
from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.feature_match import FeatureMatch
from exaonepath.alignment.metrics.retrieval import cross_modal_retrieval
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.probing import (
    embeddings_of,
    external_part,
    label_scores,
    predict_labels,
    read_follow_up,
    transferred_survival,
)
from exaonepath.alignment.subject import Subject, open_cohort
from exaonepath.alignment.training.data import TrainingData
from exaonepath.errors import SettingsError
from exaonepath.text import few

logger = logging.getLogger(__name__)


def open_external(subject: Subject, cohort: Path) -> tuple[Subject, list[str]]:
    """Another cohort for the model of a subject, all of it to be tested; and patients that were left out.

    Features are matched by name; those that the cohort lacks count as the mean of the training patients. Patients with
    the id of a patient of the subject's cohort are left out, since they may be the same persons.

    Raises:
        SettingsError, DataFileError, WeightsError: see `open_subject`.
    """
    known, settings = open_cohort(subject.model, None, cohort, by_name=True)
    own = set(subject.cohort.patients)
    shared = sorted(own & set(known.patients))
    test = tuple(patient for patient in known.patients if patient not in own)
    if not test:
        raise SettingsError(f"{cohort}: all its patients are patients of the cohort of the run")
    if shared:
        logger.warning("%d patients of %s have ids of the run's cohort and are left out: %s", len(shared), cohort,
                       few(shared))  # fmt: skip
        known = known.subset(test)
    split = Split({"train": (), "val": (), "test": test})
    data = TrainingData(known, split, subject.data.standardizer, settings, subject.data.seed)
    return replace(subject, data=data, seen=True), shared


def evaluate_external(
    context: Context,
    external: Subject,
    shared: Sequence[str],
    labels: Sequence[str],
    time: str,
    event: str,
    *,
    baselines: bool,
) -> dict[str, Any]:
    """Retrieval, labels and survival of another cohort; fitted on the training patients of the context.

    Args:
        context: the model, its cohort and split.
        external, shared: see `open_external`.
        labels, time, event: columns; those that the other cohort lacks are noted.
        baselines: whether to fit baselines.
    """
    subject, seed = context.subject, context.seed
    tested = external.embed(external.data.split["test"])
    names = [name for name in subject.modalities if name in external.modalities]
    out: dict[str, Any] = {
        "cohort_hash": external.cohort.fingerprint,
        "patients": len(tested.patients),
        "left_out": len(shared),
        "available": {name: int(tested.available[name].sum()) for name in external.modalities},
        "features": _features(external),
        "retrieval": {name: score.as_dict() for name, score in cross_modal_retrieval(tested.pairs, seed=seed).items()},
        "probes": {},
        "survival": {},
        "baselines": {"retrieval": {}, "probes": {}, "survival": {}},
    }
    if absent := [name for name in subject.modalities if name not in names]:
        context.note(", ".join(absent), "the external cohort does not have it; fused embeddings are without it")
    if not context.views:
        context.note("labels, survival and baselines", NO_TRANSFER)
        return out
    if baselines and tested.pairs:
        pairs = [(pair.left, pair.right) for pair in tested.pairs if {pair.left, pair.right} <= set(names)]
        out["baselines"]["retrieval"] = compare_retrieval(
            subject.data, tested.pairs, pairs, test=external_part(external), seed=seed
        )
    views = [context.views[0], context.views[1], embeddings_of(external, tested)]
    for label in labels:
        if label not in external.cohort.labels:
            context.note(label, "the external cohort has no such column")
            continue
        try:
            found = predict_labels(subject, views, label, baselines=baselines, external=external)
        except SettingsError as exc:
            context.note(label, exc)
            continue
        out["probes"][label], out["baselines"]["probes"][label] = label_scores(found, views, seed=seed)
        values = external.cohort.labels[label].reindex(list(tested.patients)).dropna().astype(str)
        if strange := sorted(set(values) - set(found.task.classes.tolist())):
            context.note(
                f"{label} of {int(values.isin(strange).sum())} external patients",
                f"fewer than two training patients are {few(strange)}",
            )
    try:
        known = [
            read_follow_up(where, where.data.split["test"], time, event) is not None for where in (subject, external)
        ]
        if all(known):
            out["survival"], out["baselines"]["survival"] = transferred_survival(
                subject, views, time, event, baselines=baselines, seed=seed, external=external
            )
        elif known[0]:
            context.note("survival", f"the external cohort has no columns {time} and {event}")
    except SettingsError as exc:
        context.note("survival", exc)
    return out


def _features(external: Subject) -> dict[str, dict[str, Any]]:
    """Modality to the features of the model that the other cohort lacks, and whether its counts have other totals."""
    found = {}
    # Counts per million over other columns than in training are wrong by a factor, which no alignment can correct.
    totals = {
        finding.where: finding.message
        for finding in external.data.standardizer.align(external.cohort)[1].warnings
        if finding.code == "other-totals"
    }
    for name in external.modalities:
        if name == WSI:
            continue
        wanted = external.model.omics_encoder(name).feature_names
        lacking = FeatureMatch.of(wanted, external.cohort.modalities[name].features).lacking
        found[name] = {"of": len(wanted), "missing": len(lacking), "examples": lacking[:5], "totals": totals.get(name)}
    return found
