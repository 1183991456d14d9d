"""The training objective: the pairwise sigmoid loss or, for comparison, a softmax over the same projections."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.softmax import softmax_pair_loss
from exaonepath.errors import SettingsError


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of a batch.

    Attributes:
        loss: [], to differentiate.
        pair_losses: pair to its loss, only of pairs with a positive.
        statistics: numbers for the log.
    """

    loss: Tensor
    pair_losses: dict[tuple[str, str], Tensor]
    statistics: dict[str, float]


class AlignmentObjective:
    """The loss of the model's configuration, over its projections, temperatures and biases."""

    def __init__(self, model: ExaonePathAlignmentModel, *, distributed: bool = False) -> None:
        """Raises `SettingsError` for a softmax over several processes, which is not implemented.

        With `distributed`, the loss is over the rows of all processes, and the gradients of the processes must be
        summed.
        """
        if distributed and model.config.loss == "softmax":
            raise SettingsError("loss.kind = softmax runs in one process; the sigmoid loss on any number of them")
        self.model = model
        # A shallow copy has the parameters of the model's loss, and options of its own: the model stays as it is.
        self.loss = copy.copy(model.loss)
        self.loss.distributed, self.loss.gradients_for = distributed, "sum"

    def __call__(
        self, embeddings: Mapping[str, Tensor], available: Mapping[str, Tensor], patients: Tensor
    ) -> ObjectiveOutput:
        """The loss over all rows, including those of other processes.

        Args:
            embeddings: modality to [B, E_m]. available: modality to bool [B].
            patients: int64 [B], equal for rows of one patient.
        """
        if self.model.config.loss == "softmax":
            return self._softmax(embeddings, available, patients)
        output = self.loss(embeddings, patients, available)
        losses, statistics = {}, {}
        log_t, bias = self.loss.log_t.detach(), self.loss.bias.detach()
        for i, (a, b) in enumerate(self.loss.pairs):
            if output.n_positive[i] > 0 and self.model.pair_weight((a, b)) > 0:
                losses[a, b] = output.pair_losses[i]
                statistics[f"positive_logit/{a}-{b}"] = float(output.positive_logit[i])
                statistics[f"negative_logit/{a}-{b}"] = float(output.negative_logit[i])
                statistics[f"t/{a}-{b}"], statistics[f"b/{a}-{b}"] = float(log_t[i]), float(bias[i])
        return ObjectiveOutput(output.loss, losses, statistics)

    def _softmax(
        self, embeddings: Mapping[str, Tensor], available: Mapping[str, Tensor], patients: Tensor
    ) -> ObjectiveOutput:
        losses: dict[tuple[str, str], Tensor] = {}
        weights: list[float] = []
        for a, b in self.model.trained_pairs:
            both = available[a] & available[b]
            if both.any():
                u, v = self.model.project(embeddings[a][both], a, b), self.model.project(embeddings[b][both], b, a)
                losses[a, b] = softmax_pair_loss(u, v, self.loss.log_t[self.loss.pairs.index((a, b))], patients[both])
                weights.append(self.model.pair_weight((a, b)))
        if not losses:
            return ObjectiveOutput(self.loss.log_t.sum() * 0, {}, {})
        share = torch.tensor(weights, device=patients.device) / sum(weights)
        total = (torch.stack(list(losses.values())) * share).sum()
        return ObjectiveOutput(total, {pair: loss.detach() for pair, loss in losses.items()}, {})
