"""The pairs of the sigmoid loss, one after another: project, sweep, and propagate the gradients to the inputs.

Projection and normalisation are part of the operation, with their gradients. So only one pair's projected embeddings
exist at a time: four [B, d] matrices, for any number of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.ops.sigmoid_loss.products import product_nn, product_nt, product_tn
from exaonepath.ops.sigmoid_loss.sweep import (
    LOSS,
    N_SUMS,
    NEGATIVE_LOGITS,
    POSITIVE_LOGITS,
    SUM_G,
    SUM_G_DOTS,
    Engine,
    PairConstants,
    PairTask,
    Workspace,
)

# Columns of the statistics that a forward pass returns for each pair.
STATISTICS = ("loss", "n_positive", "n_valid", "n_cells", "positive_logit", "negative_logit")
# A projection that is shorter than this has no direction: its unit vector and its gradient are 0.
_SHORTEST = 1e-12


@dataclass(frozen=True)
class PairwiseInputs:
    """Checked arguments of one call; P pairs of M modalities in the order of `combinations(range(M), 2)`."""

    embeddings: Sequence[Tensor]  # M of [B, E_m]
    projections: Sequence[Tensor]  # 2 P of [E, d]: W_ij, W_ji of each pair
    log_t: Tensor  # [P]
    bias: Tensor  # [P]
    patient: Tensor  # [B] int64
    availability: Tensor | None  # [M, B] bool
    pair_weights: Sequence[float]  # P
    pos_weight: float | None
    balanced: bool
    names: Sequence[str]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.embeddings)), 2))


@dataclass
class PairwiseResult:
    loss: Tensor  # []
    statistics: Tensor  # [P, 6] float64, see STATISTICS
    # In the inputs' shapes and the accumulator's dtype: embeddings that require one, projections, log_t, bias.
    gradients: list[Tensor]
    any_positive: bool


class Batch(Protocol):
    """The rows that the rows of this process are paired with: its own, or those of all processes."""

    def count(self, patient: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Positives of each pair [P]; rows of each modality, then all rows [M + 1]; int64, from availability [M, B]."""

    def sweep(self, modality: int, task: PairTask) -> None:
        """Like `Engine.sweep`; `modality` is that of `task.v`."""

    def total(self, sums: Tensor) -> Tensor:
        """The total of `sums` over all processes."""


