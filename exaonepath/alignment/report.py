"""Write reports: JSON with hashes of its inputs, a readable table, figures, and exports of embeddings."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.evaluate import EvaluationSettings, embeddings_of, evaluate
from exaonepath.alignment.figures import draw_attention, draw_missing, draw_projections, draw_retrieval
from exaonepath.alignment.metrics.exports import export_pooled
from exaonepath.alignment.subject import Subject, as_subject
from exaonepath.encoders.attention_map import AttentionMap, attention_map
from exaonepath.errors import SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import ensure_folder, write_text
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
    """Evaluate and write `<out>/evaluation.json`, `evaluation.md` and the figures.

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
    return report


def provenance(subject: Subject, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Origin of a report: hashes of the settings and the cohort, and the origin of the model."""
    return {
        "settings": dict(settings),
        "settings_hash": settings_hash(json.loads(json.dumps(settings))),
        "cohort_hash": subject.cohort.fingerprint,
        "model": dict(subject.model.config.provenance),
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
        written += export_pooled(out / name, dict(zip(patients.tolist(), x, strict=True)), embedding=name, **note)
    return written


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", ""]
    known = report["provenance"]["split_known"]
    lines += [
        f"{report['held_out']} patients held out from training."
        if known
        else f"{report['held_out']} patients; as far as is known, none of them is in the training data of the model.",
        "Intervals: 95 %, bootstrap over patients.",
        "",
    ]
    for part, found in report["parts"].items():
        if not found["retrieval"]:
            continue
        lines += [f"## Retrieval, {part} ({found['patients']} patients)", ""]
        lines += _rows(
            ("direction", "recall@1", "chance", "recall@5", "recall@10", "median rank", "of"),
            [
                (
                    name.replace("->", " to "),
                    _interval(score["recall"]["1"]),
                    _number(score["chance"]["1"]),
                    _interval(score["recall"]["5"]),
                    _interval(score["recall"]["10"]),
                    _number(score["median_rank"], 1),
                    str(score["n_gallery"]),
                )
                for name, score in found["retrieval"].items()
            ],
        )
    for label, found in report["probes"].items():
        lines += [
            f"## {label} (held-out patients; 5 folds, fewer if a class has fewer patients)",
            "",
        ]
        lines += _rows(
            ("embedding", "linear: balanced accuracy", "linear: AUROC", "kNN: balanced accuracy", "chance", "n"),
            [
                (
                    name,
                    _interval(score["linear"]["balanced_accuracy"]),
                    _interval(score["linear"]["auroc"]),
                    _interval(score["knn"]["balanced_accuracy"]),
                    _number(score["linear"]["chance"]),
                    str(score["linear"]["n"]),
                )
                for name, score in found.items()
            ],
        )
    for label, found in (report["missing"] or {"probes": {}})["probes"].items():
        if "gain_over_single" in found:
            lines += [f"## {label}: all modalities compared with each alone (patients with all modalities)", ""]
            alone = found["refitted"]["subsets"]
            lines += _rows(
                ("modality", "balanced accuracy alone", "gain with all modalities (paired)"),
                [(name, _interval(alone[name]), _interval(gain)) for name, gain in found["gain_over_single"].items()],
            )
    if report["survival"]:
        lines += ["## Survival (Cox probe, cross-validated; 0.5 is chance)", ""]
        lines += _rows(
            ("embedding", "c-index", "patients", "events"),
            [(name, _interval(s["c_index"]), str(s["n"]), str(s["events"])) for name, s in report["survival"].items()],
        )
    return "\n".join(lines).rstrip() + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def _interval(estimate: Mapping[str, Any]) -> str:
    value = _number(estimate["value"])
    return value if estimate["low"] is None else f"{value} [{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
