"""Matching of the features of a table to those of a model, by name; differences are logged or raise an error."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from exaonepath.alignment.feature_match import FeatureMatch
from exaonepath.errors import WeightsError
from exaonepath.text import few

logger = logging.getLogger(__name__)


def match_features(modality: str, wanted: Sequence[str], found: Sequence[str], *, by_name: bool = False) -> Tensor:
    """The column of each feature of the model in a table.

    Args:
        modality: for messages.
        wanted: the model's feature names. found: the table's column names, in any order.
        by_name: use the features that the table has; missing ones count as the training mean, and a warning is logged.

    Returns:
        int64 [len(wanted)]: column of each feature, -1 if the table lacks it.

    Raises:
        WeightsError: the table lacks features of the model and `by_name` is False, or no feature is in common.
            (Additional columns are allowed: a measured table always has more features than a model.)
    """
    match = FeatureMatch.of(wanted, found)
    places, lacking = torch.from_numpy(match.columns), match.lacking
    if not lacking:
        return places
    differences = "; ".join(
        f"{len(names)} of {of} {what}: {few(names, 8)}"
        for names, of, what in (
            (lacking, len(wanted), "features of the model are not in the table"),
            (match.surplus, len(found), "features of the table are unknown to the model"),
        )
        if names
    )
    if len(lacking) == len(wanted):
        raise WeightsError(f"{modality}: the model was trained on other features, none is in common; {differences}")
    if not by_name:
        raise WeightsError(
            f"{modality}: the model was trained on other features; {differences}. Ask for matching by name to use the "
            f"{len(wanted) - len(lacking)} in common"
        )
    logger.warning("%s: matched by name; %s (missing ones count as the training mean)", modality, differences)
    return places


def take_features(values: Tensor, places: Tensor) -> Tensor:
    """Columns of `values` [B, F] in the model's order [B, len(places)]; NaN (a missing value) if the place is -1."""
    taken = values[:, places.clamp(min=0)]
    return torch.where(places >= 0, taken, torch.nan)
