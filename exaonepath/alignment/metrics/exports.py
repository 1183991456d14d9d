"""Export of embeddings in the file layouts of TRIDENT and Patho-Bench, to run their benchmarks on them.

The layouts are facts about their readers and writers (github.com/mahmoodlab/TRIDENT, `WSI.extract_patch_features` and
`WSI.extract_slide_features`; github.com/mahmoodlab/Patho-Bench, `PatchEmbeddingsDataset`, `SlideEmbeddingsDataset`):

    TRIDENT, patches     features_<encoder>/<slide>.h5         features [N, D], coords [N, 2]
    TRIDENT, slides      slide_features_<encoder>/<slide>.h5   features [D], coords [N, 2]
    Patho-Bench, pooled  <folder>/<sample>.h5                  features [1, D]: a slide or a patient

each dataset with its attributes: `name` on features; `patch_size`, `patch_size_level0`, magnifications on coords.
Patho-Bench removes the leading dimension of 1 of a pooled sample itself, and fails if there is none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.alignment.metrics.retrieval import unit_rows
from exaonepath.errors import SettingsError
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.hdf5_output import atomic_h5

_UNSAFE = re.compile(r"[/\\\0]|^\.{0,2}$")


def export_pooled(folder: str | os.PathLike[str], embeddings: Mapping[str, Any], **attrs: Any) -> list[Path]:
    """Write one Patho-Bench file per sample.

    Args:
        folder: created if it does not exist.
        embeddings: sample id (slide or patient) -> [D].
        attrs: attributes of each `features`, numbers or text (for example their origin).

    Returns:
        The files, in the order of the samples.

    Raises:
        SettingsError: an id is no file name, a row is not finite, or widths differ.
    """
    rows = {sample: _row(sample, values) for sample, values in embeddings.items()}
    if len({row.shape for row in rows.values()}) > 1:
        raise SettingsError(f"embeddings differ in width: {sorted({row.shape[0] for row in rows.values()})}")
    base = ensure_folder(folder)
    return [_write(base / f"{sample}.h5", row[None], sample, None, {}, attrs) for sample, row in rows.items()]


def export_slide(
    folder: str | os.PathLike[str],
    slide: str,
    embedding: Any,
    coords: np.ndarray,
    *,
    patch_size_level0: int,
    patch_size: int = 256,
    coords_attrs: Mapping[str, Any] | None = None,
) -> Path:
    """Write one TRIDENT slide-features file: features [D], coords int [N, 2].

    Args:
        folder: `slide_features_<encoder>`, created if it does not exist.
        patch_size_level0, patch_size: side of a patch in level-0 pixels, and in pixels of the encoder's input.
        coords_attrs: more attributes of `coords` (level0_magnification, target_magnification, overlap, ...).
    """
    row = _row(slide, embedding)
    return _export(folder, slide, row, coords, patch_size_level0, patch_size, coords_attrs)


def export_patches(
    folder: str | os.PathLike[str],
    slide: str,
    features: Any,
    coords: np.ndarray,
    *,
    patch_size_level0: int,
    patch_size: int = 256,
    coords_attrs: Mapping[str, Any] | None = None,
) -> Path:
    """Write one TRIDENT patch-features file: features [N, D], coords int [N, 2]; arguments of `export_slide`."""
    unit_rows(features, f"features of {slide}")
    matrix = np.asarray(features, np.float32)
    if len(matrix) != len(coords):
        raise SettingsError(f"{slide}: {len(matrix)} feature rows for {len(coords)} coordinates")
    return _export(folder, slide, matrix, coords, patch_size_level0, patch_size, coords_attrs)


def _export(
    folder: str | os.PathLike[str],
    slide: str,
    features: np.ndarray,
    coords: np.ndarray,
    patch_size_level0: int,
    patch_size: int,
    coords_attrs: Mapping[str, Any] | None,
) -> Path:
    positions = np.asarray(coords)
    if positions.ndim != 2 or positions.shape[1] != 2 or positions.dtype.kind not in "iu":
        raise SettingsError(f"{slide}: coords must be integers [N, 2], got {positions.dtype} {list(positions.shape)}")
    attrs = {"patch_size": patch_size, "patch_size_level0": patch_size_level0, "name": slide, **(coords_attrs or {})}
    return _write(ensure_folder(folder) / f"{_checked(slide)}.h5", features, slide, positions, attrs, {})


def _write(
    path: Path,
    features: np.ndarray,
    name: str,
    coords: np.ndarray | None,
    coords_attrs: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> Path:
    with atomic_h5(path) as file:
        file.array("features", features.astype("<f4"))
        file.attributes({"name": name, **attrs}, of="features")
        if coords is not None:
            file.array("coords", coords)
            file.attributes(coords_attrs, of="coords")
    return path


def _row(sample: str, values: Any) -> np.ndarray:
    row = np.asarray(values, np.float32)
    if row.ndim != 1 or not np.isfinite(row).all():
        raise SettingsError(f"embedding of {sample} must be finite numbers [D], got shape {list(row.shape)}")
    _checked(sample)
    return row


def _checked(sample: str) -> str:
    if _UNSAFE.search(sample):
        raise SettingsError(f"sample id {sample!r} cannot be a file name")
    return sample
