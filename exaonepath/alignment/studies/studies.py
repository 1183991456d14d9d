"""Run studies and write their files: runs, `<study>.json`, and a figure for each study."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.figures import draw_missing, draw_outcome, draw_projections
from exaonepath.alignment.metrics.intervals import Estimate, across_draws
from exaonepath.alignment.report import draw_attention_of, provenance
from exaonepath.alignment.studies.ablations import (
    Outcome,
    StudyBase,
    run_folder,
    run_study,
    run_variant,
    with_overrides,
)
from exaonepath.alignment.studies.outcome_table import outcome_table
from exaonepath.alignment.studies.questions import STUDIES
from exaonepath.alignment.subject import Subject, open_subject
from exaonepath.errors import SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import ensure_folder, write_text

Report = Callable[[str], None]

# Measures in the figure of a study, in addition to those of labels.
_SHOWN = {
    "frope": ("recall@1 wsi x rna",),
    "loss": ("recall@1, all pairs", "recall@1, pairs of the slide", "recall@1 wsi x rna"),
    "frozen": ("recall@1, all pairs", "recall@1 wsi x rna"),
    "modalities": ("recall@1 wsi x rna", "recall@1 rna x methylation", "recall@1 snp x cnv"),
}


def run_and_draw(
    name: str, bases: Sequence[StudyBase], out: Path, *, seeds: Sequence[int], labels: Sequence[str], report: Report
) -> Path:
    """Run one of `STUDIES` (`run_study`) on every draw of the cohort; write `<name>.json`, a table `<name>.md`, and the
    figure, whose path is returned."""
    ensure_folder(out)
    outcome = run_study(STUDIES[name](bases[0].modalities), bases, out, seeds=seeds, labels=labels, report=report)
    made_from: dict[str, Any] = {
        "bases": [{"base": base.settings.as_dict(), "cohort_hash": base.cohort_hash} for base in bases],
        "seeds": list(seeds),
        "labels": list(labels),
    }
    found = {"settings": made_from, "settings_hash": settings_hash(made_from), **outcome.as_dict()}
    write_text(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    write_text(out / f"{name}.md", outcome_table(outcome, shown(outcome)))
    return draw_outcome(outcome, shown(outcome), out / f"ablation-{name}.png")


def shown(outcome: Outcome) -> list[str]:
    """Measures in the figure of a study: those of its question, then the probes; if there are none, all measures."""
    measured = outcome.measures()
    chosen = [m for m in _SHOWN.get(outcome.study.name, ()) if m in measured]
    probes = [m for m in measured if " from " in m]
    if outcome.study.name in ("loss", "modalities"):
        probes = [m for m in probes if m.endswith("from all modalities")]
    return [*chosen, *probes] or measured


def run_analysis(
    name: str, bases: Sequence[StudyBase], out: Path, *, seeds: Sequence[int], labels: Sequence[str], report: Report
) -> Path:
    """Analyse the base model of the first seed: "missing" or "projections" on every draw of the cohort, "attention" on
    the first one; writes as `run_and_draw`.

    Raises:
        SettingsError: the cohort has nothing to draw (no patient with every modality, no slide of two fragments).
    """
    ensure_folder(out / "runs")
    target = out / f"ablation-{name}.png"
    if name == "attention":
        _draw_attention(_base_model(bases[0], out, seeds[0], labels), out / "attention.json", target)
        return target
    wanted = EvaluationSettings(labels=tuple(labels), missing=name == "missing", analyses=(), baselines=False)
    found: list[dict[str, Any]] = []
    origin: list[dict[str, Any]] = []
    for draw, base in enumerate(bases):
        subject = _base_model(base, out, seeds[0], labels)
        measured = evaluate(subject, wanted)[name]
        if not measured:
            raise SettingsError(f"nothing to draw for {name}: too few held-out patients have every modality")
        found.append(measured)
        origin.append(provenance(subject, asdict(wanted)))
        of = f", draw {draw}" if len(bases) > 1 else ""
        report(f"{name}{of}: {len(subject.held_out)} held-out patients")
    stored = {"draws": len(bases), "runs": origin, "of_draws": found, name: average_over_draws(found)}
    write_text(out / f"{name}.json", json.dumps(stored, indent=1) + "\n")
    (draw_missing if name == "missing" else draw_projections)(stored, target)
    return target


def _base_model(base: StudyBase, out: Path, seed: int, labels: Sequence[str]) -> Subject:
    """The trained (or found) base model of a draw."""
    run_variant(base, {}, seed, out / "runs", labels)
    settings = with_overrides(base.settings, {"run.seed": seed})
    return open_subject(run_folder(base, settings, out / "runs"), device=settings.run.device)


def _draw_attention(subject: Subject, stored: Path, target: Path) -> None:
    maps = draw_attention_of(subject, target)
    if not maps:
        raise SettingsError("no held-out slide has two fragments or more: there is no attention to draw")
    crossing = [
        {
            "block": found.block,
            "restricted": found.restricted,
            "queries": found.queries.tolist(),
            "to_prefix": found.prefix.mean(1).sum(1).tolist(),
            "largest": found.patches.amax((1, 2)).tolist(),
        }
        for found in maps
    ]
    write_text(stored, json.dumps({**provenance(subject, {}), "blocks": crossing}, indent=1) + "\n")


def average_over_draws(found: Sequence[Any]) -> Any:
    """Means of results of the same shape: numbers, lists and dictionaries of them, and estimates with their intervals
    (`across_draws`). Keys that not all draws have are left out, and so are numbers of a list after the end of the
    shortest one: fewer patients have fewer singular values. Other values stay if they are the same, else null."""
    first = found[0]
    if len(found) == 1:
        return first
    if all(isinstance(one, Mapping) for one in found):
        if set(first) == {"value", "low", "high", "n"}:
            return across_draws([_estimate(one) for one in found]).as_dict()
        return {key: average_over_draws([one[key] for one in found]) for key in first if all(key in x for x in found)}
    if all(isinstance(one, list | tuple) for one in found):
        same = len({len(one) for one in found}) == 1
        if same or all(_is_number(value) for one in found for value in one):
            return [average_over_draws(values) for values in zip(*found, strict=False)]
    if all(_is_number(one) for one in found):
        return float(np.mean(found))
    return first if all(one == first for one in found) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _estimate(stored: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if stored[key] is None else stored[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, stored["n"])
