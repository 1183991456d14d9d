"""The all-pairwise sigmoid loss as a module: projections, temperatures and biases of every pair of modalities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import ModelOutput

from exaonepath.errors import ExaonePathError, SettingsError
from exaonepath.ops.sigmoid_loss.loss import SigmoidLossResult, sigmoid_loss
from exaonepath.ops.sigmoid_loss.ring import distributed_sigmoid_loss, refuse_together

_RANK_SHIFT = 40  # rows without a patient id: rank in the high bits, row in the low ones


@dataclass
class PairwiseSigmoidLossOutput(ModelOutput):
    """Loss and statistics of one batch; [P] is over the module's `pairs`. Only `loss` is differentiable.

    Attributes:
        loss: [], weighted mean over the pairs that have a positive; 0 if none has.
        pair_losses: [P], L_ij; 0 without a positive, NaN for a pair of weight 0, which is not computed.
        n_positive, n_valid: int64 [P], pairs of rows of one patient, and pairs of rows that both have their modality.
        missing: [P], share of the B x B pairs of rows that are not valid.
        positive_logit, negative_logit: [P], mean of exp(t) <u, v> + b over the valid positives and negatives; NaN if
            there are none.
    """

    loss: Tensor | None = None
    pair_losses: Tensor | None = None
    n_positive: Tensor | None = None
    n_valid: Tensor | None = None
    missing: Tensor | None = None
    positive_logit: Tensor | None = None
    negative_logit: Tensor | None = None


class PairwiseSigmoidLoss(nn.Module):
    """Aligns M modalities of the same patients, pair by pair (EXAONE Path 2.5, arXiv 2512.14019).

    Parameters: `projections[f"{a}_to_{b}"]` [E_a, d] for every ordered pair, `log_t` [P] (initial value log 10) and
    `bias` [P] (initial value -10), one per pair.

    Args:
        widths: E_m by modality name; their order is that of the pairs.
        projection_dim: d, common to all pairs.
        pair_weights: by pair of names, in any order; 1 if absent. A pair of weight 0 is not computed.
        pos_weight: None (1), a number > 0, or "balanced" (valid negatives / valid positives of the pair).
        backend, check_finite: see `exaonepath.ops.sigmoid_loss.loss.sigmoid_loss`.
        distributed: the batch is distributed over the ranks of `process_group` (default: all); see
            `exaonepath.ops.sigmoid_loss.ring.distributed_sigmoid_loss` for the gradients of each rank.
        gradients_for: "mean" (DistributedDataParallel averages) or "sum", with `distributed`.

    Raises:
        SettingsError: there are fewer than two modalities, or a name, width or option is not valid.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        projection_dim: int = 256,
        *,
        pair_weights: Mapping[tuple[str, str], float] | None = None,
        pos_weight: float | str | None = None,
        backend: str = "auto",
        check_finite: bool = False,
        distributed: bool = False,
        process_group: dist.ProcessGroup | None = None,
        gradients_for: str = "mean",
    ) -> None:
        super().__init__()
        if len(widths) < 2 or projection_dim < 1 or any(width < 1 for width in widths.values()):
            raise SettingsError(
                f"the pairwise loss needs two or more modalities of positive width and a positive projection_dim, "
                f"got {dict(widths)} and {projection_dim}"
            )
        self.widths = dict(widths)
        self.projection_dim = projection_dim
        self.modalities = tuple(widths)
        self.pairs = tuple(combinations(self.modalities, 2))
        keys = [_key(a, b) for a, b in permutations(self.modalities, 2)]
        if len(set(keys)) < len(keys) or any("." in name or "," in name or not name for name in self.modalities):
            raise SettingsError(f"modality names must be distinct, without dots and commas, got {self.modalities}")
        self.projections = nn.ParameterDict(
            {_key(a, b): torch.empty(widths[a], projection_dim) for a, b in permutations(self.modalities, 2)}
        )
        self.log_t = nn.Parameter(torch.empty(len(self.pairs)))
        self.bias = nn.Parameter(torch.empty(len(self.pairs)))
        self.pair_weights = self._ordered_weights(pair_weights or {})
        self.pos_weight = pos_weight
        self.backend, self.check_finite = backend, check_finite
        self.distributed, self.process_group, self.gradients_for = distributed, process_group, gradients_for
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W with entries of variance 1 / E (its scale has no effect, because projections are normalised), t = log 10,
        b = -10."""
        for weight in self.projections.values():
            nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
        nn.init.constant_(self.log_t, math.log(10))
        nn.init.constant_(self.bias, -10.0)

    def projection(self, modality: str, other: str) -> Tensor:
        """W_ij [E_i, d]: from `modality` into the space it shares with `other`."""
        key = _key(modality, other)
        if key not in self.projections:
            raise SettingsError(f"there is no pair ({modality}, {other}); modalities are {', '.join(self.modalities)}")
        return self.projections[key]

    def forward(
        self,
        embeddings: Mapping[str, Tensor | None],
        patient: Tensor | None = None,
        availability: Mapping[str, Tensor] | Tensor | None = None,
    ) -> PairwiseSigmoidLossOutput:
        """Loss and statistics of one batch of B rows.

        Args:
            embeddings: h_m [B, E_m] by modality name, not normalised. A modality that is None or absent is missing in
                every row.
            patient: integer ids [B]; several rows may belong to one patient. None: every row is a different patient.
            availability: which rows have which modality: bool [M, B] in the order of `modalities`, or [B] by name
                (absent: all rows have it). None: all rows of the given modalities. Rows that are not available may have
                any values.

        Raises:
            SettingsError, BackendError: see `exaonepath.ops.sigmoid_loss.loss.sigmoid_loss`.
        """
        device = self.log_t.device
        try:
            tensors, patient, available = self._batch(embeddings, patient, availability, device)
        except ExaonePathError:
            if self.distributed:
                refuse_together(self.process_group, device)
            raise
        compute: Callable[..., SigmoidLossResult] = sigmoid_loss
        if self.distributed:
            compute = partial(distributed_sigmoid_loss, group=self.process_group, gradients_for=self.gradients_for)
        result = compute(
            tensors,
            {
                (i, j): self.projection(self.modalities[i], self.modalities[j])
                for i, j in permutations(range(len(self.modalities)), 2)
            },
            self.log_t,
            self.bias,
            patient,
            available,
            pair_weights=self.pair_weights,
            pos_weight=self.pos_weight,
            backend=self.backend,
            check_finite=self.check_finite,
            names=self.modalities,
        )
        return PairwiseSigmoidLossOutput(**result._asdict())

    def extra_repr(self) -> str:
        """The settings of this module, for print(model)."""
        return f"widths={self.widths}, projection_dim={self.projection_dim}, pos_weight={self.pos_weight}"

    def _ordered_weights(self, pair_weights: Mapping[tuple[str, str], float]) -> list[float]:
        known = {*self.pairs, *(pair[::-1] for pair in self.pairs)}
        unknown = [pair for pair in pair_weights if pair not in known]
        doubled = [pair for pair in self.pairs if pair in pair_weights and pair[::-1] in pair_weights]
        if unknown or doubled:
            raise SettingsError(f"pair_weights must name each pair once: unknown {unknown}, given twice {doubled}")
        weights = [float(pair_weights.get(pair, pair_weights.get(pair[::-1], 1.0))) for pair in self.pairs]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise SettingsError(f"pair_weights must be finite and >= 0, got {dict(pair_weights)}")
        return weights

    def _batch(
        self,
        embeddings: Mapping[str, Tensor | None],
        patient: Tensor | None,
        availability: Mapping[str, Tensor] | Tensor | None,
        device: torch.device,
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Embeddings of every modality, patient ids, and availability [M, B] (None if nothing is missing)."""
        unknown = sorted(set(embeddings) - set(self.modalities))
        if unknown:
            raise SettingsError(f"unknown modality {', '.join(unknown)}; modalities are {', '.join(self.modalities)}")
        given = {name: h for name in self.modalities if (h := embeddings.get(name)) is not None}
        if not given and not self.distributed:
            raise SettingsError("every modality is missing from the batch: there is nothing to align")
        # A rank without rows must still take part in the communication.
        first = next(iter(given.values()), self.log_t.detach().new_zeros((0, 1)))
        n_rows = first.shape[0]
        tensors = [
            given[name] if name in given else first.new_zeros(()).expand(n_rows, self.widths[name])
            for name in self.modalities
        ]
        if patient is None:
            rank = dist.get_rank(self.process_group) if self.distributed else 0
            patient = torch.arange(n_rows, device=device) + (rank << _RANK_SHIFT)
        return tensors, patient, self._availability(availability, given, n_rows, device)

    def _availability(
        self,
        availability: Mapping[str, Tensor] | Tensor | None,
        given: Mapping[str, Tensor],
        n_rows: int,
        device: torch.device,
    ) -> Tensor | None:
        if availability is None and len(given) == len(self.modalities):
            return None
        everywhere = torch.ones(n_rows, dtype=torch.bool, device=device)
        if isinstance(availability, Tensor):
            if availability.ndim != 2 or len(availability) != len(self.modalities):
                raise SettingsError(
                    f"availability must be bool [{len(self.modalities)}, {n_rows}] (modality, row), "
                    f"got {list(availability.shape)}"
                )
            by_name: Mapping[str, Tensor] = dict(zip(self.modalities, availability, strict=True))
        else:
            by_name = availability or {}
        if unknown := sorted(set(by_name) - set(self.modalities)):
            raise SettingsError(f"availability of unknown modality {', '.join(unknown)}")
        rows = []
        for name in self.modalities:
            row = by_name.get(name, everywhere)
            if row.shape != (n_rows,) or row.is_floating_point():
                raise SettingsError(
                    f"availability of {name} must be bool [{n_rows}], got {row.dtype} {list(row.shape)}"
                )
            if name in given and row.device != device:
                raise SettingsError(f"availability of {name} is on {row.device}, the loss on {device}")
            rows.append(row.bool() if name in given else ~everywhere)
        return torch.stack(rows)


def _key(modality: str, other: str) -> str:
    return f"{modality}_to_{other}"