class LocalBatch:
    """A batch that is completely in one process."""

    def count(self, patient: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        return count_positives(patient, available, patient, available), count_rows(available)

    def sweep(self, modality: int, task: PairTask) -> None:
        task.engine.sweep(task)

    def total(self, sums: Tensor) -> Tensor:
        return sums


def count_rows(available: Tensor) -> Tensor:
    """Rows that have each modality, then all rows: int64 [M + 1] from availability [M, B]."""
    return torch.cat([available.sum(1), available.new_full((1,), available.shape[1], dtype=torch.int64)])


def count_positives(row_ids: Tensor, row_available: Tensor, column_ids: Tensor, column_available: Tensor) -> Tensor:
    """Number of (k, l) of one patient with modality i available in row k and j in column l: [P] int64.

    No B x B mask is needed: a patient with a rows of modality i and b rows of modality j has a * b positives.
    """
    n_modalities = len(row_available)
    _, codes = torch.unique(torch.cat([row_ids, column_ids]), return_inverse=True)
    n_patients = codes.numel()  # an upper bound; the exact number would need a synchronisation
    tables = [
        torch.zeros((n_modalities, n_patients), dtype=torch.int64, device=row_ids.device).index_add_(
            1, of_ids, available.long()
        )
        for of_ids, available in (
            (codes[: len(row_ids)], row_available),
            (codes[len(row_ids) :], column_available),
        )
    ]
    found = [(tables[0][i] * tables[1][j]).sum() for i, j in combinations(range(n_modalities), 2)]
    return torch.stack(found) if found else row_ids.new_zeros(0)


@dataclass
class _Side:
    """One modality of one pair: its available rows, projected to unit vectors."""

    h: Tensor  # [B, E]
    rows: Tensor | None  # [n] available rows; None: all
    weight: Tensor  # [E, d]
    engine: Engine

    def _present(self, dtype: torch.dtype) -> Tensor:
        return (self.h if self.rows is None else self.h.index_select(0, self.rows)).to(dtype)

    def project(self) -> Tensor:
        """[n, d] in the accumulator's dtype; stores 1 / length for the gradient."""
        operand = self.engine.operand
        u = product_nn(self._present(operand), self.weight.to(operand))
        length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        self.inverse_length = torch.where(length > _SHORTEST, 1 / length, 0)
        # A comparison with NaN is false, so such a row would become 0. NaN is restored to stay visible.
        self.inverse_length = torch.where(length.isnan(), length, self.inverse_length)
        return u.mul_(self.inverse_length)

    def back(self, u: Tensor, du: Tensor, factor: float, into: Tensor | None) -> Tensor:
        """dL/dW [E, d]; adds dL/dh of the available rows to `into` [n, E]. `du` is overwritten.

        The gradient of u = z / |z| is (du - u <u, du>) / |z|: normalisation removes the component along u.
        """
        dtype = self.engine.gradient_operand
        radial = torch.linalg.vecdot(u, du)[:, None]
        dz = du.addcmul_(u, radial, value=-1).mul_(self.inverse_length.mul(factor)).to(dtype)
        if into is not None:
            into += product_nt(dz, self.weight.to(dtype))
        return product_tn(self._present(dtype), dz)


def pairwise_sigmoid(
    inputs: PairwiseInputs, engine: Engine, batch: Batch, wants: Sequence[bool] | None
) -> PairwiseResult:
    """Loss and statistics, and all gradients unless `wants` is None; `wants`: which embeddings need a gradient.

    Raises:
        SettingsError: exp(t) or the bias of a pair is not finite.
    """
    dtype, pairs = engine.accumulator, inputs.pairs
    rows = _present_rows(inputs)
    ids = [inputs.patient if r is None else inputs.patient[r] for r in rows]
    plan = _plan(inputs, engine, batch)
    sums = plan.table.new_zeros((len(pairs), N_SUMS))
    # Gradients of embeddings are summed for the available rows only, and copied to their rows of [B, E] at the end.
    h_gradients = [
        sums.new_zeros((ids_m.numel(), h.shape[1]), dtype=dtype) if wanted else None
        for h, ids_m, wanted in zip(inputs.embeddings, ids, wants or [False] * len(ids), strict=True)
    ]
    w_gradients: list[Tensor | None] = [None] * len(inputs.projections)
    workspace = Workspace()
    for index, (i, j) in enumerate(pairs):
        if not plan.factors[index]:
            continue
        sides = [
            _Side(inputs.embeddings[m], rows[m], inputs.projections[2 * index + position], engine)
            for position, m in enumerate((i, j))
        ]
        units = [side.project() for side in sides]
        slopes = None if wants is None else (torch.zeros_like(units[0]), torch.zeros_like(units[1]))
        u, v = (unit.to(engine.operand) for unit in units)
        batch.sweep(j, PairTask(u, v, ids[i], ids[j], plan.constants[index], engine, sums[index], slopes, workspace))
        if slopes is None:
            continue
        factor = plan.factors[index] * plan.constants[index].scale
        for position, m in enumerate((i, j)):
            gradient = sides[position].back(units[position], slopes[position], factor, h_gradients[m])
            w_gradients[2 * index + position] = gradient.to(dtype)
        del sides, units, slopes, u, v
    gradients: list[Tensor] = []
    if wants is not None:
        gradients += [
            _spread(gradient, present, len(inputs.patient))
            for gradient, present in zip(h_gradients, rows, strict=True)
            if gradient is not None
        ]
        gradients += [
            sums.new_zeros(w.shape, dtype=dtype) if gradient is None else gradient
            for w, gradient in zip(inputs.projections, w_gradients, strict=True)
        ]
        factors = plan.column("factor")
        gradients.append((sums[:, SUM_G_DOTS] * factors * plan.column("scale")).to(dtype))
        gradients.append((sums[:, SUM_G] * factors).to(dtype))
    loss, statistics = _summary(plan, batch.total(sums))
    return PairwiseResult(loss.to(dtype), statistics, gradients, plan.any_positive)


def _spread(gradient: Tensor, rows: Tensor | None, n_rows: int) -> Tensor:
    """[n, E] of the available rows to [B, E], 0 in the other rows."""
    if rows is None:
        return gradient
    out = gradient.new_zeros((n_rows, gradient.shape[1]))
    out[rows] = gradient
    return out


def _present_rows(inputs: PairwiseInputs) -> list[Tensor | None]:
    if inputs.availability is None:
        return [None] * len(inputs.embeddings)
    complete = inputs.availability.all(1).tolist()
    return [None if c else a.nonzero()[:, 0] for c, a in zip(complete, inputs.availability, strict=True)]


@dataclass(frozen=True)
class _Plan:
    """All numbers that are known before the first sweep, on the host and, copied in one transfer, on the device."""

    constants: list[PairConstants]
    factors: list[float]  # weight / (sum of weights * positives); 0: the pair is not swept
    table: Tensor  # [P, len(COLUMNS)] float64
    any_positive: bool

    COLUMNS: ClassVar[tuple[str, ...]] = (
        *("scale", "bias", "pos_weight"),  # must be first: the CUDA sweep reads these three
        *("factor", "weight", "share", "positives", "valid", "cells"),
    )

    def column(self, name: str) -> Tensor:
        return self.table[:, self.COLUMNS.index(name)]


def _plan(inputs: PairwiseInputs, engine: Engine, batch: Batch) -> _Plan:
    """Copy exp(t), b and the counts to the host, compute weights and factors, and copy all to the device at once."""
    available = inputs.availability
    if available is None:
        shape = (len(inputs.embeddings), len(inputs.patient))
        available = torch.ones(shape, dtype=torch.bool, device=inputs.patient.device)
    n_positive, n_rows = (x.tolist() for x in batch.count(inputs.patient, available))
    scales, biases = inputs.log_t.double().exp().tolist(), inputs.bias.tolist()
    _check_logits(inputs, engine, scales, biases)
    weight_sum = math.fsum(w for w, n in zip(inputs.pair_weights, n_positive, strict=True) if n)
    lines = []
    for index, (i, j) in enumerate(inputs.pairs):
        positives, valid, weight = n_positive[index], n_rows[i] * n_rows[j], inputs.pair_weights[index]
        pos_weight = 1.0 if inputs.pos_weight is None else inputs.pos_weight
        if inputs.balanced:
            pos_weight = (valid - positives) / max(positives, 1)
        share = weight / weight_sum if weight and positives else 0.0
        counts = (positives, valid, n_rows[-1] ** 2)
        lines.append((scales[index], biases[index], pos_weight, share / max(positives, 1), weight, share, *counts))
    table = torch.tensor(lines, dtype=torch.float64, device=inputs.patient.device).reshape(-1, len(_Plan.COLUMNS))
    constants = [PairConstants(*line[:3], on_device) for line, on_device in zip(lines, table[:, :3], strict=True)]
    return _Plan(constants, [line[3] for line in lines], table, any(n_positive))


def _check_logits(inputs: PairwiseInputs, engine: Engine, scales: Sequence[float], biases: Sequence[float]) -> None:
    largest = torch.finfo(engine.accumulator).max
    for index, (i, j) in enumerate(inputs.pairs):
        where = f"of the pair ({inputs.names[i]}, {inputs.names[j]})"
        if not scales[index] <= largest:
            t = inputs.log_t[index].item()
            raise SettingsError(f"exp(t) {where} is not a finite number (t = {t:g}): lower t or its learning rate")
        if not math.isfinite(biases[index]):
            raise SettingsError(f"the bias {where} is {biases[index]}: training has diverged")


def _summary(plan: _Plan, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the columns of STATISTICS."""
    positives, valid, weight = (plan.column(name) for name in ("positives", "valid", "weight"))
    losses = sums[:, LOSS] / positives.clamp(min=1)
    # A pair without a sweep has no logits. Its loss is 0 by definition if it has no positive, and unknown (NaN) if it
    # has weight 0.
    unknown = (positives == 0) | (weight == 0)
    logits = (sums[:, POSITIVE_LOGITS] / positives, sums[:, NEGATIVE_LOGITS] / (valid - positives))
    columns = [
        torch.where((positives > 0) & (weight == 0), math.nan, losses),
        *(positives, valid, plan.column("cells")),
        *[torch.where(unknown, math.nan, mean) for mean in logits],
    ]
    return (losses * plan.column("share")).sum(), torch.stack(columns, dim=1)
