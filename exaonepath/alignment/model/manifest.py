"""Matching the features of a table to those a model was trained on: by name, and never silently."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from exaonepath.errors import WeightsError
from exaonepath.text import few

logger = logging.getLogger(__name__)


def match_features(modality: str, wanted: Sequence[str], found: Sequence[str], *, by_name: bool = False) -> Tensor:
    """Where each feature of the model stands in a table.

    Args:
        modality: for messages.
        wanted: the model's feature names. found: the table's column names, in any order.
        by_name: take what is there; features that the table lacks count as average, which is logged.

    Returns:
        int64 [len(wanted)]: column of each feature, -1 where the table lacks it.

    Raises:
        WeightsError: the table lacks features of the model and `by_name` was not asked for, or nothing is in common.
            (Further columns are no obstacle: a table as measured has always more than a model was trained on.)
    """
    column = {name: i for i, name in enumerate(found)}
    places = torch.tensor([column.get(name, -1) for name in wanted], dtype=torch.int64)
    lacking = [name for name in wanted if name not in column]
    known = set(wanted)
    surplus = [name for name in found if name not in known]
    if not lacking:
        return places
    differences = "; ".join(
        f"{len(names)} of {of} {what}: {few(names, 8)}"
        for names, of, what in (
            (lacking, len(wanted), "features of the model are not in the table"),
            (surplus, len(found), "features of the table are unknown to the model"),
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
    """Columns of `values` [B, F] in the model's order [B, len(places)]; NaN, the mark of a missing value, where -1."""
    taken = values[:, places.clamp(min=0)]
    return torch.where(places >= 0, taken, torch.nan)
