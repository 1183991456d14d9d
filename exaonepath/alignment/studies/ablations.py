"""Run studies: train variants, evaluate them, and store the results.

A study varies a base configuration. Every variant is trained with several seeds into `<out>/runs/<hash of settings and
cohort>`, evaluated on the same held-out patients, and compared over seeds. Studies share runs (above all, those of the
base variant). Stopped runs are resumed: the same command continues until all runs are complete.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.evaluate import require_labels
from exaonepath.alignment.metrics.intervals import Estimate, across_draws, across_runs
from exaonepath.alignment.metrics.probes import fit_probe
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, cross_modal_retrieval, rank_queries
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.probing import column
from exaonepath.alignment.studies.paired import PairedDifference, compare_variants
from exaonepath.alignment.studies.questions import Study
from exaonepath.alignment.subject import Subject, open_subject
from exaonepath.alignment.training.data import load_training_cohort, make_split
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import TrainSettings, build_settings
from exaonepath.errors import SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import ensure_folder, write_text

logger = logging.getLogger(__name__)

_MEASURES = 5  # version of the results of `measure`; stored results with another version are computed again


@dataclass(frozen=True)
class StudyBase:
    """Common properties of all variants of a study.

    Attributes:
        settings: settings of the base variant, with the split of the whole cohort: all variants have the same held-out
            patients.
        modalities: modalities of the base variant.
        cohort_hash: part of every run's name, so that runs on other data are not used.
    """

    settings: TrainSettings
    modalities: tuple[str, ...]
    cohort_hash: str

    @staticmethod
    def open(settings: TrainSettings, out: Path, labels: Sequence[str]) -> StudyBase:
        """Read the cohort and fix the split, which is stored in `<out>/splits`.

        Raises:
            ExaonePathError: the cohort cannot be used, or lacks a label.
        """
        cohort = load_training_cohort(settings.data)
        require_labels(cohort, labels)
        split = make_split(cohort, settings.data)
        folder = ensure_folder(out / "splits")
        key = settings_hash({name: list(ids) for name, ids in split.parts.items()})[:16]
        split.save(folder / f"{key}.json")
        fixed = with_overrides(settings, {"data.split": str(folder / f"{key}.json")})
        return StudyBase(fixed, cohort.held, cohort.fingerprint)


@dataclass(frozen=True)
class Outcome:
    """The results of a study.

    Attributes:
        study: the study. seeds: seeds of its runs.
        values: variant -> measure -> one value per run (None if the variant does not have it): all seeds of the first
            draw of the cohort, then those of the second.
        chance: measure -> value of random guesses.
        intervals: as `values`: the interval of each run over patients.
        patients: variant -> for each run: measure -> patient -> value, whose mean is the value of the run.
        draws: draws of the cohort.
    """

    study: Study
    seeds: tuple[int, ...]
    values: dict[str, dict[str, list[float | None]]]
    chance: dict[str, float]
    intervals: dict[str, dict[str, list[tuple[float, float] | None]]] = field(default_factory=dict)
    patients: dict[str, list[dict[str, dict[str, float]]]] = field(default_factory=dict)
    draws: int = 1

    def differences(self) -> dict[str, dict[str, PairedDifference]]:
        """Variant -> measure -> its difference to the first variant, paired over draws, seeds and patients."""
        return compare_variants(self.patients, self.study.variants[0].name, self.draws) if self.patients else {}

    def estimate(self, variant: str, measure: str) -> Estimate:
        """Mean over runs, with an interval over draws, seeds and patients (`across_draws`)."""
        found = self._over_runs(variant, measure)
        # All measures are shares, and Student's interval does not know that.
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0)) if found.n else found

    def _over_runs(self, variant: str, measure: str) -> Estimate:
        values = self.values[variant].get(measure, [])
        intervals = self.intervals.get(variant, {}).get(measure, [None] * len(values))
        if self.draws > 1 and values and all(value is not None for value in values):
            seeds = len(values) // self.draws
            of_draws = []
            for start in range(0, len(values), seeds):
                known = [found for found in intervals[start : start + seeds] if found is not None]
                of_draws.append(across_runs([v for v in values[start : start + seeds] if v is not None], known))
            return across_draws(of_draws)
        defined = [(value, interval) for value, interval in zip(values, intervals, strict=True) if value is not None]
        known = [interval for _, interval in defined if interval is not None]
        return across_runs([value for value, _ in defined], known if len(known) == len(defined) else ())

    def measures(self) -> list[str]:
        """Names of all measures, in order."""
        return list(dict.fromkeys(m for found in self.values.values() for m in found))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "study": self.study.name,
            "question": self.study.question,
            "seeds": list(self.seeds),
            "draws": self.draws,
            "variants": {v.name: dict(v.overrides) for v in self.study.variants},
            "values": self.values,
            "intervals": self.intervals,
            "chance": self.chance,
            "estimates": {
                name: {m: self.estimate(name, m).as_dict() for m in found} for name, found in self.values.items()
            },
            "differences": {
                name: {m: difference.as_dict() for m, difference in found.items()}
                for name, found in self.differences().items()
            },
        }


def run_study(
    study: Study,
    bases: StudyBase | Sequence[StudyBase],
    out: Path,
    *,
    seeds: Sequence[int],
    labels: Sequence[str],
    report: Callable[[str], None] | None = None,
) -> Outcome:
    """Train the missing runs, evaluate them, and collect the results.

    Args:
        study: one of `STUDIES`, for the base's modalities.
        bases: base of all variants, for each draw of the cohort.
        out: folder; runs are in `<out>/runs`, shared by all studies with this folder.
        seeds: seeds of initial weights and batches; the split is that of the base.
        labels: columns for the probes.
        report: called with a line for each run.

    Raises:
        ExaonePathError: settings are not valid; raised before any training.
    """
    bases = [bases] if isinstance(bases, StudyBase) else list(bases)
    if not seeds or not bases:
        raise SettingsError("a study needs at least one seed and one cohort")
    for variant in study.variants:
        for base in bases:
            with_overrides(base.settings, variant.overrides)
    ensure_folder(out / "runs")
    values: dict[str, dict[str, list[float | None]]] = {}
    intervals: dict[str, dict[str, list[tuple[float, float] | None]]] = {}
    patients: dict[str, list[dict[str, dict[str, float]]]] = {}
    chance: dict[str, float] = {}
    pairs: dict[str, list[str]] = {}
    for variant in study.variants:
        runs = []
        for draw, base in enumerate(bases):
            for seed in seeds:
                runs.append(run_variant(base, variant.overrides, seed, out / "runs", labels))
                if report is not None:
                    of = f"draw {draw}, seed {seed}" if len(bases) > 1 else f"seed {seed}"
                    report(f"{study.name}: {variant.name}, {of}: " + _in_words(runs[-1]["values"]))
                # Without a modality, the set of patients differs. The reported chance is that of the base.
                chance = {**runs[-1]["chance"], **chance}
                # A mean over other pairs than the base's is another measure.
                pairs = pairs or runs[-1]["pairs"]
                for name in [name for name in pairs if runs[-1]["pairs"].get(name) != pairs[name]]:
                    for kind in ("values", "intervals", "by_patient"):
                        runs[-1][kind].pop(name, None)
        names = list(dict.fromkeys(name for run in runs for name in run["values"]))
        values[variant.name] = {name: [run["values"].get(name) for run in runs] for name in names}
        intervals[variant.name] = {name: [run["intervals"].get(name) for run in runs] for name in names}
        patients[variant.name] = [run["by_patient"] for run in runs]
    return Outcome(study, tuple(seeds), values, chance, intervals, patients, len(bases))


def run_variant(
    base: StudyBase, overrides: Mapping[str, Any], seed: int, runs: Path, labels: Sequence[str]
) -> dict[str, Any]:
    """Train (or find) one run and measure (or read) it; see `measure`."""
    settings = with_overrides(base.settings, {**overrides, "run.seed": seed})
    folder = run_folder(base, settings, runs)
    if not (folder / "model").is_dir():
        train(settings, folder)
        if not (folder / "model").is_dir():
            raise KeyboardInterrupt  # stopped by a signal, with a checkpoint to resume from
    stored = folder / "measured.json"
    key = settings_hash({"labels": list(labels), "measures": _MEASURES})
    if stored.is_file():
        found: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        if found.get("key") == key:
            return found
    found = {"key": key, **measure(open_subject(folder, device=settings.run.device), labels)}
    write_text(stored, json.dumps(found, indent=1) + "\n")
    return found


def run_folder(base: StudyBase, settings: TrainSettings, runs: Path) -> Path:
    """The folder of a run with these settings on the cohort of the base."""
    return runs / settings_hash({"settings": settings.as_dict(), "cohort": base.cohort_hash})[:16]


def with_overrides(base: TrainSettings, overrides: Mapping[str, Any]) -> TrainSettings:
    """Settings with some of them replaced ("section.key" -> value); raises `ConfigError` as `build_settings`."""
    tables = base.as_dict()
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        tables.setdefault(section, {})[key] = value
    return build_settings(_without_none(tables))


def measure(subject: Subject, labels: Iterable[str]) -> dict[str, Any]:
    """Numbers of one run on its held-out patients.

    Returns:
        "values", "intervals" (over patients), "chance" and "by_patient" (values of every patient) by measure, and the
        "pairs" of means over pairs. Measures: recall@1 of every pair (mean of both directions), of all, and of those of
        the slide; balanced accuracy of each label by a linear probe fitted on the training patients, from the slide
        encoder's output ("slide tokens", without the mean of the features) and from the fused embedding ("all
        modalities"). The interval of a mean is the mean of the intervals: it is not smaller, because the patients are
        the same.
    """
    held_out, known = subject.embed(subject.held_out), subject.embed(subject.parts["train"])
    found: dict[str, tuple[Estimate, float]] = {}
    by_patient: dict[str, dict[str, float]] = {}
    scores = cross_modal_retrieval(held_out.pairs)
    for pair in held_out.pairs:
        by_patient[f"recall@1 {pair.left} x {pair.right}"] = _hits_of([pair])
        both = [scores[f"{a}->{b}"] for a, b in ((pair.left, pair.right), (pair.right, pair.left))]
        found[f"recall@1 {pair.left} x {pair.right}"] = _mean([(s.recall[1], s.chance[1]) for s in both])
    means: dict[str, list[str]] = {}
    for name, members in (
        ("recall@1, all pairs", held_out.pairs),
        ("recall@1, pairs of the slide", [pair for pair in held_out.pairs if WSI in (pair.left, pair.right)]),
    ):
        if members:
            means[name] = [f"{pair.left} x {pair.right}" for pair in members]
            found[name] = _mean([found[f"recall@1 {pair}"] for pair in means[name]])
            by_patient[name] = _hits_of(members)
    for label in labels:
        train_labels, test_labels = column(subject, known.patients, label), column(subject, held_out.patients, label)
        all_rows = np.ones(len(known.patients), bool), np.ones(len(held_out.patients), bool)
        views = {"all modalities": (known.fused, held_out.fused, *all_rows)}
        if WSI in held_out.modality:
            width = subject.cohort.slides.dim
            assert width is not None
            views["slide tokens"] = (
                known.modality[WSI][:, width:],
                held_out.modality[WSI][:, width:],
                known.available[WSI],
                held_out.available[WSI],
            )
        for view, (x, y, x_rows, y_rows) in views.items():
            probe = fit_probe(x[x_rows], train_labels[x_rows])
            score = probe.score(y[y_rows], test_labels[y_rows])
            found[f"{label} from {view}"] = score.balanced_accuracy, score.chance
            right, classes, rows = probe.hits_of_rows(y[y_rows], test_labels[y_rows])
            # Weighted so that the mean over patients is the balanced accuracy.
            weight = len(classes) / (len(np.unique(classes)) * np.bincount(classes)[classes])
            ids = np.asarray(held_out.patients)[y_rows][rows].tolist()
            by_patient[f"{label} from {view}"] = dict(zip(ids, (right * weight).tolist(), strict=True))
    return {
        "values": {name: estimate.value for name, (estimate, _) in found.items()},
        "intervals": {
            name: None if math.isnan(estimate.low) else [estimate.low, estimate.high]
            for name, (estimate, _) in found.items()
        },
        "chance": {name: chance for name, (_, chance) in found.items()},
        "patients": len(held_out.patients),
        "pairs": means,
        "by_patient": by_patient,
    }


def _hits_of(pairs: Sequence[PairEmbeddings]) -> dict[str, float]:
    """Patient to recall@1, the mean over pairs and directions in which the patient is a query."""
    hits: dict[str, list[float]] = {}
    for pair in pairs:
        for u, v, queries, gallery in (
            (pair.u, pair.v, pair.left_patients, pair.right_patients),
            (pair.v, pair.u, pair.right_patients, pair.left_patients),
        ):
            ranks = rank_queries(u, v, queries, gallery, recall_at=(1,))
            for patient, hit in zip(np.asarray(queries)[ranks.query].tolist(), ranks.hits[1].tolist(), strict=True):
                hits.setdefault(patient, []).append(hit)
    return {patient: float(np.mean(values)) for patient, values in hits.items()}


def _mean(found: Sequence[tuple[Estimate, float]]) -> tuple[Estimate, float]:
    value, low, high = (float(np.mean([getattr(e, key) for e, _ in found])) for key in ("value", "low", "high"))
    return Estimate(value, low, high, found[0][0].n), float(np.mean([chance for _, chance in found]))


def _in_words(values: Mapping[str, float]) -> str:
    shown = [name for name in values if not name.startswith("recall@1 ")]
    return ", ".join(f"{name} {values[name]:.3f}" for name in shown if not math.isnan(values[name]))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
