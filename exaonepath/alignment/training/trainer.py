"""The training loop: steps, metrics, validation, checkpoints, and exact continuation of a killed run.

A step depends on earlier steps only through the tensors of a checkpoint: the order of patients depends on (seed,
epoch), sub-sampling on (seed, epoch, patient), dropout on (seed, step, chunk). So no generator state has to be stored,
and a resumed run computes exactly the same steps as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.metrics.retrieval import PairEmbeddings
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.objective import AlignmentObjective
from exaonepath.alignment.training.batch_plan import BatchPlan
from exaonepath.alignment.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from exaonepath.alignment.training.closed_form_start import ClosedForm, chosen_patients
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.monitors import HealthMonitors
from exaonepath.alignment.training.optimization import (
    AveragedWeights,
    build_optimizer,
    gradient_norm,
    learning_rate,
    set_learning_rate,
)
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.alignment.training.run_log import RunLog
from exaonepath.alignment.training.settings import TrainSettings, select_parts
from exaonepath.alignment.training.slide_start import SlideTargets, can_learn, teach_slide_encoder
from exaonepath.alignment.training.step import Chunk, StepOutput, TrainingError, accumulate_gradients
from exaonepath.alignment.training.stop_request import StopRequest
from exaonepath.alignment.training.validation import (
    EmbeddedPatients,
    embed_patients,
    retrieval_metrics,
    score_parts,
)
from exaonepath.device import resolve_dtype
from exaonepath.errors import DeviceError, SettingsError, WeightsError
from exaonepath.text import few

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """A function that is called after every step, and after each step of the slide encoder's start (`slide_start`):
    with step 0 and a row whose "kind" is "slide_start"."""

    def __call__(self, step: int, total: int, row: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        step: optimiser steps done, of `total`.
        finished: False if it was stopped by a signal; the same call resumes it.
        resumed_from: the step at which this call started.
        best: the selected validation metric of the best model; None if nothing was validated.
        best_step: step of the best model.
    """

    step: int
    total: int
    finished: bool
    resumed_from: int
    best: float | None
    best_step: int | None


