"""The softmax contrastive loss of CLIP (arXiv 2103.00020), for comparison with the sigmoid loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_pair_loss(u: Tensor, v: Tensor, log_t: Tensor, patients: Tensor) -> Tensor:
    """Cross-entropy of finding a row's own patient among all rows, mean over both directions.

    Args:
        u, v: [n, d] unit vectors of the rows that have both modalities.
        log_t: [], log of the factor on the cosine.
        patients: int64 [n]; rows of one patient are positives of each other, and their log-probabilities are averaged.

    Returns:
        [], float32 or wider; 0 if n is 0.
    """
    if not len(u):
        return log_t * 0
    logits = log_t.exp() * (u @ v.T)
    same = patients[:, None] == patients[None, :]
    share = same / same.sum(1, keepdim=True)
    directions = [-(F.log_softmax(s, dim=1) * share).sum(1).mean() for s in (logits, logits.T)]
    return torch.stack(directions).mean()
