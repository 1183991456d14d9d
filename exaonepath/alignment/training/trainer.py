"""The training loop: steps, metrics, validation, checkpoints, and exact continuation of a killed run.

A step depends on earlier steps only through the tensors of a checkpoint: the order of patients depends on (seed,
epoch), sub-sampling on (seed, epoch, patient), dropout on (seed, step, chunk). So no generator state has to be stored,
and a resumed run computes exactly the same steps as an uninterrupted one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.information import measure_information, read_for_information
from exaonepath.alignment.training.model_selection import ModelSelection
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
from exaonepath.alignment.training.slide_start import can_learn
from exaonepath.alignment.training.starts import refit, start_in_closed_form
from exaonepath.alignment.training.step import Chunk, StepOutput, TrainingError, accumulate_gradients
from exaonepath.alignment.training.stop_request import StopRequest
from exaonepath.device import resolve_dtype
from exaonepath.errors import DeviceError, SettingsError, WeightsError
from exaonepath.text import few

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """A function that is called after every step."""

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
        self.log = RunLog(folder, is_main=processes.is_main, tensorboard=run.tensorboard)
        self.selection = ModelSelection(
            self.model, data, settings, processes, self.log, self.monitors,
            chunk_size=self.plan.chunk_size, autocast=self.autocast,
        )  # fmt: skip

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of the encoders."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.processes.device.type, self.dtype, enabled=enabled)

    def run(self, progress: Progress | None = None, report: Callable[[str], None] | None = None) -> TrainResult:
        """Train from the newest checkpoint of the folder, if there is one, until the end or a signal.

        Args:
            progress: called after every step.
            report: called with lines of text during the start of the slide encoder.

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
            if self.step == 0 and self.settings.run.monitor and self.processes.is_main:
                information = measure_information(read_for_information(self.data), self.data.sites)
                self.log.warnings(self.monitors.observe_information(0, information))
            if self.step == 0 and self.settings.model.start == "cca":
                start_in_closed_form(self, report, stop)
            if self.step == 0 and can_learn(self.model, self.settings) and self.processes.any_true(stop.asked):
                return self._result(False, resumed_from)
            for step, chunks in self.data.chunks(planned, workers=self.settings.run.num_workers):
                row = self._train_step(step, chunks)
                self.step = step + 1
                if self.step % self.settings.run.log_every == 0 or self.step == self.total:
                    self.log.row(row)
                if progress is not None:
                    progress(self.step, self.total, row)
                end_of_epoch = self.step % self.plan.steps_per_epoch == 0
                if self._validate_now(end_of_epoch):
                    self.validate()
                if self.step == self.total:
                    refit(self)
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
        return self._result(finished, resumed_from)

    def _result(self, finished: bool, resumed_from: int) -> TrainResult:
        best = self.selection
        return TrainResult(self.step, self.total, finished, resumed_from, best.best, best.best_step)

    def restart_average(self) -> None:
        """Let the averaged weights, which are validated and saved, start from the current ones."""
        if self.averaged is not None:
            self.averaged = AveragedWeights(self.model, self.settings.optimizer.ema)

    def set_noise(self, noise: Mapping[str, float]) -> None:
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
                **self.selection.state_dict(),
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
        self.selection.load_state_dict(state)
        self.set_noise(state.get("input_noise", {}))
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

    def validate(self, mark: str = "") -> None:
        """Validate, and save the best model; `mark`: a key of the log's row, for models that are not from a step."""
        if self.averaged is not None:
            self.averaged.swap(self.model)
        try:
            row, is_best = self.selection.validate(self.step, self.step // self.plan.steps_per_epoch, mark)
            if is_best and self.processes.is_main:
                self._note_provenance()
                self.folder.save_model(self.model, self.folder.best)
            self.log.row(row)
        finally:
            if self.averaged is not None:
                self.averaged.swap(self.model)

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
