"""Geometry of embeddings: number of directions, uniformity on the sphere, and distance of positives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exaonepath.errors import SettingsError

_MOST_ROWS = 4096  # uniformity needs all pairs of rows; if there are more rows, every k-th one is used


def effective_rank(embedding: Any) -> float:
    """Exponential of the entropy of the normalised singular values of [n, d] (Roy & Vetterli 2007; RankMe, 2023).

    Rows are scaled to length 1 and not centred: identical rows give 1, rows that are distributed evenly over k
    directions give k. NaN without rows, or if a number is not finite.
    """
    rows = _unit(embedding)
    if not rows.numel() or not rows.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(rows)
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def uniformity(embedding: Any, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential exp(-t |x - y|^2) over pairs of distinct rows (Wang & Isola 2020, eq. 2).

    0 if all rows are equal; about -2t for rows that are distributed over a sphere of high dimension. NaN with fewer
    than two rows.
    """
    rows = _unit(embedding)
    rows = rows[:: max(1, -(-len(rows) // _MOST_ROWS))]
    if len(rows) < 2:
        return math.nan
    squared = (2 - 2 * (rows @ rows.T)).clamp(min=0)
    upper = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    exponents = -t * squared[upper[0], upper[1]]
    return float(torch.logsumexp(exponents, 0)) - math.log(exponents.numel())


def alignment(left: Any, right: Any, alpha: float = 2.0) -> float:
    """Mean of |x - y|^alpha over positive pairs, row by row, on unit vectors (Wang & Isola 2020, eq. 1).

    0 for perfect alignment, 2 (alpha 2) for unrelated vectors. NaN without rows.

    Raises:
        SettingsError: the two have different shapes.
    """
    x, y = _unit(left), _unit(right)
    if x.shape != y.shape:
        raise SettingsError(f"alignment compares rows one by one; got shapes {list(x.shape)} and {list(y.shape)}")
    return float((x - y).norm(dim=1).pow(alpha).mean()) if len(x) else math.nan


def _unit(embedding: Any) -> Tensor:
    rows = torch.as_tensor(embedding).detach()
    if rows.ndim != 2:
        raise SettingsError(f"embeddings must be a matrix [n, d], got shape {list(rows.shape)}")
    return F.normalize(rows.to(torch.float64 if rows.device.type == "cpu" else torch.float32), dim=1)
