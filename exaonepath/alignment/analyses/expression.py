"""Expression of single genes, predicted from the slide."""

from __future__ import annotations

from typing import Any

import numpy as np

from exaonepath.alignment.analyses.context import Context
from exaonepath.alignment.baselines.profiles import read_profiles
from exaonepath.alignment.metrics.expression import FEWEST_PATIENTS, GeneScores, fit_ridge_map, score_genes
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.subject import Subject
from exaonepath.alignment.training.validation import EmbeddedPatients
from exaonepath.errors import SettingsError

OURS, MEAN_PATCHES, MEAN = "slide embedding", "mean patch features", "mean of training patients"
_FEWEST_TRAINING = 10
_TOP = 10
_MOST_FEATURES = 50_000  # resamples of so many take 0.4 GB and two minutes


def expression(context: Context) -> dict[str, Any]:
    """Ridge regression of every gene on the slide's embedding and on its mean patch features, and the mean predictor.

    The entry "genes" holds columns with one value per gene; the report writes them to a file of their own.
    """
    context.need_transfer()
    subject, target = context.subject, context.expression
    if WSI not in subject.modalities:
        raise SettingsError("the cohort has no slides that the model reads")
    if target == WSI or target not in subject.modalities:
        raise SettingsError(f"the model and the cohort have no {target}; they have {', '.join(subject.modalities)}")
    genes = subject.data.standardizer.scalings[target].features
    if len(genes) > _MOST_FEATURES:
        raise SettingsError(
            f"{target} has {len(genes):,} features, more than {_MOST_FEATURES:,}; train with data.top_variance to "
            "have those that vary most"
        )
    parts = {
        name: _part(subject, context.parts[name], target) for name in ("train", "val", "test") if name in context.parts
    }
    if len(parts["train"]["genes"]) < _FEWEST_TRAINING or len(parts["test"]["genes"]) < FEWEST_PATIENTS:
        raise SettingsError(
            f"{len(parts['train']['genes'])} training and {len(parts['test']['genes'])} test patients have a slide and "
            f"{target}; {_FEWEST_TRAINING} and {FEWEST_PATIENTS} are needed"
        )
    train, test = parts["train"], parts["test"]
    predictions = []
    for view in (OURS, MEAN_PATCHES):
        chosen = (parts["val"][view], parts["val"]["genes"]) if "val" in parts else None
        predictions.append(fit_ridge_map((train[view], train["genes"]), chosen)(test[view]))
    measured = ~np.isnan(train["genes"])
    mean = np.where(measured, train["genes"], 0).sum(0) / np.maximum(measured.sum(0), 1)
    predictions.append(np.broadcast_to(mean, test["genes"].shape))
    scores, differences = score_genes(predictions, test["genes"], genes, seed=context.seed)
    if undefined := scores[0].as_dict()["not_defined"]:
        context.note(f"{undefined} of {len(genes)} features of {target}", "they are constant among the test patients")
    methods = {name: found.as_dict() for name, found in zip((OURS, MEAN_PATCHES, MEAN), scores, strict=True)}
    for name, difference in zip((MEAN_PATCHES, MEAN), differences, strict=True):
        methods[name]["difference"] = difference.as_dict()
    columns = _columns(scores[0], scores[1])
    return {
        "target": target,
        "train": len(train["genes"]),
        "test": len(test["genes"]),
        "methods": methods,
        "better": int(np.nansum(scores[0].pearson > scores[1].pearson)),
        "top": _top(columns),
        "genes": columns,
    }


def _part(subject: Subject, embedded: EmbeddedPatients, target: str) -> dict[str, np.ndarray]:
    """Inputs and genes of the patients of a part who have a slide and the target."""
    rows = np.flatnonzero(embedded.available[WSI] & embedded.available[target])
    patients = [embedded.patients[row] for row in rows]
    return {
        OURS: subject.fuse(embedded, (WSI,))[rows],
        MEAN_PATCHES: read_profiles(subject.data, patients, WSI).values,
        "genes": measured_rows(subject, patients, target),
    }


def measured_rows(subject: Subject, patients: list[str], modality: str) -> np.ndarray:
    """Standardised values float64 [n, F] of patients who have the modality; NaN if a value was not measured."""
    aligned = subject.data.standardized_rows(modality)
    place = {patient: at for at, patient in enumerate(aligned.table.patients)}
    rows = [place[patient] for patient in patients]
    values = aligned.rows(rows).astype(np.float64)
    if len(rows):
        values[np.isnan(aligned.table.rows(rows)[:, aligned.columns]) | (aligned.columns < 0)] = np.nan
    return values


def _columns(ours: GeneScores, theirs: GeneScores) -> dict[str, list[Any]]:
    """One list per column, sorted by falling correlation."""
    order = np.argsort(-np.nan_to_num(ours.pearson, nan=-2.0), kind="stable")
    columns: dict[str, list[Any]] = {"gene": [ours.genes[at] for at in order], "patients": ours.n[order].tolist()}
    for suffix, scores in (("", ours), ("_mean_patches", theirs)):
        for name in ("pearson", "low", "high", "spearman", "spearman_low", "spearman_high", "p", "q"):
            key = f"pearson_{name}" if name in ("low", "high") else name
            values = getattr(scores, name)[order]
            columns[key + suffix] = [None if np.isnan(value) else float(value) for value in values]
    return columns


def _top(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [{name: values[at] for name, values in columns.items()} for at in range(min(_TOP, len(columns["gene"])))]
