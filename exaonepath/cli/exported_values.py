"""Values of patches for exports: principal components, clusters, similarity to a patch, columns of a table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from exaonepath.exchange.slide_patches import SlidePatches, Values
    from exaonepath.viz.values.vectors import UnitRows

_CLUSTERS = 8


def values_of(names: Sequence[str], table: Path | None) -> Callable[[SlidePatches], Mapping[str, Values]] | None:
    """What computes the values for a slide; None if none are wanted.

    Args:
        names: "pca", "clusters", "clusters:N" or "similarity:PATCH".
        table: CSV file with values of patches (see `exaonepath view`).

    Raises:
        typer.BadParameter: a name is not known.
        SettingsError: the table cannot be read.
    """
    wanted = [_parsed(name) for name in names]
    if not wanted and table is None:
        return None
    from exaonepath.viz.values.table import PatchTable

    columns = None if table is None else PatchTable(table)

    def compute(slide: SlidePatches) -> Mapping[str, Values]:
        from exaonepath.exchange.slide_patches import Values

        found: dict[str, Values] = _computed(slide, wanted) if wanted else {}
        for name in () if columns is None else columns.names:
            column = columns.column(name, slide.id, slide.coords) if columns is not None else None
            if column is not None:
                found[name] = Values(column.values, column.categories)
        return found

    return compute


def _parsed(name: str) -> tuple[str, int]:
    kind, colon, text = name.partition(":")
    number = int(text) if text.isascii() and text.isdigit() else None
    if (kind == "pca" and not colon) or (kind == "similarity" and number is not None):
        return kind, number or 0
    if kind == "clusters" and (not colon or number is not None):
        from exaonepath.viz.values.analysis import MOST_CLUSTERS

        count = _CLUSTERS if number is None else number
        if 2 <= count <= MOST_CLUSTERS:
            return kind, count
        raise typer.BadParameter(f"there are 2 to {MOST_CLUSTERS} clusters, not {count}")
    raise typer.BadParameter(f"{name!r} is none of pca, clusters, clusters:N, similarity:PATCH")


def _computed(slide: SlidePatches, wanted: Sequence[tuple[str, int]]) -> dict[str, Values]:
    import numpy as np

    from exaonepath.errors import SettingsError
    from exaonepath.exchange.slide_patches import Values
    from exaonepath.viz.values.analysis import clusters, components

    found: dict[str, Values] = {}
    with tempfile.TemporaryDirectory(prefix="exaonepath-export-") as folder:
        unit = _unit_rows(slide, Path(folder, "rows.f32"))
        for kind, number in wanted:
            if kind == "pca":
                points = components(unit).points
                found |= {f"PCA {axis + 1}": Values(points[:, axis]) for axis in range(2)}
            elif kind == "clusters":
                labels = clusters(unit, number)
                found["cluster"] = Values(np.where(labels == 255, np.nan, labels).astype(np.float32))
            else:
                if number >= len(unit) > 0:  # a slide without patches, one of many perhaps, has no value to be wrong
                    raise SettingsError(f"{slide.id} has no patch {number}; it has {len(unit)}, numbered from 0")
                cosine = unit.rows @ np.array(unit.rows[number]) if len(unit) else np.empty(0, np.float32)
                found["similarity"] = Values(np.where(unit.usable, cosine, np.nan).astype(np.float32))
    return found


def _unit_rows(slide: SlidePatches, path: Path) -> UnitRows:
    """The vectors scaled to length 1, in a file that is mapped: memory does not grow with the slide."""
    import numpy as np

    from exaonepath.viz.values.vectors import UnitRows, unit_rows

    matrix = slide.matrix
    usable = np.zeros(matrix.shape[0], bool)
    if 0 in matrix.shape:
        return UnitRows(np.empty(matrix.shape, np.float32), usable)
    with path.open("wb") as file:
        for start, part in matrix.parts():
            rows, usable[start : start + len(part)] = unit_rows(part)
            file.write(rows.data)
    return UnitRows(np.asarray(np.memmap(path, np.float32, "r", shape=matrix.shape)), usable)
