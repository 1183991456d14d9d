"""The embeddings file: `slide_embedding`, `patch_embedding`, the location of each patch, and how they were made.

The file of a slide of which only the slide embedding is kept has no `patch_embedding`, which is all but a few kB of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, UnfinishedFileError
from exaonepath.files.artifact import Kind
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import atomic_h5

PATCHES = "patch_embedding"
DATASETS = ("slide_embedding", "coords", "contour_index")  # in every file
KIND = Kind(DATASETS)
# The attributes that `embed_features_file` stores; no other attribute of a file is read.
ATTRIBUTES = (
    "features_sha256",
    "weights_fingerprint",
    "dtype",
    "settings_hash",
    "weights",
    "random_weights",
    "n_patches",
    "n_failed",
    "exaonepath_version",
    "slide_fingerprint",
    "slide_path",
    "slide_mtime_ns",
    "reader",
    "features_settings_hash",
    "patch_weights_fingerprint",
    "preprocessing",
    "features_computed_in",
    "feature_dtype",
    "patches_settings_hash",
    "patch_size",
    "feature_width",
    "patient",
    "request",
    "complete",
)


@dataclass(frozen=True)
class SlideEmbedding:
    """Embeddings of one slide.

    Attributes:
        slide_embedding: float32 [C + E]; zeros for a slide without tissue.
        patch_embedding: float32 [N, C + E], patch features next to the slide encoder's output; None if the file was
            kept without them and the caller allows that.
        coords: int32 [N, 2], (x, y) at level 0 in pixels.
        contour_index: int32 [N], tissue fragment of each patch.
        attrs: how they were made (weights, dtype, hashes); `patch_size` is the side of a patch in level-0 pixels, and
            `feature_width` is C. Files of earlier versions lack these two.
    """

    slide_embedding: np.ndarray
    patch_embedding: np.ndarray | None
    coords: np.ndarray
    contour_index: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)


def write_embedding(path: Path, embedding: SlideEmbedding, attrs: Mapping[str, Any]) -> None:
    """Write an embeddings file, whole or not at all; `attrs` states how the embeddings were made.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_h5(path) as file:
        for name in ("slide_embedding", PATCHES, "coords", "contour_index"):
            values = getattr(embedding, name)
            if values is not None:
                file.array(name, values)
        file.attributes({**attrs, "complete": True})


def read_embedding(path: str | os.PathLike[str], *, require_patches: bool = True) -> SlideEmbedding:
    """Read an embeddings file.

    Args:
        path: the HDF5 file.
        require_patches: if False, a file without patch embeddings is accepted, and `patch_embedding` is None.

    Raises:
        DataFileError: the file is missing, damaged or incomplete, its datasets do not match each other, or it has no
            patch embeddings.
    """
    with open_h5(path, DATASETS) as file:
        if not file.attribute("complete", False):
            raise UnfinishedFileError(
                f'{path} is half written: it has no "complete" mark, which comes last; make it again'
            )
        if require_patches and PATCHES not in file:
            raise DataFileError(
                f"{path} was kept without patch embeddings (--keep); read it with require_patches=False for the slide "
                "embedding alone, or encode the slide again with --keep all"
            )
        attrs = file.attributes(ATTRIBUTES)
        width = len(slide := file.dataset("slide_embedding", "f", (None,)))
        patches = file.dataset(PATCHES, "f", (None, width)) if PATCHES in file else None
        coords = file.dataset("coords", "iu", (None if patches is None else len(patches), 2))
        contours = file.dataset("contour_index", "iu", (len(coords),))
        values = None if patches is None else patches.read()
        return SlideEmbedding(slide.read(), values, coords.read(), contours.read(), attrs)


def read_slide_embedding(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """(`slide_embedding` float32 [C + E], attributes) of an embeddings file; nothing else of it is read.

    Raises:
        DataFileError: the file is missing, damaged or incomplete, or is of another kind.
    """
    with open_h5(path, DATASETS[:1]) as file:
        if not file.attribute("complete", False):
            raise UnfinishedFileError(f"{path} is half written; make it again")
        return file.dataset("slide_embedding", "f", (None,)).read(), file.attributes(ATTRIBUTES)
