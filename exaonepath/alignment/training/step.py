"""The gradients of one optimiser step over a large batch of patients, with the activations of one chunk at a time.

A contrastive loss couples all patients of a batch, but only through their embeddings. So chunks are processed one after
another (see `cached_gradient_step`). The dropout of every chunk has its own seed: so both passes of a chunk are equal,
and results do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.cached_gradients import cached_gradient_step
from exaonepath.alignment.model.objective import ObjectiveOutput
from exaonepath.alignment.training.distributed import Processes
from exaonepath.errors import ExaonePathError, SettingsError
from exaonepath.text import few


class TrainingError(ExaonePathError):
    """Training cannot continue: a loss, an embedding or a gradient is not finite; the last checkpoint is valid."""


@dataclass(frozen=True)
class Chunk:
    """Patients that are embedded together.

    Attributes:
        batch: batch on the host, with ids and numbers of its patients (the same on all processes).
        seed: seed of the chunk's dropout.
    """

    batch: PatientBatch
    seed: int

    @property
    def numbers(self) -> Tensor:
        """int64 [B], one number for all rows of a patient."""
        if self.batch.patient_index is None:
            raise SettingsError("a training batch needs patient_index: rows of one patient are positives")
        return self.batch.patient_index


@dataclass(frozen=True)
class StepOutput:
    """The result of a step before the optimiser changes the weights.

    Attributes:
        objective: the loss and its parts.
        embeddings: modality to [B, E], rows of this process, detached. gradients: those of the loss with respect to
            them.
        available: modality to bool [B].
    """

    objective: ObjectiveOutput
    embeddings: dict[str, Tensor]
    gradients: dict[str, Tensor]
    available: dict[str, Tensor]


def accumulate_gradients(
    model: ExaonePathAlignmentModel,
    objective: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], ObjectiveOutput],
    chunks: Sequence[Chunk],
    *,
    autocast: Callable[[], AbstractContextManager[None]],
    processes: Processes,
    loss_scale: float = 1.0,
) -> StepOutput:
    """Add the gradient of the loss over all chunks (of all processes) to the parameters' `.grad`.

    Args:
        model: the model in training mode.
        objective: (embeddings, availability, patient numbers) to the loss, with the rows of this process.
        chunks: chunks of this process, at least one.
        autocast: context of the encoders.
        processes: the processes that share the batch.
        loss_scale: factor on the gradients (float16).

    Raises:
        TrainingError: an embedding or the loss is not finite; it names the modality, the pair and the patients.
    """
    names, device = model.modalities, model.loss_device
    patients = [patient for chunk in chunks for patient in chunk.batch.patients]
    rows = torch.cat([chunk.numbers for chunk in chunks]).to(device)
    available = {
        name: torch.cat([c.batch.available.get(name, torch.zeros(c.batch.size, dtype=torch.bool)) for c in chunks])
        for name in names
    }
    on_device = {name: flags.to(device) for name, flags in available.items()}
    seen: dict[str, Tensor] = {}

    def loss(embeddings: dict[str, Tensor]) -> ObjectiveOutput:
        seen.update(embeddings)
        _refuse_non_finite(embeddings, patients, processes)
        output = objective(embeddings, on_device, rows)
        if not torch.isfinite(output.loss):
            pairs = [f"{a}-{b}" for (a, b), value in output.pair_losses.items() if not torch.isfinite(value)]
            raise TrainingError(
                f"the loss is {float(output.loss.detach())} (pairs: {', '.join(pairs) or 'none of them alone'})"
            )
        return output

    def backward(value: Tensor) -> None:
        (value * loss_scale).backward()

    def encode(chunk: Chunk) -> dict[str, Tensor]:
        return _embed(model, chunk, autocast)

    if len(chunks) == 1:  # no memory to save: one forward pass is enough
        embedded = encode(chunks[0])
        output = loss({name: h.detach().requires_grad_() for name, h in embedded.items()})
        backward(output.loss)
        trained = [name for name in names if embedded[name].requires_grad and seen[name].grad is not None]
        torch.autograd.backward([embedded[name] for name in trained], [seen[name].grad for name in trained])
    else:
        output = cached_gradient_step(encode, chunks, loss, backward=backward)
    gradients = {name: torch.zeros_like(h) if h.grad is None else h.grad / loss_scale for name, h in seen.items()}
    return StepOutput(output, {name: h.detach() for name, h in seen.items()}, gradients, available)


def _embed(
    model: ExaonePathAlignmentModel, chunk: Chunk, autocast: Callable[[], AbstractContextManager[None]]
) -> dict[str, Tensor]:
    keep_graph = torch.is_grad_enabled()
    torch.manual_seed(chunk.seed)
    # A graph is built even if it is dropped immediately: without a graph, the encoder uses other chunks of rows, and
    # would draw the random numbers of dropout in another order.
    with torch.enable_grad(), autocast():
        found = model.embed(chunk.batch.to(model.loss_device))
    return found if keep_graph else {name: h.detach() for name, h in found.items()}


def _refuse_non_finite(embeddings: Mapping[str, Tensor], patients: Sequence[str], processes: Processes) -> None:
    bad = {name: (~torch.isfinite(h)).any(1) for name, h in embeddings.items()}
    flags = torch.stack([rows.any() for rows in bad.values()])
    found = flags.tolist()
    if not processes.any_true(any(found)):
        return
    if not any(found):
        raise TrainingError("another process found an embedding that is not finite")
    named = [
        f"{name} of {few([patients[i] for i in rows.nonzero().view(-1).tolist()], 8)}"
        for (name, rows), is_bad in zip(bad.items(), found, strict=True)
        if is_bad
    ]
    raise TrainingError(f"embeddings that are not finite: {'; '.join(named)}")
