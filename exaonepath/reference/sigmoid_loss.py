"""The all-pairwise sigmoid loss written out with dense B x B logits, from its definition (EXAONE Path 2.5; SigLIP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_sigmoid_loss(
    embeddings: Sequence[Tensor],
    projections: Mapping[tuple[int, int], Tensor],
    log_t: Tensor,
    bias: Tensor,
    patient: Tensor,
    availability: Tensor | None = None,
    *,
    pair_weights: Tensor | None = None,
    pos_weight: float | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_ij = sum over valid (k, l) of BCEWithLogits(exp(t_ij) <u_k, v_l> + b_ij, y_kl) / n_ij, averaged over the pairs.

    Args:
        embeddings: M tensors [B, E_m]. projections: W_ij [E_i, d] for every ordered pair (i, j).
        log_t, bias: [P] in the order of `itertools.combinations(range(M), 2)`.
        patient: [B] ids; rows of one patient are positives. availability: [M, B] bool; None: nothing is missing.
        pair_weights: [P], None for equal ones. pos_weight: None, a number, or "balanced".

    Returns:
        loss [], loss of each pair [P] (0 if it has no positive), number of valid positives [P].
    """
    if availability is None:
        availability = patient.new_ones((len(embeddings), len(patient)), dtype=torch.bool)
    same = patient[:, None] == patient[None, :]
    total, weight_sum = log_t.sum() * 0 + bias.sum() * 0, 0.0
    losses, counts = [], []
    for index, (i, j) in enumerate(combinations(range(len(embeddings)), 2)):
        # A missing row may have any values, NaN included, and must not be part of a product.
        h_i = torch.where(availability[i][:, None], embeddings[i], 0)
        h_j = torch.where(availability[j][:, None], embeddings[j], 0)
        u = F.normalize(h_i @ projections[i, j], dim=1)
        v = F.normalize(h_j @ projections[j, i], dim=1)
        logits = log_t[index].exp() * (u @ v.T) + bias[index]
        valid = availability[i][:, None] & availability[j][None, :]
        n_positive = (valid & same).sum()
        counts.append(n_positive)
        if n_positive == 0:
            losses.append(logits.new_zeros(()))
            total = total + logits.sum() * 0
            continue
        if pos_weight == "balanced":
            weight = (valid & ~same).sum() / n_positive.to(logits.dtype)
        else:
            weight = logits.new_tensor(1.0 if pos_weight is None else float(pos_weight))
        terms = F.binary_cross_entropy_with_logits(logits, same.to(logits.dtype), reduction="none", pos_weight=weight)
        losses.append((terms * valid).sum() / n_positive)
        pair_weight = 1.0 if pair_weights is None else float(pair_weights[index])
        total, weight_sum = total + pair_weight * losses[-1], weight_sum + pair_weight
    stacked = torch.stack(losses) if losses else log_t.new_zeros(0)
    return total / (weight_sum or 1.0), stacked, torch.stack(counts) if counts else patient.new_zeros(0)
