"""Features matched by name: those that a model was trained on, and those that a table has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class FeatureMatch:
    """Where the features of a model are in a table, and what differs.

    Attributes:
        columns: int64 [F], the column of each feature of the model; -1 if the table lacks it.
        lacking: features of the model that the table lacks, in the model's order.
        surplus: features of the table that the model does not have, in the table's order.
    """

    columns: np.ndarray
    lacking: list[str]
    surplus: list[str]

    @staticmethod
    def of(wanted: Sequence[str], found: Sequence[str]) -> FeatureMatch:
        """Match the features of a model (`wanted`) with the columns of a table (`found`), which may be in any order."""
        column, known = {name: i for i, name in enumerate(found)}, set(wanted)
        return FeatureMatch(
            np.array([column.get(name, -1) for name in wanted], np.int64),
            [name for name in wanted if name not in column],
            [name for name in found if name not in known],
        )
