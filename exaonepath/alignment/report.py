"""Write reports: JSON with hashes of its inputs, a readable table, figures, and exports of embeddings."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.analyses.figures import draw_analyses
from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.figures import draw_attention, draw_missing, draw_projections, draw_retrieval
from exaonepath.alignment.probing import embeddings_of
from exaonepath.alignment.report_table import table
from exaonepath.alignment.subject import Subject, as_subject
from exaonepath.encoders.attention_map import AttentionMap, attention_map
from exaonepath.errors import SettingsError
from exaonepath.exchange.patho_bench import write_pooled
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import atomic_path, ensure_folder, write_text
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_ATTENTION_QUERIES = 2
_ATTENTION_PATCHES = 3000  # more squares cannot be distinguished in a picture


def write_report(
    subject: Subject | str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: EvaluationSettings | None = None,
    *,
    cohort: str | os.PathLike[str] | None = None,
    split: str | os.PathLike[str] | None = None,
    figures: bool = True,
) -> dict[str, Any]:
    """Evaluate and write `<out>/evaluation.json`, `evaluation.md`, `expression.csv` and the figures.

    Args:
        subject, settings, cohort, split: as for `evaluate`.
        out: the folder of the report.
        figures: draw pictures, which takes matplotlib.

    Returns:
        The report.

    Raises:
        SettingsError: the cohort lacks a label. OutputError: the folder cannot be written.
        MissingDependencyError: figures need matplotlib, which is not installed.
    """
    settings = settings or EvaluationSettings()
    subject = as_subject(subject, cohort, split)
    out = ensure_folder(out)
    report = {"provenance": provenance(subject, asdict(settings)), **evaluate(subject, settings)}
    genes = _write_genes(report, out / "expression.csv")
    write_text(out / "evaluation.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "evaluation.md", table(report))
    if figures:
        for part in report["parts"]:
            if report["parts"][part]["retrieval"]:
                draw_retrieval(report, part, out / f"retrieval-{part}.png")
        if report["missing"]:
            draw_missing(report, out / "missing.png")
        if report["projections"]["pairs"]:
            draw_projections(report, out / "projections.png")
        draw_attention_of(subject, out / "attention.png")
        draw_analyses(genes, out)
    return report


def _write_genes(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """Move the columns of single genes from the report to a CSV file; returns the report with them, for the figures."""
    found = report["analyses"].get("expression")
    if found is None:
        path.unlink(missing_ok=True)  # of an earlier evaluation into this folder
        return report
    analyses = {**report["analyses"], "expression": dict(found)}
    columns = found.pop("genes")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    found["file"] = path.name
    return {**report, "analyses": analyses}


def provenance(subject: Subject, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Origin of a report: hashes of the settings and the cohort, and the origin of the model."""
    return {
        "settings": dict(settings),
        "settings_hash": settings_hash(json.loads(json.dumps(settings))),
        "cohort_hash": subject.cohort.fingerprint,
        "model": dict(subject.model.config.provenance),
        "model_used": subject.used,
        "split_known": subject.seen,
        "exaonepath_version": __version__,
    }


def draw_attention_of(subject: Subject, path: Path, patient: str | None = None) -> list[AttentionMap]:
    """Draw the attention of two patches in every block, on the first slide of a held-out patient with two fragments.

    Returns:
        The maps; empty, and nothing is drawn, if there is no such slide.

    Raises:
        SettingsError: the given patient has no slide that can be drawn.
    """
    if "wsi" not in subject.model.modalities or not hasattr(subject.model, "slide_encoder"):
        return []
    for candidate in subject.held_out if patient is None else (patient,):
        for _, batch in subject.data.evaluation_batches([candidate], [0], 1):
            slides = batch.slides
            if slides is None or slides.coords is None or slides.contour_index is None:
                continue
            n = slides.lengths[0]
            contour = slides.contour_index[:n]
            if n > _ATTENTION_PATCHES or len(contour.unique()) < 2:
                continue
            features, coords = slides.features[:n], slides.coords[:n]
            # The patches nearest to the middle of the first fragments.
            queries = []
            for name in contour.unique().tolist()[:_ATTENTION_QUERIES]:
                rows = (contour == name).nonzero().view(-1)
                middle = coords[rows].double().mean(0)
                queries.append(int(rows[(coords[rows] - middle).norm(dim=1).argmin()]))
            mode = subject.model.config.rope_mode
            device = subject.model.loss_device
            maps = attention_map(
                subject.model.slide_encoder,
                features.to(device),
                None if mode in ("no_rotation", "off") else coords.to(device),
                None if mode in ("no_fragments", "off") else contour.to(device),
                queries,
            )
            title = f"Attention of two patches, slide of {candidate}"
            draw_attention(maps, coords.numpy(), contour.numpy(), path, title=title)
            return maps
    if patient is not None:
        raise SettingsError(f"{patient} has no slide of two fragments and at most {_ATTENTION_PATCHES} patches")
    logger.warning("no held-out slide has two fragments and at most %d patches: no attention map", _ATTENTION_PATCHES)
    return []


def export_embeddings(subject: Subject, out: Path) -> list[Path]:
    """Write patient embeddings in the layout of Patho-Bench: `<out>/<modality or fused>/<patient>.h5`."""
    embedded = subject.embed(subject.cohort.patients)
    written: list[Path] = []
    note = {"cohort_hash": subject.cohort.fingerprint, "exaonepath_version": __version__}
    for name, (rows, x) in embeddings_of(subject, embedded).items():
        patients = np.asarray(embedded.patients)[rows]
        written += write_pooled(out / name, dict(zip(patients.tolist(), x, strict=True)), embedding=name, **note)
    return written
