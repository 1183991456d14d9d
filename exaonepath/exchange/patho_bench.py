"""The layout of Patho-Bench (github.com/mahmoodlab/Patho-Bench), to run its benchmarks: facts about its readers.

    pooled   <folder>/<sample>.h5    features [1, D]: a slide or a patient
    patches  <folder>/<slide>.h5     features [N, D], coords [N, 2] with the attribute `patch_size_level0`, as TRIDENT's

Patho-Bench removes the leading dimension of 1 of a pooled sample itself, and fails if there is none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.exchange.foreign_hdf5 import write_datasets
from exaonepath.exchange.slide_patches import SlidePatches, file_name
from exaonepath.exchange.trident import coords_attributes
from exaonepath.files.atomic import ensure_folder

NAME = "Patho-Bench"


def plan(slide: SlidePatches, to: Path) -> dict[str, Path]:
    """The files of a slide: "patches", and "pooled" if it has a slide embedding."""
    name = file_name(slide.id)
    files = {} if slide.vectors is None else {"patches": to / "patches" / f"{name}.h5"}
    return files | ({} if slide.slide_vector is None else {"pooled": to / "pooled" / f"{name}.h5"})


def write(slide: SlidePatches, to: Path) -> list[Path]:
    """Write the files of a slide, each whole or not at all; see `plan`.

    Raises:
        OutputError, DataFileError, SettingsError: see `write_datasets`; the id cannot be a file name.
    """
    files = plan(slide, to)
    for kind, path in files.items():
        ensure_folder(path.parent)
        if kind == "patches":
            about = {"features": {"name": slide.id}, "coords": _coords_attributes(slide)}
            write_datasets(path, {"features": slide.matrix, "coords": slide.coords.astype(np.int64)}, about)
        elif slide.slide_vector is not None:
            _write_pooled(path, slide.id, np.asarray(slide.slide_vector, np.float32), {})
    return list(files.values())


def _coords_attributes(slide: SlidePatches) -> dict[str, Any]:
    if slide.target_size is not None and slide.target_mpp:
        return coords_attributes(slide)
    return {"patch_size_level0": slide.patch_size, "name": slide.id}


def write_pooled(folder: str | os.PathLike[str], embeddings: Mapping[str, Any], **attrs: Any) -> list[Path]:
    """Write one pooled file per sample.

    Args:
        folder: created if it does not exist.
        embeddings: sample id (slide or patient) -> [D].
        attrs: attributes of each `features`, numbers or text (for example their origin).

    Returns:
        The files, in the order of the samples.

    Raises:
        SettingsError: an id is no file name, a row is not finite, or widths differ.
        OutputError: a file cannot be written.
    """
    rows = {file_name(sample): _row(sample, values) for sample, values in embeddings.items()}
    if len({row.shape for row in rows.values()}) > 1:
        raise SettingsError(f"embeddings differ in width: {sorted({row.shape[0] for row in rows.values()})}")
    base = ensure_folder(folder)
    for sample, row in rows.items():
        _write_pooled(base / f"{sample}.h5", sample, row, attrs)
    return [base / f"{sample}.h5" for sample in rows]


def _write_pooled(path: Path, sample: str, row: np.ndarray, attrs: Mapping[str, Any]) -> None:
    write_datasets(path, {"features": row[None]}, {"features": {"name": sample, **attrs}})


def _row(sample: str, values: Any) -> np.ndarray:
    row = np.asarray(values, np.float32)
    if row.ndim != 1 or not np.isfinite(row).all():
        raise SettingsError(f"embedding of {sample} must be finite numbers [D], got shape {list(row.shape)}")
    return row
