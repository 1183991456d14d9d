"""The pairs of the sigmoid loss, one after the other: project, sweep, and carry the gradients home.

Projections and normalisation are inside, with their gradients, so that one pair's projected embeddings are all that is
alive at a time: four [B, d] matrices, whatever the number of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from exaonepath.errors import SettingsError
from exaonepath.ops.sigmoid_loss_products import product_nn, product_nt, product_tn
from exaonepath.ops.sigmoid_loss_sweep import (
    LOSS,
    N_SUMS,
    NEGATIVE_LOGITS,
    POSITIVE_LOGITS,
    SUM_G,
    SUM_G_DOTS,
    Engine,
    PairConstants,
    sweep,
)

# Columns of the statistics a forward returns for each pair.
STATISTICS = ("loss", "n_positive", "n_valid", "n_cells", "positive_logit", "negative_logit")
# An embedding whose projection is shorter has no direction: its unit vector and its gradient are 0.
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
    # In the inputs' shapes and the accumulator's dtype: embeddings that want one, projections, log_t, bias.
    gradients: list[Tensor]


class Batch(Protocol):
    """Who the rows of this process meet: each other, or those of every process."""

    def count(self, patient: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Positives of each pair [P]; rows of each modality and in all [M + 1], int64, from availability [M, B]."""

    def sweep(
        self,
        modality: int,
        u: Tensor,
        v: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        constants: PairConstants,
        engine: Engine,
        sums: Tensor,
        gradients: tuple[Tensor, Tensor] | None,
    ) -> None:
        """As `sigmoid_loss_sweep.sweep`; `modality` is that of `v`."""

    def total(self, sums: Tensor) -> Tensor:
        """`sums` of all processes together."""


class LocalBatch:
    """One process holds the whole batch."""

    def count(self, patient: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        return count_positives(patient, available, patient, available), count_rows(available)

    def sweep(
        self,
        modality: int,
        u: Tensor,
        v: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        constants: PairConstants,
        engine: Engine,
        sums: Tensor,
        gradients: tuple[Tensor, Tensor] | None,
    ) -> None:
        sweep(u, v, row_ids, column_ids, constants, engine, sums, gradients)

    def total(self, sums: Tensor) -> Tensor:
        return sums


def count_rows(available: Tensor) -> Tensor:
    """Rows that have each modality, then all rows: int64 [M + 1] from availability [M, B]."""
    return torch.cat([available.sum(1), available.new_full((1,), available.shape[1], dtype=torch.int64)])


def count_positives(row_ids: Tensor, row_available: Tensor, column_ids: Tensor, column_available: Tensor) -> Tensor:
    """Pairs (k, l) of one patient with modality i there in row k and j in column l: [P] int64, without a B x B mask."""
    n_modalities = len(row_available)
    _, codes = torch.unique(torch.cat([row_ids, column_ids]), return_inverse=True)
    n_patients = codes.numel()  # an upper bound that costs no synchronisation
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
    """One modality of one pair: its rows that are there, projected to unit vectors."""

    h: Tensor  # [B, E]
    rows: Tensor | None  # [n] where some are missing
    weight: Tensor  # [E, d]
    engine: Engine

    def _present(self, dtype: torch.dtype) -> Tensor:
        return (self.h if self.rows is None else self.h.index_select(0, self.rows)).to(dtype)

    def project(self) -> Tensor:
        """[n, d] in the accumulator's dtype; keeps 1 / length for the way back."""
        operand = self.engine.operand
        u = product_nn(self._present(operand), self.weight.to(operand))
        length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        self.inverse_length = torch.where(length > _SHORTEST, 1 / length, 0)
        # NaN compares false: keep it visible instead of turning the row into zeros.
        self.inverse_length = torch.where(length.isnan(), length, self.inverse_length)
        return u.mul_(self.inverse_length)

    def back(self, u: Tensor, du: Tensor, factor: float, into: Tensor | None) -> Tensor:
        """dL/dW [E, d]; adds dL/dh of the rows that are there to `into` [n, E]. `du` is used up."""
        dtype = self.engine.gradient_operand
        radial = torch.linalg.vecdot(u, du)[:, None]
        dz = du.addcmul_(u, radial, value=-1).mul_(self.inverse_length.mul(factor)).to(dtype)
        if into is not None:
            into += product_nt(dz, self.weight.to(dtype))
        return product_tn(self._present(dtype), dz)


def pairwise_sigmoid(
    inputs: PairwiseInputs, engine: Engine, batch: Batch, wants: Sequence[bool] | None
) -> PairwiseResult:
    """Loss, statistics, and (where `wants` says which embeddings need one) every gradient.

    Raises:
        SettingsError: exp(t) or the bias of a pair is not finite.
    """
    device, dtype, pairs = inputs.patient.device, engine.accumulator, inputs.pairs
    rows = _present_rows(inputs)
    ids = [inputs.patient if r is None else inputs.patient[r] for r in rows]
    scales, biases, n_positive, n_rows = _numbers(inputs, engine, batch)
    weight_sum = math.fsum(w for w, n in zip(inputs.pair_weights, n_positive, strict=True) if n)
    sums = torch.zeros((len(pairs), N_SUMS), dtype=torch.float64, device=device)
    # Embeddings' gradients are gathered for the rows that are there, and spread out at the end.
    h_gradients = [
        torch.zeros((ids_m.numel(), h.shape[1]), dtype=dtype, device=device) if wanted else None
        for h, ids_m, wanted in zip(inputs.embeddings, ids, wants or [False] * len(ids), strict=True)
    ]
    w_gradients: list[Tensor | None] = [None] * len(inputs.projections)
    factors = [0.0] * len(pairs)
    for index, (i, j) in enumerate(pairs):
        positives, valid = n_positive[index], n_rows[i] * n_rows[j]
        if not positives or not inputs.pair_weights[index]:
            continue
        factors[index] = inputs.pair_weights[index] / (weight_sum * positives)
        pos_weight = (valid - positives) / positives if inputs.balanced else (inputs.pos_weight or 1.0)
        constants = PairConstants.build(scales[index], biases[index], pos_weight, device)
        sides = [
            _Side(inputs.embeddings[m], rows[m], inputs.projections[2 * index + position], engine)
            for position, m in enumerate((i, j))
        ]
        units = [side.project() for side in sides]
        slopes = None if wants is None else (torch.zeros_like(units[0]), torch.zeros_like(units[1]))
        u, v = (unit.to(engine.operand) for unit in units)
        batch.sweep(j, u, v, ids[i], ids[j], constants, engine, sums[index], slopes)
        if slopes is None:
            continue
        factor = factors[index] * scales[index]
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
            torch.zeros(w.shape, dtype=dtype, device=device) if gradient is None else gradient
            for w, gradient in zip(inputs.projections, w_gradients, strict=True)
        ]
        weights = sums.new_tensor([[f * s for f, s in zip(factors, scales, strict=True)], factors])
        gradients += [(sums[:, SUM_G_DOTS] * weights[0]).to(dtype), (sums[:, SUM_G] * weights[1]).to(dtype)]
    loss, statistics = _summary(inputs, batch.total(sums), n_positive, n_rows, weight_sum)
    return PairwiseResult(loss.to(dtype), statistics, gradients)


