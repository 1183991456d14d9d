"""The arithmetic between a measured profile and the input of an encoder, used by training and by the model."""

from __future__ import annotations

import torch
from torch import Tensor

from exaonepath.errors import SettingsError


def transformed(values: Tensor, transform: str, totals: Tensor | None = None) -> Tensor:
    """Measured values [B, F] after the transform of their scale; NaN stays NaN.

    Args:
        values: [B, F], floating point.
        transform: "none", "log1p", or "cpm_log1p" (counts per million of the patient's total, then log1p).
        totals: [B] for "cpm_log1p": sums over all measured features; default: sums of `values`.

    Raises:
        SettingsError: the transform is unknown.
    """
    if transform not in ("none", "log1p", "cpm_log1p"):
        raise SettingsError(f"unknown transform {transform!r}; choose none, log1p or cpm_log1p")
    if transform == "none":
        return values
    # A warning about a wrong scale was already reported for negative values. log1p of values below -1 would be NaN.
    values = values.clamp(min=0)
    if transform == "cpm_log1p":
        totals = values.nansum(1) if totals is None else totals
        values = values * (1e6 / totals.clamp(min=1)).to(values.dtype)[:, None]
    return values.log1p()


def standardized(values: Tensor, mean: Tensor, std: Tensor, clip: float | None) -> Tensor:
    """Transformed values [B, F] in standard deviations of the training patients, clipped; missing values are 0."""
    x = missing_as_mean((values - mean) / std)
    return x if clip is None else x.clamp(-clip, clip)


def missing_as_mean(x: Tensor) -> Tensor:
    """Replace NaN by 0, the mean of standardised values. Infinity is kept, so that it stays visible in the loss."""
    return torch.where(torch.isnan(x), 0, x)
