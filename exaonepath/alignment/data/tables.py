"""A table of one modality: patients x features, dense float32 or sparse, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

BLOCK_VALUES = 1 << 22  # values in memory in addition to the table: 16 MiB in float32, 32 in the float64 of a parser


@dataclass(frozen=True, eq=False)
class ModalityTable:
    """Measurements of one modality.

    Attributes:
        patients: P patient ids, one per row.
        features: F feature names, one per column.
        values: float32 [P, F]; a scipy CSR matrix if most values are zero. NaN is a value that was not measured.
        scale: scale of the numbers ("counts", "tpm", "log", "indicator", "copy-number", "beta", "m-value", "any").
        source: origin of the table, for messages.
    """

    patients: tuple[str, ...]
    features: tuple[str, ...]
    values: Any
    scale: str = "any"
    source: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether `values` is a CSR matrix."""
        return bool(sparse.issparse(self.values))

    def rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [len(rows), F], dense, of the given rows."""
        part = self.values[np.asarray(rows, dtype=np.intp)]
        return part.toarray() if sparse.issparse(part) else np.ascontiguousarray(part)

    def take(self, rows: Sequence[int] | np.ndarray) -> ModalityTable:
        """The table of the given rows, in that order."""
        rows = np.asarray(rows, dtype=np.intp)
        if np.array_equal(rows, np.arange(len(self.patients))):
            return self
        return replace(self, patients=tuple(self.patients[i] for i in rows), values=self.values[rows])

    def row_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, float32 [rows, F]) over the whole table, dense, about 16 MiB at a time."""
        step = max(1, BLOCK_VALUES // max(1, len(self.features)))
        for start in range(0, len(self.patients), step):
            rows = slice(start, min(start + step, len(self.patients)))
            part = self.values[rows]
            yield rows, part.toarray() if sparse.issparse(part) else part
