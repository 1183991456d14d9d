"""Validation in a run: embeddings of held-out patients, monitors of their retrieval, and the best model so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.retrieval import PairEmbeddings
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.monitors import HealthMonitors
from exaonepath.alignment.training.run_log import RunLog
from exaonepath.alignment.training.settings import TrainSettings
from exaonepath.alignment.training.validation import (
    EmbeddedPatients,
    embed_patients,
    retrieval_metrics,
    score_parts,
)


class ModelSelection:
    """Validates the current weights of a model, and remembers the best validation.

    Attributes:
        best: the selected metric (`run.select`) of the best model; None: nothing was validated.
        best_step: its step.
        best_parts: what each patient adds to `best`, as long as the start in closed form is the best model.
        monitors: the run's health monitors.
    """

    def __init__(
        self,
        model: ExaonePathAlignmentModel,
        data: TrainingData,
        settings: TrainSettings,
        processes: Processes,
        log: RunLog,
        monitors: HealthMonitors,
        *,
        chunk_size: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """`chunk_size`: patients that are embedded at a time; `autocast`: context of the encoders."""
        self.model, self.data, self.settings, self.processes = model, data, settings, processes
        self.log, self.monitors = log, monitors
        self._chunk_size, self._autocast = chunk_size, autocast
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_parts: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a checkpoint."""
        parts = {} if self.best_step else self.best_parts
        return {"best": self.best, "best_step": self.best_step, "best_parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.best_parts = state.get("best_parts", {})

    def embed(self, patients: Sequence[str]) -> EmbeddedPatients:
        """Embeddings of some patients by the current weights; each process computes its share."""
        rows = list(range(self.processes.rank, len(patients), self.processes.count))
        workers = self.settings.run.num_workers
        batches = self.data.evaluation_batches(patients, rows, self._chunk_size, workers=workers)
        return embed_patients(self.model, batches, patients, autocast=self._autocast, processes=self.processes)

    def score_and_margin(self) -> tuple[float, float]:
        """The selected metric of the validation patients by the current weights, and `margin`; the metric is NaN if no
        patient has both modalities of a pair."""
        embedded = self.embed(self.data.validation)
        score = retrieval_metrics(embedded.pairs)[0].get(self.settings.run.select, math.nan)
        return score, self.margin(score_parts(embedded.pairs, self.settings.run.select))

    def validate(self, step: int, epoch: int, mark: str = "") -> tuple[dict[str, Any], bool]:
        """Validate the current weights after `step` steps.

        Args:
            step, epoch: of the row.
            mark: a key of the row, for models that are not from a step.

        Returns:
            The row for the log, and whether the model is the best one so far.
        """
        patients = self.data.validation
        embedded = self.embed(patients)
        flat, _ = retrieval_metrics(embedded.pairs)
        row: dict[str, Any] = {"kind": "validation", "step": step, "epoch": epoch}
        row.update({"patients": len(patients), **({mark: True} if mark else {}), **flat})
        # The number is missing if no patient has both modalities of a pair. NaN must not become the best score, because
        # no comparison with NaN is true.
        score = flat.get(self.settings.run.select, math.nan)
        if self.settings.run.monitor:
            available = {
                p: [n for n, flags in embedded.available.items() if flags[i]] for i, p in enumerate(embedded.patients)
            }
            self.log.warnings(
                self.monitors.observe_retrieval(
                    step, embedded.pairs, available, training=self._some_training_pairs(), sites=self.data.sites
                )
            )
            self._check_leakage(step)
        parts = score_parts(embedded.pairs, self.settings.run.select)
        # The start of the slide encoder is the better of two models at most, not the best of many.
        margin = 0.0 if mark == "slide_start" else self.margin(parts)
        is_best = not math.isnan(score) and (self.best is None or score > self.best + margin)
        if is_best:
            self.best, self.best_step, self.best_parts = score, step, parts
        return row, is_best

    def margin(self, parts: Mapping[str, float]) -> float:
        """By how much a model has to be better than the best one, if that is the start in closed form: by one standard
        error of the difference, paired over patients. The start depends less on chance than the best of many steps."""
        if self.best is None or self.best_step or self.settings.model.start != "cca":
            return 0.0
        differences = [parts.get(p, 0.0) - self.best_parts.get(p, 0.0) for p in {*parts, *self.best_parts}]
        n = len(differences)
        return float(np.std(differences) * n / math.sqrt(n - 1)) if n > 1 else 0.0

    def _some_training_pairs(self) -> tuple[PairEmbeddings, ...]:
        """Pairs of as many training patients as there are validation patients, always the same ones."""
        wanted = min(len(self.data.validation), len(self.data.train))
        order = np.random.default_rng((self.settings.run.seed, 2)).permutation(len(self.data.train))
        patients = [self.data.train[at] for at in np.sort(order[:wanted])]
        return self.embed(patients).pairs

    def _check_leakage(self, step: int) -> None:
        slide = self.data.probe_slide
        if slide is None or self.model.config.rope_mode in ("no_fragments", "off"):
            return
        parts = [part.to(self.processes.device) for part in (slide.features, slide.coords, slide.contour_index)]
        self.log.warnings(self.monitors.observe_leakage(step, self.model.slide_encoder, *parts))
