"""One embedding per patient from whatever modalities there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exaonepath.errors import SettingsError

_SHORTEST = 1e-6


def fuse(pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor]], available: Mapping[str, Tensor]) -> Tensor:
    """Fuse what the pairs' shared spaces hold.

    Training pulls u = l2norm(h_i W_ij) and v = l2norm(h_j W_ji) of one patient together, for every pair (i, j) in a
    space of that pair's own. So each pair gives one estimate of the patient: the mean of those of u and v that are
    there, made a unit vector. The fused embedding is the estimates side by side, 0 for a pair of which neither is
    there, scaled to unit length. A missing modality thus costs certainty in its pairs, which the other side still
    fills; two patients with different modalities are compared over the pairs that both have.

    Args:
        pairs: (i, j) to (u, v), unit vectors [B, d] each; rows of missing modalities hold anything finite.
        available: modality to bool [B].

    Returns:
        [B, P d] of unit length; zeros for a patient without any modality of the pairs.

    Raises:
        SettingsError: no pair.
    """
    if not pairs:
        raise SettingsError("no pair of modalities was trained: there is no shared space to fuse in")
    blocks, filled = [], []
    for (i, j), (u, v) in pairs.items():
        has_u, has_v = (available[name].to(u.device)[:, None] for name in (i, j))
        total = torch.where(has_u, u, 0) + torch.where(has_v, v, 0)
        length = torch.linalg.vector_norm(total, dim=1, keepdim=True)
        # Two views that say exact opposites have no mean direction: the pair abstains.
        there = length > _SHORTEST
        blocks.append(torch.where(there, total / length.clamp(min=_SHORTEST), 0))
        filled.append(there)
    count = torch.cat(filled, 1).sum(1, keepdim=True).clamp(min=1)
    return torch.cat(blocks, 1) / count.sqrt()
