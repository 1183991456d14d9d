"""Baselines for the model's numbers: on the same test patients, with paired intervals of the differences."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exaonepath.alignment.baselines.abmil import fit_abmil
from exaonepath.alignment.baselines.bags import bags_of
from exaonepath.alignment.baselines.neighbourhood import read_neighbourhoods
from exaonepath.alignment.baselines.profiles import PARTS, CohortPart, Profiles, parts_of, read_profiles
from exaonepath.alignment.baselines.retrieval import baseline_pairs
from exaonepath.alignment.metrics.intervals import Estimate, bootstrap_mean
from exaonepath.alignment.metrics.retrieval import RECALL_AT, PairEmbeddings, rank_queries, retrieval
from exaonepath.alignment.metrics.transfer_probes import (
    LabelTask,
    Prediction,
    linear_prediction,
    paired_difference,
    pca_prediction,
)
from exaonepath.alignment.metrics.transfer_survival import FollowUp, Risk, cox_prediction, risk_difference
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.training.data import TrainingData
from exaonepath.errors import SettingsError

logger = logging.getLogger(__name__)

FUSED = "fused"


def compare_retrieval(
    data: TrainingData,
    ours: Sequence[PairEmbeddings],
    pairs: Sequence[tuple[str, str]],
    *,
    test: CohortPart | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Recall of every baseline, and ours minus theirs.

    Args:
        data: cohort and split; baselines are fitted on its training patients.
        ours: embeddings of the test patients by the model.
        pairs: pairs to compare.
        test: test patients of another cohort; None: those of the split.
        seed: seed of the intervals.

    Returns:
        Method to "a->b" to {"recall": level to estimate, "difference": level to estimate}, plain JSON types.
    """
    names = sorted({name for pair in pairs for name in pair})
    parts = {
        part: {name: read_profiles(chosen.data, chosen.patients, name) for name in names}
        for part, chosen in parts_of(data, test).items()
    }
    directions = {}
    for pair in ours:
        directions[f"{pair.left}->{pair.right}"] = pair
        directions[f"{pair.right}->{pair.left}"] = PairEmbeddings(
            pair.right, pair.left, pair.v, pair.u, pair.right_patients, pair.left_patients
        )
    out: dict[str, dict[str, Any]] = {}
    for method, found in baseline_pairs(parts["train"], parts["val"], parts["test"], pairs).items():
        for direction, theirs in found.items():
            if direction in directions:
                out.setdefault(method, {})[direction] = _compare(directions[direction], theirs, seed)
    return out


def _compare(ours: PairEmbeddings, theirs: PairEmbeddings, seed: int) -> dict[str, Any]:
    scores = retrieval(theirs.u, theirs.v, theirs.left_patients, theirs.right_patients, seed=seed)
    return {
        "recall": {str(k): value.as_dict() for k, value in scores.recall.items()},
        "difference": {str(k): value.as_dict() for k, value in recall_difference(ours, theirs, seed=seed).items()},
    }


def recall_difference(ours: PairEmbeddings, theirs: PairEmbeddings, *, seed: int = 0) -> dict[int, Estimate]:
    """Level k to recall@k of `ours` minus `theirs`, left to right; the interval is paired over patients.

    Raises:
        SettingsError: the two do not have the same query patients.
    """
    ranks, queries = [], []
    for pair in (ours, theirs):
        found = rank_queries(pair.u, pair.v, pair.left_patients, pair.right_patients)
        patients = np.asarray(pair.left_patients)[found.query]
        order = np.argsort(patients, kind="stable")
        ranks.append({k: hits[order] for k, hits in found.hits.items()})
        queries.append(patients[order])
    if not np.array_equal(queries[0], queries[1]):
        raise SettingsError("a paired difference needs the same query patients on both sides")
    return {k: bootstrap_mean(ranks[0][k] - ranks[1][k], queries[0], seed=seed) for k in RECALL_AT}


def label_baselines(
    data: TrainingData, modalities: Sequence[str], task: LabelTask, *, test: CohortPart | None = None, seed: int = 0
) -> dict[str, tuple[str, Prediction]]:
    """Predictions of a label by simple methods: name to (what of ours it is compared with, the prediction).

    Principal components and logistic regression on each modality and on all together; for slides, the same on the mean
    of the patch features, attention MIL on the patches, and logistic regression on statistics of neighbouring patches.
    `test`: see `compare_retrieval`.
    """
    parts = parts_of(data, test)
    found: dict[str, tuple[str, Prediction]] = {}
    blocks: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for name in modalities:
        profiles = {part: whole_profiles(chosen, name) for part, chosen in parts.items()}
        values, flags = ([profiles[part][k] for part in PARTS] for k in (0, 1))
        centred = standardised(values, flags)
        for part, block in zip(PARTS, centred, strict=True):
            blocks[part].append(block / np.sqrt(max(block.shape[1], 1)))
        try:
            own = task.restricted(flags)
        except SettingsError as exc:
            logger.warning("no baseline from %s: %s", name, exc)
            continue
        method = "mean patch features + logistic regression" if name == WSI else f"PCA + logistic regression ({name})"
        found[method] = name, pca_prediction(own, *centred)
        if name == WSI:
            found["attention MIL (ABMIL)"] = WSI, _abmil(parts, own, seed)
            found |= _neighbourhood(task, parts)
    if len(modalities) > 1:
        joined = [np.concatenate(blocks[part], 1) for part in PARTS]
        found["PCA + logistic regression (all)"] = FUSED, pca_prediction(task, *joined)
    return found


