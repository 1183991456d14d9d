"""The embeddings file: `slide_embedding`, `patch_embedding`, the location of each patch, and how they were made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import UnfinishedFileError
from exaonepath.files.artifact import Kind
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import atomic_h5

DATASETS = ("slide_embedding", "patch_embedding", "coords", "contour_index")
KIND = Kind(DATASETS)
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
    "complete",
)


@dataclass(frozen=True)
class SlideEmbedding:
    """Embeddings of one slide.

    Attributes:
        slide_embedding: float32 [C + E]; zeros for a slide without tissue.
        patch_embedding: float32 [N, C + E], patch features next to the slide encoder's output.
        coords: int32 [N, 2], (x, y) at level 0 in pixels.
        contour_index: int32 [N], tissue fragment of each patch.
        attrs: how they were made (weights, dtype, hashes).
    """

    slide_embedding: np.ndarray
    patch_embedding: np.ndarray
    coords: np.ndarray
    contour_index: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)


def write_embedding(path: Path, embedding: SlideEmbedding, attrs: Mapping[str, Any]) -> None:
    """Write an embeddings file, whole or not at all; `attrs` states how the embeddings were made.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_h5(path) as file:
        for name in DATASETS:
            file.array(name, getattr(embedding, name))
        file.attributes({**attrs, "complete": True})


def read_embedding(path: str | os.PathLike[str]) -> SlideEmbedding:
    """Read an embeddings file.

    Raises:
        DataFileError: the file is missing, damaged or incomplete, or its datasets do not match each other.
    """
    with open_h5(path, DATASETS) as file:
        if not file.attribute("complete", False):
            raise UnfinishedFileError(
                f'{path} is half written: it has no "complete" mark, which comes last; make it again'
            )
        attrs = file.attributes(ATTRIBUTES)
        width = len(slide := file.dataset("slide_embedding", "f", (None,)))
        n = len(patches := file.dataset("patch_embedding", "f", (None, width)))
        coords, contours = file.dataset("coords", "iu", (n, 2)), file.dataset("contour_index", "iu", (n,))
        return SlideEmbedding(slide.read(), patches.read(), coords.read(), contours.read(), attrs)
