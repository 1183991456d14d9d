"""The sigmoid loss of a batch that is distributed over processes. The result equals that of one process with all rows.

Each rank keeps its rows of modality i. The blocks of rows of modality j travel around the ring of ranks, one step at a
time. The gradient of each block follows it one step later; every rank adds its part, and after the last step the
gradient arrives at the rank that owns the block. Transfers overlap with computation: while a rank computes on one
block, the next block arrives. At any time, a rank holds two blocks and two gradients of one modality, for any number of
ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exaonepath.errors import BackendError, ExaonePathError, SettingsError
from exaonepath.ops.sigmoid_loss.checks import check_finite_values, check_inputs, warn_no_valid_pair
from exaonepath.ops.sigmoid_loss.engine import choose_engine
from exaonepath.ops.sigmoid_loss.loss import (
    SigmoidLossResult,
    as_result,
    computing_dtype,
    plain_arithmetic,
    scale_gradients,
)
from exaonepath.ops.sigmoid_loss.pairs import PairwiseInputs, count_positives, count_rows, pairwise_sigmoid
from exaonepath.ops.sigmoid_loss.sweep import Engine, PairTask

# Tags of the transfers: several tensors are in transit between the same two ranks, and their order is not fixed.
_BLOCK, _IDS, _GRADIENT = 1, 2, 3
# Number of entries of a signature: a rank with an input error sends as many zeros.
_N_SIGNED = 8


def distributed_sigmoid_loss(
    embeddings: Sequence[Tensor],
    projections: Mapping[tuple[int, int], Tensor],
    log_t: Tensor,
    bias: Tensor,
    patient: Tensor,
    availability: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    gradients_for: str = "mean",
    pair_weights: Sequence[float] | None = None,
    pos_weight: float | str | None = None,
    backend: str = "auto",
    check_finite: bool = False,
    names: Sequence[str] | None = None,
) -> SigmoidLossResult:
    """`sigmoid_loss` of the combined batch of all ranks of `group`; every rank must call it.

    Args:
        embeddings, patient, availability: this rank's rows; their number may differ between ranks and may be 0.
            Patient ids are global: the same id on two ranks is one patient.
        projections, log_t, bias and the options: the same on every rank.
        group: default: all ranks. Its backend must support the tensors' device (gloo: CPU, NCCL: CUDA).
        gradients_for: each rank has a part of the gradient; the sum over the ranks is the gradient that one process
            would compute. "mean" multiplies the parts by the number of ranks, for DistributedDataParallel, which
            averages them; "sum" does not, for code that adds them.

    Returns:
        As `sigmoid_loss`: loss and statistics of the whole batch, the same on every rank.

    Raises:
        SettingsError, BackendError: as `sigmoid_loss`, on the rank with the error; the other ranks raise a BackendError
            that names this rank. So no rank waits forever.
    """
    ring = Ring(group)
    device = log_t.device
    try:
        if gradients_for not in ("mean", "sum"):
            raise SettingsError(f'gradients_for must be "mean" or "sum", got {gradients_for!r}')
        inputs = check_inputs(
            embeddings, projections, log_t, bias, patient, availability, pair_weights, pos_weight, names
        )
        dtype = computing_dtype(inputs)
        engine = choose_engine(backend, device, dtype)
        if check_finite:
            check_finite_values(inputs)
    except ExaonePathError:
        ring.agree(device, None)
        raise
    flat = [*inputs.embeddings, *inputs.projections, inputs.log_t, inputs.bias]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in flat)
    ring.agree(device, _signature(inputs, dtype, training))
    call = _Call(inputs, engine, ring, float(ring.world if gradients_for == "mean" else 1), training)
    loss, statistics = _RingLoss.apply(call, *flat)
    return as_result(loss, statistics)


def refuse_together(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Report to ranks that wait in `distributed_sigmoid_loss` that this rank has an input error and does not call
    it."""
    Ring(group).agree(device, None)


@dataclass
class _Call:
    inputs: PairwiseInputs
    engine: Engine
    ring: Ring
    gradient_scale: float
    training: bool


