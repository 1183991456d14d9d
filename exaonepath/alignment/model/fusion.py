"""One embedding per patient from all available modalities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exaonepath.errors import SettingsError

_SHORTEST = 1e-6


def fuse(pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor]], available: Mapping[str, Tensor]) -> Tensor:
    """Fuse the projections of all pairs.

    Training makes u = l2norm(h_i W_ij) and v = l2norm(h_j W_ji) of one patient similar, for every pair (i, j) in a
    separate space. So each pair gives one estimate of the patient: the mean of u and v if both are available, else the
    available one, as a unit vector. The fused embedding is the concatenation of the estimates, scaled to unit length,
    with 0 for a pair without any available modality. If one modality of a pair is missing, the estimate is less
    certain, but the other modality still gives one. Two patients with different modalities are compared over the pairs
    that both have.

    Args:
        pairs: (i, j) to (u, v), unit vectors [B, d] each; rows of missing modalities may have any finite values.
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
        # Two opposite vectors have no mean direction: then the pair counts as not available.
        present = length > _SHORTEST
        blocks.append(torch.where(present, total / length.clamp(min=_SHORTEST), 0))
        filled.append(present)
    count = torch.cat(filled, 1).sum(1, keepdim=True).clamp(min=1)
    return torch.cat(blocks, 1) / count.sqrt()
