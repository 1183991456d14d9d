"""Exact cosine similarity between patches, of one slide or of a whole cohort.

The vectors of a slide are read once, through all checks of the file, and written as rows of length 1 to a temporary
file that is memory-mapped. A query is then a matrix-vector product over that file: exhaustive, so exact, and as fast as
the memory is. Memory stays free for other programs, whatever the size of the cohort.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exaonepath.errors import OutputError
from exaonepath.files.hdf5 import open_h5
from exaonepath.viz.values.results import VectorSource


@dataclass(frozen=True)
class UnitRows:
    """The vectors of one slide, scaled to length 1.

    Attributes:
        rows: float32 [N, D], memory-mapped, read only; a vector that is zero or not finite is all zeros.
        usable: bool [N], False for those.
    """

    rows: np.ndarray
    usable: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class VectorStore:
    """Unit vectors of slides in a temporary folder. Safe to share between threads; `close` removes the folder.

    Args:
        folder: where the temporary folder is made; None: the system's (TMPDIR).
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="exaonepath-viewer-", dir=folder, ignore_cleanup_errors=True)
        self._lock = threading.Lock()
        self._made: dict[str, tuple[threading.Lock, list[UnitRows]]] = {}
        self._files = 0

    def get(self, name: str, source: VectorSource) -> UnitRows:
        """The unit vectors of a slide, made at the first call for a name.

        Args:
            name: names the vectors, and has to change whenever the file does.
            source: where they are stored.

        Raises:
            DataFileError: the file is damaged.
            OutputError: the temporary folder is full.
        """
        with self._lock:
            lock, made = self._made.setdefault(name, (threading.Lock(), []))
        with lock:
            if not made:
                made.append(self._make(source))
            return made[0]

    def has(self, name: str) -> bool:
        """Whether the vectors of this name are ready."""
        held = self._made.get(name)
        return held is not None and bool(held[1])

    def cosine(self, unit: UnitRows, query: np.ndarray) -> np.ndarray:
        """Cosine between a unit vector [D] and every row: float32 [N]; NaN for rows that are not usable."""
        result = np.empty(len(unit), np.float32)
        if len(unit):
            # One call of BLAS, which shares the rows between its threads: with threads of our own around it, this takes
            # twice as long on a busy machine (bench/test_viewer.py).
            np.dot(unit.rows, np.ascontiguousarray(query, np.float32), out=result)
            if not unit.usable.all():
                result[~unit.usable] = np.nan
        return result

    def close(self) -> None:
        """Remove the temporary files; vectors that are still mapped stay usable where the system allows it."""
        with self._lock:
            self._made.clear()
        self._folder.cleanup()

    def _make(self, source: VectorSource) -> UnitRows:
        with self._lock:
            self._files += 1
            path = Path(self._folder.name, f"{self._files}.f32")
        with open_h5(source.path, [source.dataset]) as file:
            dataset = file.dataset(source.dataset, "f", (None, None))
            first, last = source.columns
            shape = len(dataset), last - first
            usable = np.zeros(shape[0], bool)
            try:
                with path.open("wb") as output:
                    for start, part in dataset.parts():
                        rows, usable[start : start + len(part)] = unit_rows(part[:, first:last])
                        output.write(rows.data)
            except OSError as exc:
                raise OutputError(
                    f"the vectors of {source.path} ({4 * shape[0] * shape[1] / 1e9:.1f} GB) cannot be written to "
                    f"{path.parent}: {exc.strerror}; set TMPDIR to a folder with more space"
                ) from exc
        if not shape[0] or not shape[1]:
            return UnitRows(np.empty(shape, np.float32), usable)
        mapped = np.memmap(path, np.float32, "r", shape=shape)
        return UnitRows(np.asarray(mapped), usable)


def unit_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, D] scaled to length 1 as contiguous float32, and which of them are usable: bool [N]."""
    rows = np.ascontiguousarray(values, np.float32)
    # Scaled by the largest value first: squares of very large or very small numbers would not fit into float32.
    largest = np.abs(rows).max(axis=1, initial=0)
    usable = np.isfinite(largest) & (largest > 0)  # a NaN or an infinity in a row makes its largest value one
    scaled = np.where(usable[:, None], rows, 0) / np.where(usable, largest, 1)[:, None]
    lengths = np.sqrt(np.einsum("nd,nd->n", scaled, scaled, dtype=np.float32))
    scaled /= np.where(usable, lengths, 1)[:, None]
    return scaled.astype(np.float32, copy=False), usable


@dataclass(frozen=True)
class Match:
    """A patch that resembles the query: slide (position in the given list), row, cosine."""

    slide: int
    row: int
    cosine: float


def most_similar(
    store: VectorStore, slides: Sequence[UnitRows], query: np.ndarray, count: int, skip: tuple[int, int] | None = None
) -> list[Match]:
    """The `count` rows of all slides with the largest cosine to a unit vector [D], the most similar first.

    Args:
        store: computes the products.
        slides: their unit vectors; slides of another width are left out.
        query: the unit vector.
        count: matches that are returned at most.
        skip: (slide, row) that is left out: the query itself.

    Returns:
        Equal cosines are in the order of slide and row.
    """
    best: list[Match] = []
    for number, unit in enumerate(slides):
        if not len(unit) or unit.rows.shape[1] != len(query):
            continue
        cosines = store.cosine(unit, query)
        cosines[~unit.usable] = -np.inf
        if skip is not None and skip[0] == number:
            cosines[skip[1]] = -np.inf
        for row in top_rows(cosines, count):
            if np.isfinite(cosines[row]):
                best.append(Match(number, int(row), float(cosines[row])))
        best = sorted(best, key=lambda match: (-match.cosine, match.slide, match.row))[:count]
    return best


def top_rows(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values [N], largest first; of equal values, those with the smallest index."""
    if count < len(values):
        limit = np.partition(values, len(values) - count)[len(values) - count]
        above, equal = np.flatnonzero(values > limit), np.flatnonzero(values == limit)
        chosen = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    else:
        chosen = np.arange(len(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]