class _RingLoss(torch.autograd.Function):
    """The distributed loss for autograd. It is no custom operator, because it communicates with other processes."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *flat: Tensor) -> tuple[Tensor, Tensor]:
        wants = [h.requires_grad for h in call.inputs.embeddings] if call.training else None
        with plain_arithmetic(call.inputs.patient.device):
            result = pairwise_sigmoid(call.inputs, call.engine, call.ring, wants)
            warn_no_valid_pair(result.any_positive)
        ctx.mark_non_differentiable(result.statistics)
        ctx.set_materialize_grads(False)
        ctx.wants, ctx.scale, ctx.n_gradients = wants, call.gradient_scale, len(result.gradients)
        ctx.save_for_backward(*result.gradients, *flat)
        return result.loss, result.statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if grad_loss is not None:
            grad_loss = grad_loss * ctx.scale
        scaled = scale_gradients(grad_loss, saved[: ctx.n_gradients], saved[ctx.n_gradients :], ctx.wants)
        return (None, *scaled)


def _signature(inputs: PairwiseInputs, dtype: torch.dtype, training: bool) -> dict[str, int]:
    """Checksums of everything that must be equal on all ranks, as numbers that fit an int64."""
    described = {
        "modalities": inputs.names,
        "widths": [h.shape[1] for h in inputs.embeddings] + [list(w.shape) for w in inputs.projections],
        "dtype": str(dtype),
        "pair_weights": list(inputs.pair_weights),
        "pos_weight": (inputs.pos_weight, inputs.balanced),
        "the need for gradients": training,
        "log_t": inputs.log_t.detach().double().tolist(),
        "bias": inputs.bias.detach().double().tolist(),
    }
    return {name: zlib.crc32(repr(value).encode()) for name, value in described.items()}


class Ring:
    """The `Batch` that is distributed over several processes."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise SettingsError("the distributed loss needs torch.distributed.init_process_group first")
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise SettingsError("this process is not part of the group that computes the loss")
        neighbours = ((self.rank + step) % self.world for step in (1, -1))
        self.next, self.previous = (rank if group is None else dist.get_global_rank(group, rank) for rank in neighbours)
        self._sizes: list[list[int]] = []

    def agree(self, device: torch.device, signature: dict[str, int] | None) -> None:
        """Exchange signatures, so that either all ranks continue or all raise an error.

        Args:
            device: device of the exchange.
            signature: None if this rank has an input error.

        Raises:
            BackendError: another rank has an input error or other settings.
        """
        own = [0] * (1 + _N_SIGNED) if signature is None else [1, *signature.values()]
        received = [row.tolist() for row in self._gather(torch.tensor(own, device=device))]
        refused = [rank for rank, row in enumerate(received) if not row[0]]
        if signature is None:
            return
        if refused:
            raise BackendError(f"rank {', '.join(map(str, refused))} refused its input to the loss: see its message")
        for position, name in enumerate(signature):
            others = [rank for rank, row in enumerate(received) if row[1 + position] != signature[name]]
            if others:
                raise BackendError(
                    f"{name} of the loss differ between rank {self.rank} and rank {', '.join(map(str, others))}: "
                    f"every rank must run the same model"
                )

    def count(self, patient: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """See `Batch`. Ids and availability travel around the ring in advance: a few bytes per row."""
        rows = count_rows(available)
        sizes = torch.stack(self._gather(rows))
        self._sizes = sizes.tolist()
        block = torch.cat([patient[None], available.long()])  # [1 + M, B]
        positives = torch.zeros_like(count_positives(patient[:0], available[:, :0], patient[:0], available[:, :0]))
        for step in range(self.world):
            positives += count_positives(patient, available, block[0], block[1:].bool())
            if step < self.world - 1:
                arriving = self._sizes[self._owner(step + 1)][-1]
                block = self._exchange([(block, block.new_empty((block.shape[0], arriving)), _IDS)]).wait()[0]
        if positives.numel():
            dist.all_reduce(positives, group=self.group)
        return positives, sizes.sum(0)

    def sweep(self, modality: int, task: PairTask) -> None:
        """See `Batch`."""
        block, ids, gradients = task.v.contiguous(), task.column_ids, task.gradients
        gradient_transfer: _Transfer | None = None
        for step in range(self.world):
            transfer = None
            if step < self.world - 1:
                arriving = self._sizes[self._owner(step + 1)][modality]
                transfer = self._exchange(
                    [
                        (block, block.new_empty((arriving, block.shape[1])), _BLOCK),
                        (ids, ids.new_empty(arriving), _IDS),
                    ]
                )
            part = None if gradients is None else (gradients[0], gradients[1].new_zeros(block.shape))
            task.engine.sweep(replace(task, v=block, column_ids=ids, gradients=part))
            if part is not None:
                if gradient_transfer is not None:
                    part[1].add_(gradient_transfer.wait()[0])
                # Receives the gradient of the block of the next step or, after the last step, of this rank's own block.
                arriving = self._sizes[self._owner(step + 1)][modality]
                incoming = part[1].new_empty((arriving, block.shape[1]))
                gradient_transfer = self._exchange([(part[1], incoming, _GRADIENT)])
            if transfer is not None:
                block, ids = transfer.wait()
        if gradients is not None and gradient_transfer is not None:
            gradients[1].add_(gradient_transfer.wait()[0])

    def total(self, sums: Tensor) -> Tensor:
        """See `Batch`."""
        sums = sums.clone()
        if sums.numel():
            dist.all_reduce(sums, group=self.group)
        return sums

    def _owner(self, step: int) -> int:
        """The rank that owns the block which is on this rank at `step`."""
        return (self.rank - step) % self.world

    def _gather(self, own: Tensor) -> list[Tensor]:
        received = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(received, own, group=self.group)
        return received

    def _exchange(self, tensors: Sequence[tuple[Tensor, Tensor, int]]) -> _Transfer:
        """Start to send the outgoing tensors to the next rank, and to receive into the incoming from the previous one.

        Args:
            tensors: (outgoing, incoming, tag) of each exchange.
        """
        if self.world == 1:
            return _Transfer([], [outgoing for outgoing, _, _ in tensors], [])
        operations = []
        for outgoing, incoming, tag in tensors:
            # An empty tensor is not sent; both ends know the sizes.
            if outgoing.numel():
                operations.append(dist.P2POp(dist.isend, outgoing, self.next, self.group, tag))
            if incoming.numel():
                operations.append(dist.P2POp(dist.irecv, incoming, self.previous, self.group, tag))
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Transfer(works, [incoming for _, incoming, _ in tensors], [outgoing for outgoing, _, _ in tensors])


@dataclass
class _Transfer:
    works: list[Any]
    incoming: list[Tensor]
    outgoing: list[Tensor]  # referenced here, so that their memory is not freed before they are sent

    def wait(self) -> list[Tensor]:
        """The received tensors. The sent ones may be overwritten afterwards."""
        for work in self.works:
            work.wait()
        self.outgoing = []
        return self.incoming
