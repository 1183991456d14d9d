"""A training run from settings to a trained model in a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.batch_plan import derive_seed
from exaonepath.alignment.training.build import build_model, load_initial_model
from exaonepath.alignment.training.data import (
    TrainingData,
    available_counts,
    check_features,
    fit_standardizer,
    load_training_cohort,
    make_split,
    restrict_modalities,
    standardizer_of,
)
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.estimate import RunEstimate
from exaonepath.alignment.training.presets import resolve_settings
from exaonepath.alignment.training.probe import estimate_run
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.alignment.training.run_log import summary_writer
from exaonepath.alignment.training.settings import TrainSettings, build_settings
from exaonepath.alignment.training.settings_file import read_settings
from exaonepath.alignment.training.slide_start import can_learn
from exaonepath.alignment.training.trainer import Progress, Trainer, TrainResult
from exaonepath.files.atomic import write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """All checked inputs of a run; nothing has been written yet. `settings` have no unset values any more."""

    settings: TrainSettings
    data: TrainingData
    model: ExaonePathAlignmentModel
    processes: Processes

    def summary(self) -> str:
        """Lines with the numbers of patients and parameters."""
        lines = []
        for part, patients in self.data.split.parts.items():
            counts = available_counts(self.data.cohort, patients) if patients else {}
            shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            lines.append(f"{part}: {len(patients)} patients{f' ({shown})' if shown else ''}")
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lines.append(f"model: {', '.join(self.model.modalities)}; {trained:,} parameters to train")
        run, model = self.settings.run, self.settings.model
        length = f"{run.steps} steps" if run.steps else f"{run.epochs} epochs"
        steps = model.slide_start_steps if can_learn(self.model, self.settings) else 0
        first = f", {steps} steps of the slide encoder alone (more if they do not clearly help)" if steps else ""
        lines.append(
            f"preset {model.preset}: start {model.start}{first}, {length} with batches of {run.batch_size}, peak "
            f"learning rate {self.settings.optimizer.peak:g}"
        )
        return "\n".join(lines)


def prepare(settings: TrainSettings) -> PreparedRun:
    """Read and check everything, so that errors are raised before the run starts.

    Raises:
        ExaonePathError: settings, cohort, split, weights or device cannot be used; the message gives the reason.
    """
    if settings.run.tensorboard:
        summary_writer()
    processes = Processes.start(settings.run.device)
    if not processes.is_main:
        # The main process reads every features file completely; the others do not need to repeat this.
        settings = replace(settings, data=replace(settings.data, check_features="header"))
    cohort = load_training_cohort(settings.data)
    split = make_split(cohort, settings.data)
    if settings.model.init is not None:
        model = load_initial_model(settings)
        cohort, split = _restrict_to_model(model, cohort, split, settings)
        check_features(model, cohort, by_name=settings.model.match_by_name)
        data = TrainingData(cohort, split, standardizer_of(model), settings.data, settings.run.seed)
        settings = resolve_settings(settings, data, processes.count)
    else:
        data = TrainingData(
            cohort, split, fit_standardizer(cohort, split, settings.data), settings.data, settings.run.seed
        )
        settings = resolve_settings(settings, data, processes.count)
        torch.manual_seed(derive_seed(settings.run.seed, 0, 0))
        model = build_model(settings, data)
    return PreparedRun(settings, data, model, processes)


def check(settings: TrainSettings, out: str | Path) -> PreparedRun:
    """`prepare`, and all other checks of `train` before its first step; nothing is written."""
    with torch.random.fork_rng(devices=[]):
        prepared = prepare(settings)
    folder = RunFolder(Path(out))
    Trainer(prepared.model, prepared.data, prepared.settings, folder, prepared.processes)
    folder.check(settings.as_dict(), prepared.data.cohort.fingerprint)
    return prepared


def estimate(prepared: PreparedRun, out: str | Path) -> RunEstimate | None:
    """Time and memory of a run, from a few batches that are measured; None for several processes."""
    if prepared.processes.count > 1:
        return None
    return estimate_run(
        Trainer(prepared.model, prepared.data, prepared.settings, RunFolder(Path(out)), prepared.processes)
    )


def _restrict_to_model(
    model: ExaonePathAlignmentModel, cohort: Cohort, split: Split, settings: TrainSettings
) -> tuple[Cohort, Split]:
    """Cohort and split without modalities that the initial model has no encoder for, and without patients that then
    have too few modalities."""
    if strange := [name for name in cohort.held if name not in model.modalities]:
        logger.warning("%s has no encoder for %s: left out", settings.model.init, ", ".join(strange))
        kept = [name for name in cohort.held if name in model.modalities]
        cohort = restrict_modalities(cohort, kept, settings.data.min_modalities)
    return cohort, split.restricted_to(cohort.patients)


def train(
    settings: TrainSettings | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train, or resume the run in `out`.

    Args:
        settings: from `read_settings`; or the path of a settings file (TOML), or its tables as a mapping.
        out: folder of the run (see `RunFolder`); created if it does not exist.
        overwrite: delete a run in `out`, and start a new one.
        progress: called after every step.
        report: called before the first step with lines of text: a summary, and how the start of the slide encoder goes.

    Raises:
        ExaonePathError: the input is not valid; raised before anything is written.
        TrainingError: a loss, an embedding or a gradient is not finite; the last checkpoint is kept.
    """
    if isinstance(settings, Mapping):
        settings = build_settings(settings)
    elif not isinstance(settings, TrainSettings):
        settings = read_settings(Path(settings))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # the caller's random state is not changed
        prepared = prepare(settings)
        folder = RunFolder(Path(out))
        trainer = Trainer(prepared.model, prepared.data, prepared.settings, folder, prepared.processes)
        with contextlib.ExitStack() as stack:
            if prepared.processes.is_main:
                stack.enter_context(folder.locked())
                resumed = folder.claim(settings.as_dict(), prepared.data.cohort.fingerprint, overwrite=overwrite)
                folder.clean()
                # Each file is checked separately: a run may have been stopped between the two.
                if not (resumed and folder.split_file.exists()):
                    prepared.data.split.save(folder.split_file)
                if not (resumed and folder.report_file.exists()):
                    findings = json.dumps(prepared.data.cohort.report.as_dict(), indent=1)
                    write_text(folder.report_file, findings + "\n")
            prepared.processes.wait()
            if report is not None and prepared.processes.is_main:
                report(prepared.summary())
            return trainer.run(progress, report if prepared.processes.is_main else None)
