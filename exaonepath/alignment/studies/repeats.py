"""Repeated splits: train on several random splits of a cohort, and average what is found, baselines included.

One split is one draw of test patients, and of training patients: on a small cohort, another split can turn a result
around. The training patients of different splits overlap, so the results are not independent, and their standard error
over splits is too small. It is corrected as by Nadeau & Bengio (2003): the variance over k splits is multiplied with
1 / k + test patients / training patients instead of 1 / k.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.metrics.intervals import LEVEL, Estimate
from exaonepath.alignment.studies.ablations import StudyBase, run_folder
from exaonepath.alignment.subject import open_subject
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import TrainSettings
from exaonepath.errors import SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import ensure_folder, write_text

OURS = "ours"
# (measure, method) to the value of one split.
Values = dict[tuple[str, str], float]


def corrected_interval(values: Sequence[float], share: float) -> Estimate:
    """Mean over random splits, with Student's interval for overlapping training patients (Nadeau & Bengio 2003).

    Args:
        values: of each split.
        share: test patients / training patients of a split; 0: independent values.

    Returns:
        The mean; no interval (NaN) for a single split.
    """
    numbers = np.asarray(values, np.float64)
    k = len(numbers)
    if not k:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(numbers.mean())
    if k < 2:
        return Estimate(mean, math.nan, math.nan, k)
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, k - 1) * numbers.std(ddof=1) * math.sqrt(1 / k + share))
    return Estimate(mean, mean - half, mean + half, k)


def repeat(
    settings: TrainSettings,
    out: Path,
    *,
    splits: int,
    evaluation: EvaluationSettings | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and evaluate on random splits, and write `<out>/repeats.json` and `<out>/repeats.md`.

    The splits have the seeds `data.split_seed`, and the numbers after it. Finished runs are not trained again, stopped
    ones are resumed.

    Args:
        settings: settings of the run, without a split of their own.
        out: folder; runs are in `<out>/runs`.
        splits: their number.
        evaluation: settings of the evaluation; curves over missing modalities are left out.
        report: called with a line for each split.

    Returns:
        The result, of plain JSON types.

    Raises:
        SettingsError: the settings name a split, there are fewer than two splits, or there are no test patients.
    """
    if settings.data.split is not None:
        raise SettingsError("repeated splits are random: remove data.split")
    if splits < 2:
        raise SettingsError(f"repeated splits need two or more, got {splits}")
    if not settings.data.test_share:
        raise SettingsError("repeated splits need test patients: set data.test_share")
    wanted = replace(evaluation or EvaluationSettings(), missing=False)
    ensure_folder(out / "runs")
    found, shares = [], []
    for number in range(splits):
        seed = settings.data.split_seed + number
        own = replace(settings, data=replace(settings.data, split_seed=seed))
        base = StudyBase.open(own, out, wanted.labels)
        folder = run_folder(base, base.settings, out / "runs")
        measured = _evaluated(base.settings, folder, wanted)
        parts = measured["parts"]
        shares.append(parts["test"]["patients"] / parts["train"]["patients"])
        found.append(values_of(measured))
        if report is not None:
            report(f"split {seed}: " + ", ".join(f"{name} {value:.3f}" for (name, by), value in found[-1].items()
                                                if by == OURS and name.startswith("mean")))  # fmt: skip
    made_from = {"settings": settings.as_dict(), "evaluation": asdict(wanted), "splits": splits}
    made_from = json.loads(json.dumps(made_from))
    result = {
        "settings": made_from,
        "settings_hash": settings_hash(made_from),
        "splits": splits,
        "test_to_train": float(np.mean(shares)),
        "measures": summarize(found, float(np.mean(shares))),
    }
    write_text(out / "repeats.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "repeats.md", repeats_table(result))
    return result


def _evaluated(settings: TrainSettings, folder: Path, wanted: EvaluationSettings) -> dict[str, Any]:
    """Train (or find) a run and evaluate (or read) it."""
    if not (folder / "model").is_dir():
        train(settings, folder)
        if not (folder / "model").is_dir():
            raise KeyboardInterrupt  # stopped by a signal, with a checkpoint to resume from
    stored, key = folder / "repeat.json", settings_hash(json.loads(json.dumps(asdict(wanted))))
    if stored.is_file():
        known: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        if known.get("key") == key:
            return known
    found = {"key": key, **evaluate(open_subject(folder, device=settings.run.device), wanted)}
    write_text(stored, json.dumps(found) + "\n")
    return found


def values_of(report: Mapping[str, Any]) -> Values:
    """The numbers of the test patients in a report of `evaluate`, ours and those of the baselines."""
    out: Values = {}
    retrieval = report["parts"]["test"]["retrieval"]
    baselines = report["baselines"] or {"retrieval": {}, "probes": {}, "survival": {}}
    by_method = {OURS: {name: score["recall"]["1"]["value"] for name, score in retrieval.items()}}
    for method, found in baselines["retrieval"].items():
        by_method[method] = {name: score["recall"]["1"]["value"] for name, score in found.items()}
    for method, recalls in by_method.items():
        pairs: dict[str, list[float]] = {}
        for direction, recall in recalls.items():
            pairs.setdefault(" x ".join(sorted(direction.split("->"))), []).append(recall)
        for pair, both in pairs.items():
            out[f"recall@1 {pair}", method] = float(np.mean(both))
        if pairs:
            out["mean recall@1", method] = float(np.mean(list(recalls.values())))
    for label, probes in report["probes"].items():
        for view, scores in probes.items():
            if (value := _linear(scores)) is not None:
                out[f"{label} from {view}", OURS] = value
        for method, scores in baselines["probes"].get(label, {}).items():
            if (value := scores["balanced_accuracy"]["value"]) is not None:
                out[f"{label} from {scores['compared_with']}", method] = value
    for view, scores in report["survival"].items():
        if (value := scores["c_index"]["value"]) is not None:
            out[f"survival from {view}", OURS] = value
    for method, scores in baselines["survival"].items():
        if (value := scores["c_index"]["value"]) is not None:
            out[f"survival from {scores['compared_with']}", method] = value
    return out


def _linear(scores: Mapping[str, Any]) -> float | None:
    value: float | None = scores["linear"]["balanced_accuracy"]["value"]
    return value


def summarize(found: Sequence[Values], share: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure to method to its mean and, for baselines, ours minus theirs, over the splits that have both.

    Args:
        found: results of `values_of`, one for each split.
        share: test patients / training patients; 0 if no patient is in two of them.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for measure, method in dict.fromkeys(key for values in found for key in values):
        known = [values[measure, method] for values in found if (measure, method) in values]
        value = corrected_interval(known, share)
        # All measures are shares, and Student's interval does not know that.
        value = replace(value, low=max(value.low, 0.0), high=min(value.high, 1.0))
        entry: dict[str, Any] = {"value": value.as_dict(), "splits": len(known)}
        both = [
            values[measure, OURS] - values[measure, method]
            for values in found
            if (measure, method) in values and (measure, OURS) in values
        ]
        if method != OURS and both:
            entry["difference"] = corrected_interval(both, share).as_dict()
        out.setdefault(measure, {})[method] = entry
    return out


def repeats_table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Repeated splits",
        "",
        f"{result['splits']} random splits of the cohort, with a training on each; means over splits. Intervals: 95 %, "
        "corrected for overlapping training patients (Nadeau & Bengio 2003). Differences: ours minus the baseline.",
        "",
    ]
    return "\n".join(lines) + "\n" + measures_table(result["measures"])


def measures_table(measures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The result of `summarize` as a table in Markdown."""
    lines = ["| measure | method | mean | ours - theirs |", "|---|---|---|---|", *_rows(measures)]
    return "\n".join(lines) + "\n"


def _rows(measures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    for measure, methods in measures.items():
        for method, entry in methods.items():
            difference = entry.get("difference")
            shown = _shown(difference, "+.3f") if difference else ""
            yield f"| {measure} | {method} | {_shown(entry['value'], '.3f')} | {shown} |"


def _shown(estimate: Mapping[str, Any], form: str) -> str:
    if estimate["low"] is None:
        return format(estimate["value"], form)
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