def compare_labels(
    ours: Mapping[str, Prediction], baselines: Mapping[str, tuple[str, Prediction]], *, seed: int = 0
) -> dict[str, Any]:
    """Scores of the baselines of a label, and ours minus theirs; plain JSON types."""
    out: dict[str, Any] = {}
    for method, (name, theirs) in baselines.items():
        out[method] = {"compared_with": name, **theirs.scores(seed).as_dict()}
        if name in ours:
            try:
                out[method]["difference"] = paired_difference(ours[name], theirs, seed).as_dict()
            except SettingsError as exc:
                logger.warning("%s is not compared with %s: %s", method, name, exc)
    return out


def compare_survival(
    data: TrainingData,
    modalities: Sequence[str],
    follow_up: Sequence[FollowUp],
    ours: Mapping[str, Risk],
    *,
    test: CohortPart | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Concordance of Cox models on principal components, and ours minus theirs; plain JSON types."""
    parts = parts_of(data, test)
    blocks: list[list[np.ndarray]] = [[], [], []]
    out: dict[str, Any] = {}
    views: list[tuple[str, str, Sequence[np.ndarray], Sequence[np.ndarray]]] = []
    for name in modalities:
        profiles = {part: whole_profiles(chosen, name) for part, chosen in parts.items()}
        has = [profiles[part][1] for part in PARTS]
        centred = standardised([profiles[part][0] for part in PARTS], has)
        for at, block in enumerate(centred):
            blocks[at].append(block / np.sqrt(max(block.shape[1], 1)))
        method = "mean patch features + Cox" if name == WSI else f"PCA + Cox ({name})"
        views.append((method, name, centred, has))
    if len(modalities) > 1:
        everyone = [np.ones(len(parts[part].patients), bool) for part in PARTS]
        views.append(("PCA + Cox (all)", FUSED, [np.concatenate(block, 1) for block in blocks], everyone))
    for method, name, values, flags in views:
        try:
            theirs = cox_prediction(follow_up, values, flags, pca=True)
            out[method] = {"compared_with": name, **theirs.scores(seed).as_dict()}
            if name in ours:
                out[method]["difference"] = risk_difference(ours[name], theirs, seed).as_dict()
        except SettingsError as exc:
            logger.warning("no survival baseline %s: %s", method, exc)
    return out


def our_predictions(
    task: LabelTask, embeddings: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]]
) -> dict[str, Prediction]:
    """Linear probes of the model's embeddings: name to prediction.

    Args:
        task: the label.
        embeddings: of train, validation and test: name to (rows, embedding [n, d]), see `evaluate.embeddings_of`.
    """
    out = {}
    for name in embeddings[0]:
        try:
            values, flags = whole_parts(name, embeddings, task)
            out[name] = linear_prediction(task.restricted(flags), *values)
        except (SettingsError, KeyError) as exc:
            logger.warning("no probe from %s: %s", name, exc)
    return out


def whole_parts(
    name: str, embeddings: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]], task: LabelTask | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Embeddings of all patients of each part, 0 without the modality, and who has it."""
    values, flags = [], []
    for part in embeddings:
        n = 1 + max((int(rows.max(initial=-1)) for rows, _ in part.values()), default=-1)
        width = embeddings[0][name][1].shape[1]
        whole, has = np.zeros((n, width)), np.zeros(n, bool)
        if name in part:
            rows, x = part[name]
            whole[rows], has[rows] = x, True
        values.append(whole)
        flags.append(has)
    return values, flags


def _abmil(parts: Mapping[str, CohortPart], task: LabelTask, seed: int) -> Prediction:
    bags = {}
    for part, chosen in zip(PARTS, (task.train, task.validation, task.test), strict=True):
        ids = [parts[part].patients[row] for row in chosen.rows]
        found = bags_of(parts[part].data, ids)
        bags[part] = [found[patient] for patient in ids]
    del seed  # the network has a seed of its own; another one would be another baseline
    predict = fit_abmil(
        bags["train"],
        task.train.y,
        (bags["val"], task.validation.y) if task.can_choose() else None,
        len(task.classes),
    )
    return Prediction(task.test.rows, predict(bags["test"]), task.test.y, task.classes)


def _neighbourhood(task: LabelTask, parts: Mapping[str, CohortPart]) -> dict[str, tuple[str, Prediction]]:
    """The baseline from statistics of neighbouring patches; {} if too few slides have coordinates."""
    statistics = read_neighbourhoods(parts)
    values, flags = ([statistics[part][k] for part in PARTS] for k in (0, 1))
    try:
        own = task.restricted(flags)
    except SettingsError as exc:
        logger.warning("no baseline from neighbouring patches: %s", exc)
        return {}
    return {"neighbouring patches + logistic regression": (WSI, linear_prediction(own, *standardised(values, flags)))}


def whole_profiles(part: CohortPart, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Profiles [n, F] of all patients of a part in their order, 0 where one is missing, and who has one."""
    return _all_rows(read_profiles(part.data, part.patients, modality), part.patients)


def _all_rows(profiles: Profiles, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values of all patients in their order, 0 where a profile is missing, and who has one."""
    place = {patient: at for at, patient in enumerate(patients)}
    values, flags = np.zeros((len(patients), profiles.values.shape[1])), np.zeros(len(patients), bool)
    rows = [place[patient] for patient in profiles.patients]
    values[rows], flags[rows] = profiles.values, True
    return values, flags


def standardised(values: Sequence[np.ndarray], flags: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Values in deviations of the training patients who have the modality; the others are 0, its mean."""
    known = values[0][flags[0]]
    mean, scale = (known.mean(0), known.std(0)) if len(known) else (0.0, 1.0)
    scale = np.where(scale > 0, scale, 1)
    return [np.where(has[:, None], (part - mean) / scale, 0) for part, has in zip(values, flags, strict=True)]
