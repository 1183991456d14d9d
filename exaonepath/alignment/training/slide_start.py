"""The start of the slide encoder: what the molecular modalities share beyond the mean patch features, by regression.

After the closed form, the encoder has to find what only the arrangement of patches shows. The loss of the pairs asks
for it weakly: an encoder that has found nothing adds noise to similarities that are good already. But what to look for
is known: the factors that the molecular modalities share beyond the mean features (`joint_directions.beyond`), one
number for each patient and factor. So, before the first training step, the encoder's output is regressed on them for a
few steps, through a linear layer that is not kept. Then the closed form is computed again, with the output as a part
of the slide's profile, and validation patients decide whether that is the start of the run.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exaonepath.alignment.baselines.profiles import read_profiles
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.batch_plan import BatchPlan, derive_seed
from exaonepath.alignment.training.closed_form_start import ClosedForm, chosen_patients
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.optimization import build_optimizer, gradient_norm, learning_rate, set_learning_rate
from exaonepath.alignment.training.settings import TrainSettings
from exaonepath.alignment.training.step import Chunk

logger = logging.getLogger(__name__)

_HEAD = 0.05  # standard deviation of the linear layer's weights at the start
_WARMUP = 0.1  # share of the steps; `optimizer.warmup` may be longer than all of them
_STREAM = 3  # of the seed of the run: an order of patients of its own


@dataclass(frozen=True)
class SlideTargets:
    """What the slide encoder learns to predict.

    Attributes:
        patients: training patients with a slide and a molecular profile.
        values: float32 [n, K] on the host, the factors of these patients, each with mean 0, the widest with variance 1.
    """

    patients: tuple[str, ...]
    values: Tensor

    @staticmethod
    def of(start: ClosedForm | None, data: TrainingData, processes: Processes) -> SlideTargets | None:
        """Means over each patient's modalities of their scores along the factors; None: there are none.

        All processes must call it.

        Args:
            start: the closed form without the slide encoder's output; None on all processes but the first.
            data: the cohort.
            processes: all of them get the targets of the first.
        """
        with_slide = {slide.patient for slide in data.cohort.slides.slides}
        patients = tuple(patient for patient in chosen_patients(data)[0] if patient in with_slide)
        found = np.zeros((len(patients), 0)) if start is None else _factor_scores(start, data, patients)
        width = int(processes.sum(torch.tensor([found.shape[1]], device=processes.device)).item())
        if width < 2 or not patients:  # a column of flags, and one factor
            return None
        shared = torch.zeros(len(patients), width, device=processes.device)
        if start is not None:
            shared += torch.from_numpy(found).to(shared)
        values = processes.sum(shared).cpu()
        has = values[:, 0] > 0
        kept = tuple(patient for patient, flag in zip(patients, has.tolist(), strict=True) if flag)
        return SlideTargets(kept, values[has, 1:]) if len(kept) > 1 else None


def _factor_scores(start: ClosedForm, data: TrainingData, patients: tuple[str, ...]) -> np.ndarray:
    """float64 [n, 1 + K]: whether the patient has a molecular profile, and the scores; no columns without factors."""
    place = {patient: at for at, patient in enumerate(patients)}
    total, count = np.zeros(0), np.zeros(len(patients))
    for name, factors in start.further.items():
        profiles = read_profiles(data, patients, name)
        rows = [place[patient] for patient in profiles.patients]
        if not total.size:
            total = np.zeros((len(patients), factors.shape[1]))
        if rows:
            total[rows] += start.axes[name].scores(profiles.values) @ factors
            count[rows] += 1
    has = count > 0
    if not total.size or not has.any():
        return np.zeros((len(patients), 0))
    mean = total / np.maximum(count, 1)[:, None]
    mean -= mean[has].mean(0)
    widest = mean[has].std(0).max()
    if not widest > 0:
        return np.zeros((len(patients), 0))
    return np.concatenate([has[:, None], mean / widest], axis=1)


def can_learn(model: ExaonePathAlignmentModel, settings: TrainSettings) -> bool:
    """Whether this phase is asked for, and the model has a slide encoder that is trained."""
    if not settings.model.slide_start_steps or WSI not in model.modalities:
        return False
    return any(parameter.requires_grad for parameter in model.slide_encoder.parameters())


def teach_slide_encoder(
    model: ExaonePathAlignmentModel,
    data: TrainingData,
    targets: SlideTargets,
    settings: TrainSettings,
    processes: Processes,
    *,
    steps: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    half: bool,
    after_step: Callable[[Mapping[str, Any]], bool],
) -> bool:
    """Regress the slide encoder's output on the targets, in place. All processes must call it.

    The result depends on the seed of the run, not on earlier random numbers or on `run.num_workers`.

    Args:
        model: the model; only its slide encoder is changed.
        data: its training patients are read as in training.
        targets: the same on all processes.
        settings: batches, and the optimiser's settings.
        processes: each encodes its chunks of every batch.
        steps: their number; 1 or more.
        autocast: context of the encoder. half: it computes in float16, whose range needs scaled gradients.
        after_step: gets the row of each step for the log; True stops.

    Returns:
        False if it was stopped, or a gradient was not finite; the encoder is then in an intermediate state.
    """
    run = settings.run
    batch = min(run.batch_size, len(targets.patients))
    chunk = run.chunk_size or -(-batch // processes.count)
    if -(-batch // chunk) < processes.count:
        logger.info("%d patients with targets are too few for %d processes: no slide start", batch, processes.count)
        return False
    seed = derive_seed(run.seed, _STREAM)
    plan = BatchPlan.of(
        targets.patients, batch_size=batch, chunk_size=chunk, epochs=0, steps=steps, seed=seed,
        processes=processes.count,
    )  # fmt: skip
    width = model.config.widths[WSI] - data.cohort.slides.dim
    head = _head(width, targets.values.shape[1], seed).to(processes.device)
    optimizer_settings = dataclasses.replace(settings.optimizer, warmup=_WARMUP)
    taught = nn.ModuleDict({"slide_encoder": model.slide_encoder, "head": head})
    optimizer = build_optimizer(taught, optimizer_settings)
    parameters = [parameter for parameter in taught.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler(processes.device.type, enabled=half)
    place = {patient: at for at, patient in enumerate(targets.patients)}

    def loss_of(part: Chunk) -> Tensor:
        torch.manual_seed(part.seed)
        moved = part.batch.to(processes.device)
        assert moved.slides is not None
        with autocast():
            embedding = model.encode_slides(moved.slides, part.batch.size)
        wanted = targets.values[[place[patient] for patient in part.batch.patients]].to(processes.device)
        return (head(embedding[:, -width:].float()) - wanted).square().sum() / batch

    model.train()
    planned = plan.steps(0, processes.rank, processes.count)
    for step, parts in data.chunks(planned, workers=run.num_workers):
        lr = learning_rate(step, steps, optimizer_settings)
        set_learning_rate(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=processes.device)
        for part in parts:
            loss = loss_of(part)
            scaler.scale(loss).backward()
            total += loss.detach()
        processes.sum_gradients(parameters)
        scaler.unscale_(optimizer)
        norm = float(gradient_norm(parameters))
        if not math.isfinite(norm) and not half:  # with a scaler, overflows are normal: it skips such a step
            logger.warning("slide start: the gradient of step %d is not finite; the run starts without it", step + 1)
            return False
        clip = settings.optimizer.clip
        if clip and math.isfinite(norm) and norm > clip:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(clip / norm)
        scaler.step(optimizer)
        scaler.update()
        loss_value = float(processes.sum(total))
        row = {"kind": "slide_start", "step": 0, "slide_step": step + 1, "slide_steps": steps, "loss": loss_value}
        if after_step({**row, "lr": lr, "gradient_norm": norm}):
            return False
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def _head(width: int, factors: int, seed: int) -> nn.Linear:
    """The linear layer from the encoder's output to the factors."""
    head = nn.Linear(width, factors)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(std=_HEAD, generator=generator)
        head.bias.zero_()
    return head