def _spread(gradient: Tensor, rows: Tensor | None, n_rows: int) -> Tensor:
    """[n, E] of the rows that are there to [B, E], zero elsewhere."""
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


def _numbers(
    inputs: PairwiseInputs, engine: Engine, batch: Batch
) -> tuple[list[float], list[float], list[int], list[int]]:
    """exp(t), b, positives of each pair, rows of each modality and in all: on the host before any sweep starts."""
    available = inputs.availability
    if available is None:
        available = torch.ones((len(inputs.embeddings), len(inputs.patient)), device=inputs.patient.device).bool()
    positives, n_rows = batch.count(inputs.patient, available)
    scales, biases = inputs.log_t.double().exp().tolist(), inputs.bias.tolist()
    largest = torch.finfo(engine.accumulator).max
    for index, (i, j) in enumerate(inputs.pairs):
        where = f"of the pair ({inputs.names[i]}, {inputs.names[j]})"
        if not scales[index] <= largest:
            t = inputs.log_t[index].item()
            raise SettingsError(f"exp(t) {where} is not a finite number (t = {t:g}): lower t or its learning rate")
        if not math.isfinite(biases[index]):
            raise SettingsError(f"the bias {where} is {biases[index]}: training has diverged")
    return scales, biases, positives.tolist(), n_rows.tolist()


def _summary(
    inputs: PairwiseInputs, sums: Tensor, n_positive: Sequence[int], n_rows: Sequence[int], weight_sum: float
) -> tuple[Tensor, Tensor]:
    """The loss, and the columns of STATISTICS."""
    n_valid = [n_rows[i] * n_rows[j] for i, j in inputs.pairs]
    counts = sums.new_tensor([n_positive, n_valid, [n_rows[-1] ** 2] * len(n_valid)])
    positives, valid = counts[0], counts[1]
    weights = sums.new_tensor(list(inputs.pair_weights))
    losses = sums[:, LOSS] / positives.clamp(min=1)
    loss = (losses * weights).sum() / (weight_sum or 1.0)
    # What was not swept is not known. Without a positive the loss of a pair is 0 by definition, with weight 0 unknown.
    unknown = (positives == 0) | (weights == 0)
    logits = [sums[:, POSITIVE_LOGITS] / positives, sums[:, NEGATIVE_LOGITS] / (valid - positives)]
    columns = [
        torch.where((positives > 0) & (weights == 0), math.nan, losses),
        *counts,
        *[torch.where(unknown, math.nan, mean) for mean in logits],
    ]
    return loss, torch.stack(columns, dim=1)