class Trainer:
    """Trains `model` on `data` into `folder`; build it, then `run()`."""

    def __init__(
        self,
        model: ExaonePathAlignmentModel,
        data: TrainingData,
        settings: TrainSettings,
        folder: RunFolder,
        processes: Processes,
    ) -> None:
        """Prepare the run, with all checks that are possible before the first step.

        Raises:
            SettingsError: batch, chunks and processes do not match, or the pair of `run.select` is not trained.
            DeviceError: the precision is not available on the device.
        """
        self.settings, self.data, self.folder, self.processes = settings, data, folder, processes
        run = settings.run
        self.plan = BatchPlan.of(
            data.train,
            batch_size=run.batch_size,
            chunk_size=run.chunk_size,
            epochs=run.epochs,
            steps=run.steps,
            seed=run.seed,
            processes=processes.count,
        )
        self.total = self.plan.total
        _check_select(run.select, model)
        self.dtype = _precision(run.precision, processes.device)
        self.model = model.to(processes.device)
        self.objective = AlignmentObjective(model, distributed=processes.count > 1)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise SettingsError("every parameter is frozen: there is nothing to train")
        self.names = {p: n for n, p in model.named_parameters()}
        self.optimizer = build_optimizer(model, settings.optimizer)
        self.averaged = AveragedWeights(model, settings.optimizer.ema) if settings.optimizer.ema else None
        # Only the exponent range of float16 is too small for gradients.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.dtype == torch.float16)
        self.monitors = HealthMonitors()
        self.noise: dict[str, float] = {}
        self.step = 0
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_parts: dict[str, float] = {}  # of the start in closed form, as long as it is the best: `_margin`
        self.log = RunLog(folder, is_main=processes.is_main, tensorboard=run.tensorboard)

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of the encoders."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.processes.device.type, self.dtype, enabled=enabled)

    def run(self, progress: Progress | None = None) -> TrainResult:
        """Train from the newest checkpoint of the folder, if there is one, until the end or a signal.

        Raises:
            TrainingError: a loss, an embedding or a gradient is not finite; the last checkpoint is kept.
        """
        resumed_from = self._resume()
        if self.scaler.is_enabled():
            # The scaler initialises its factor at its first call of `scale`. Our losses are scaled by hand, so this
            # call is needed.
            self.scaler.scale(torch.zeros((), device=self.processes.device))
        rank, count = self.processes.rank, self.processes.count
        planned = self.plan.steps(self.step, rank, count)
        with self.log.opened(self.step), StopRequest().listening() as stop:
            if self.step == 0 and self.settings.model.start == "cca":
                self._start_in_closed_form(progress, stop)
            if self.step == 0 and can_learn(self.model, self.settings) and self.processes.any_true(stop.asked):
                return TrainResult(0, self.total, False, resumed_from, self.best, self.best_step)
            for step, chunks in self.data.chunks(planned, workers=self.settings.run.num_workers):
                row = self._train_step(step, chunks)
                self.step = step + 1
                if self.step % self.settings.run.log_every == 0 or self.step == self.total:
                    self.log.row(row)
                if progress is not None:
                    progress(self.step, self.total, row)
                end_of_epoch = self.step % self.plan.steps_per_epoch == 0
                if self._validate_now(end_of_epoch):
                    self._validate()
                if self.step == self.total:
                    self._refit()
                stop_after = self.processes.any_true(stop.asked)
                every = self.settings.run.checkpoint_every
                due = self.step % every == 0 if every else end_of_epoch
                if due or stop_after or self.step == self.total:
                    self.save()
                if stop_after and self.step < self.total:
                    break
        finished = self.step >= self.total
        if finished:
            self._save_final()
        return TrainResult(self.step, self.total, finished, resumed_from, self.best, self.best_step)

    def _start_in_closed_form(self, progress: Progress | None, stop: StopRequest) -> None:
        """Set the start of the linear parts, and validate it: it may be the best model of the run.

        Then the slide encoder gets what it has to learn: with that, but before it has learned it, a model is worse.
        Nothing of this is stored before the first checkpoint: a run that is stopped before it does all of it again.
        """
        names = [name for name in self.model.modalities if name != WSI]
        noise = torch.zeros(len(names), device=self.processes.device)
        start = None
        if self.processes.is_main:
            start = ClosedForm(self.model, self.data, self.settings.model)
            start.apply()
            noise += torch.tensor([start.noise.get(name, 0.0) for name in names], device=noise.device)
        self._set_noise(dict(zip(names, self.processes.sum(noise).tolist(), strict=True)))
        self._share_weights()
        self._restart_average()
        if self.data.validation:
            self._validate()
        if start is not None:
            start.apply(further=True)
        self._share_weights()
        if can_learn(self.model, self.settings):
            self._start_slide_encoder(start, progress, stop)
        self._restart_average()

    def _restart_average(self) -> None:
        """Let the averaged weights, which are validated and saved, start from the current ones."""
        if self.averaged is not None:
            self.averaged = AveragedWeights(self.model, self.settings.optimizer.ema)

    def _start_slide_encoder(self, start: ClosedForm | None, progress: Progress | None, stop: StopRequest) -> None:
        """Teach the slide encoder what the molecular modalities share beyond the mean features, and compute the closed
        form with it; the weights stay as they were if that does not find more validation patients."""
        if not self.data.validation:
            logger.info("no validation patients can decide on a start of the slide encoder: left out")
            return
        targets = SlideTargets.of(start, self.data, self.processes)
        if targets is None:
            logger.info("the molecular modalities share nothing beyond the mean patch features: no slide start")
            return
        before = {name: value.clone() for name, value in self.model.state_dict().items()}

        def after_step(row: Mapping[str, Any]) -> bool:
            if row["slide_step"] % self.settings.run.log_every == 0 or row["slide_step"] == row["slide_steps"]:
                self.log.row(row)
            if progress is not None:
                progress(0, self.total, row)
            return self.processes.any_true(stop.asked)

        done = teach_slide_encoder(
            self.model, self.data, targets, self.settings, self.processes,
            autocast=self.autocast, half=self.scaler.is_enabled(), after_step=after_step,
        )  # fmt: skip
        score = math.nan
        if done:
            self._set_closed_form_of_slides()
            score = self._score(self._embed(self.data.validation))
        kept = self.best is not None and score > self.best
        known = {"score": score, "score_before": math.nan if self.best is None else self.best}
        self.log.row({"kind": "slide_start", "step": 0, "finished": done, "kept": kept, **known})
        logger.info(
            "slide start: %s of validation patients %.4f, before %.4f", self.settings.run.select, *known.values()
        )
        if kept:
            self._restart_average()
            self._validate("slide_start")
        else:
            self.model.load_state_dict(before)

    def _set_closed_form_of_slides(self) -> None:
        """Set the linear parts in closed form, with the slide encoder's output as a part of the slides' profiles."""
        slides = []
        for patients in chosen_patients(self.data):  # training and validation patients
            found = self._embed(patients)
            has = found.available[WSI]
            known = tuple(patient for patient, flag in zip(patients, has, strict=True) if flag)
            slides.append(Profiles(known, found.modality[WSI][has]))
        if self.processes.is_main:
            ClosedForm(self.model, self.data, self.settings.model, (slides[0], slides[1])).apply()
        self._share_weights()

    def _share_weights(self) -> None:
        """Copy the weights of the first process to all: they need the same bits, so only it computes them."""
        if self.processes.count > 1:
            for parameter in self.model.parameters():
                with torch.no_grad():
                    self.processes.sum(parameter if self.processes.is_main else parameter.zero_())

    def _refit(self) -> None:
        """Set the linear parts in closed form once more, now with what the slide encoder has learned; the weights stay
        as they were if that does not find more validation patients."""
        optimizer, model = self.settings.optimizer, self.model
        kept = not optimizer.omics_lr_share and (
            not optimizer.ffn_lr_share or all(model.omics_encoder(name).is_linear for name in model.omics)
        )
        closed = self.settings.model.start == "cca" and WSI in model.modalities and self.averaged is None
        if not closed or not kept or not self.data.validation:
            return
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        before = self._score(self._embed(self.data.validation))
        self._set_closed_form_of_slides()
        if self._score(self._embed(self.data.validation)) > before:
            self._validate("refitted")
        else:
            model.load_state_dict(trained)

    def _set_noise(self, noise: Mapping[str, float]) -> None:
        """Add this noise to the inputs of the molecular encoders, if the settings have no value for them."""
        self.noise = dict(noise)
        tables = self.settings.model.omics
        for name, value in noise.items():
            if "input_noise" not in {**tables, **tables.get(name, {})}:
                self.model.omics_encoder(name).input_noise = value

    def save(self) -> None:
        """Write a checkpoint of this step."""
        if self.processes.is_main:
            tensors: dict[str, Mapping[str, Tensor]] = {
                "model": self.model.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer, self.names),
            }
            if self.averaged is not None:
                tensors["ema"] = self.averaged.tensors
            state = {
                "scaler": self.scaler.state_dict(),
                "monitors": self.monitors.state_dict(),
                "best": self.best,
                "best_step": self.best_step,
                "best_parts": {} if self.best_step else self.best_parts,
                "input_noise": self.noise,
            }
            keep = self.settings.run.keep_checkpoints
            save_checkpoint(self.folder.checkpoints, self.step, tensors, state, keep=keep)
        self.processes.wait()

    def _resume(self) -> int:
        checkpoint = load_checkpoint(self.folder.checkpoints)
        self.processes.wait()  # all processes must have read the folder before the main process writes
        if checkpoint is not None:
            self._restore(checkpoint)
            logger.info("resuming from %s", checkpoint.path)
        if self.processes.is_main:
            self.folder.rewind(-1 if checkpoint is None else self.step)
        return self.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            self.model.load_state_dict(checkpoint.tensors["model"], strict=True)
        except RuntimeError as exc:
            raise WeightsError(f"{checkpoint.path} does not match the model: {exc}") from exc
        restore_optimizer(self.optimizer, self.names, checkpoint.tensors["optimizer"])
        if self.averaged is not None:
            self.averaged.load(checkpoint.tensors["ema"])
        state = checkpoint.state
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.monitors.load_state_dict(state["monitors"])
        self.best, self.best_step = state["best"], state["best_step"]
        self.best_parts = state.get("best_parts", {})
        self._set_noise(state.get("input_noise", {}))
        self.step = checkpoint.step

    def _train_step(self, step: int, chunks: list[Chunk]) -> dict[str, Any]:
        lr = learning_rate(step, self.total, self.settings.optimizer)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            found = accumulate_gradients(
                self.model,
                self.objective,
                chunks,
                autocast=self.autocast,
                processes=self.processes,
                loss_scale=self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
            )
            self.processes.sum_gradients(self.parameters)
            norm = self._optimizer_step()
        except TrainingError as exc:
            patients = [p for chunk in chunks for p in chunk.batch.patients]
            raise TrainingError(
                f"step {step + 1}: {exc}. Patients of the step on this process: {few(patients, 20)}. Earlier weights "
                f"are in {self.folder.checkpoints}; a lower optimizer.lr, a longer optimizer.warmup or "
                "run.precision = bfloat16 are the first things to try"
            ) from exc
        if self.averaged is not None:
            self.averaged.update(self.model, step + 1)
        return self._row(step, lr, norm, found)

    def _optimizer_step(self) -> float:
        """Clip the gradients and run the optimiser; returns the norm before clipping."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters)
        finite = bool(torch.isfinite(norm))
        # With a scaler, overflows are normal: it skips such a step and lowers its factor.
        if not finite and not self.scaler.is_enabled():
            bad = [n for p, n in self.names.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
            raise TrainingError(f"the gradient is not finite (norm {float(norm)}; first in {', '.join(bad[:3])})")
        clip = self.settings.optimizer.clip
        if clip and finite and norm > clip:
            factor = clip / norm
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return float(norm)

    def _row(self, step: int, lr: float, norm: float, found: StepOutput) -> dict[str, Any]:
        output = found.objective
        row: dict[str, Any] = {
            "kind": "train",
            "step": step + 1,
            "epoch": step // self.plan.steps_per_epoch,
            "loss": float(output.loss.detach()),
            "lr": lr,
            "gradient_norm": norm,
            **{f"loss/{a}-{b}": float(value) for (a, b), value in output.pair_losses.items()},
            **output.statistics,
        }
        if self.settings.run.monitor:
            warnings = self.monitors.observe(
                step + 1,
                found.embeddings,
                availability=found.available,
                pair_losses=output.pair_losses,
                gradients=found.gradients,
            )
            self.log.warnings(warnings)
            row.update(self.monitors.metrics())
        return row

    def _validate_now(self, end_of_epoch: bool) -> bool:
        if not self.data.validation:
            return False
        every, steps = self.settings.run.validate_every, self.settings.run.validate_every_steps
        epoch = self.step // self.plan.steps_per_epoch
        after_epoch = bool(end_of_epoch and every and epoch % every == 0)
        return self.step == self.total or after_epoch or bool(steps and self.step % steps == 0)

    def _validate(self, mark: str = "") -> None:
        """Validate, and save the best model; `mark`: a key of the log's row, for models that are not from a step."""
        if self.averaged is not None:
            self.averaged.swap(self.model)
        try:
            self._validate_with_current_weights(mark)
        finally:
            if self.averaged is not None:
                self.averaged.swap(self.model)

    def _embed(self, patients: Sequence[str]) -> EmbeddedPatients:
        """Embeddings of some patients by the current weights; each process computes its share."""
        rows = list(range(self.processes.rank, len(patients), self.processes.count))
        workers = self.settings.run.num_workers
        batches = self.data.evaluation_batches(patients, rows, self.plan.chunk_size, workers=workers)
        return embed_patients(self.model, batches, patients, autocast=self.autocast, processes=self.processes)

    def _score(self, embedded: EmbeddedPatients) -> float:
        """The metric of `run.select`; NaN if no patient has both modalities of a pair."""
        return retrieval_metrics(embedded.pairs)[0].get(self.settings.run.select, math.nan)

    def _validate_with_current_weights(self, mark: str) -> None:
        patients = self.data.validation
        embedded = self._embed(patients)
        flat, _ = retrieval_metrics(embedded.pairs)
        row: dict[str, Any] = {"kind": "validation", "step": self.step, "epoch": self.step // self.plan.steps_per_epoch}
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
                    self.step, embedded.pairs, available, training=self._some_training_pairs(), sites=self.data.sites
                )
            )
            self._check_leakage()
        parts = score_parts(embedded.pairs, self.settings.run.select)
        # The start of the slide encoder is one model as the start is, not the best of many.
        margin = 0.0 if mark == "slide_start" else self._margin(parts)
        if not math.isnan(score) and (self.best is None or score > self.best + margin):
            self.best, self.best_step, self.best_parts = score, self.step, parts
            if self.processes.is_main:
                self._note_provenance()
                self.folder.save_model(self.model, self.folder.best)
        self.log.row(row)

    def _margin(self, parts: Mapping[str, float]) -> float:
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
        return self._embed(patients).pairs

    def _check_leakage(self) -> None:
        slide = self.data.probe_slide
        if slide is None or self.model.config.rope_mode in ("no_fragments", "off"):
            return
        parts = [part.to(self.processes.device) for part in (slide.features, slide.coords, slide.contour_index)]
        self.log.warnings(self.monitors.observe_leakage(self.step, self.model.slide_encoder, *parts))

    def _save_final(self) -> None:
        if self.averaged is not None:
            self.averaged.swap(self.model)
        if self.processes.is_main:
            self._note_provenance()
            self.folder.save_model(self.model, self.folder.model)
        if self.averaged is not None:
            self.averaged.swap(self.model)
        self.processes.wait()

    def _note_provenance(self) -> None:
        self.model.config.provenance = {**self.data.provenance, "step": self.step, "settings": self.settings.as_dict()}


def _precision(name: str, device: torch.device) -> torch.dtype:
    dtype = resolve_dtype(name, device)
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise DeviceError("this GPU does not compute in bfloat16; use float16 or float32")
    return dtype


def _check_select(select: str, model: ExaonePathAlignmentModel) -> None:
    name, _ = select_parts(select)
    known = ["mean_recall", *(f"{x}->{y}" for a, b in model.trained_pairs for x, y in ((a, b), (b, a)))]
    if name not in known:
        raise SettingsError(f"run.select is {select!r}; this run can select by {', '.join(known)}, with @1, @5 or @10")
