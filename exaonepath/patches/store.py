"""The HDF5 file of patch coordinates: EXAONE Path's layout, plus what tells whether the file is still valid."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from exaonepath.errors import DataFileError
from exaonepath.files.artifact import canonical_json, settings_hash
from exaonepath.files.hdf5 import atomic_h5, open_h5
from exaonepath.patches.slide import SlideImage
from exaonepath.version import __version__


@dataclass(frozen=True)
class PatchSet:
    """Patches of one slide.

    Attributes:
        coords: int32 [N, 2], top left corners (x, y) in level-0 pixels.
        contour_index: int32 [N], the tissue contour each patch belongs to; all zero where the file does not say.
        patch_size: side of a patch in level-0 pixels ("effective": after scaling by MPP).
        patch_level: the pyramid level the grid was laid for.
        name: id of the slide (its file stem).
        slide_fingerprint: `SlideImage.fingerprint()` of the slide, None in a file made by EXAONE Path itself.
        settings_hash: hash of the settings that made the patches, None likewise.
    """

    coords: np.ndarray
    contour_index: np.ndarray
    patch_size: int
    patch_level: int
    name: str
    slide_fingerprint: str | None
    settings_hash: str | None

    def __len__(self) -> int:
        return len(self.coords)


def write_patches(
    path: str | os.PathLike[str],
    slide: SlideImage,
    coords: np.ndarray,
    contour_index: np.ndarray,
    *,
    patch_size: int,
    patch_level: int,
    settings: Mapping[str, Any],
) -> None:
    """Write a patch file, whole or not at all.

    Args:
        path: the HDF5 file to write, in an existing folder.
        slide: the slide the patches are of.
        coords, contour_index: int32 [N, 2] and [N]; N may be 0.
        patch_size: effective side in level-0 pixels.
        patch_level: level the grid was laid for.
        settings: what made the patches, plain JSON values.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_h5(path) as file:
        stored = file.create_dataset("coords", data=np.asarray(coords, np.int32).reshape(-1, 2))
        size = slide.level_dimensions[patch_level]
        stored.attrs.update(
            patch_size=patch_size,
            patch_level=patch_level,
            downsample=slide.level_downsamples[patch_level],
            downsampled_level_dim=size,
            level_dim=size,
            name=slide.name,
        )
        index = file.create_dataset("contour_index", data=np.asarray(contour_index, np.int32))
        index.attrs["name"] = slide.name
        file.attrs.update(
            n_coords=len(coords),
            settings=canonical_json(settings),
            settings_hash=settings_hash(settings),
            slide_fingerprint=slide.fingerprint(),
            slide_path=str(slide.path.resolve()),
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            exaonepath_version=__version__,
        )
        file.attrs["complete"] = True


def read_patches(path: str | os.PathLike[str]) -> PatchSet:
    """Read and check a patch file, made by this package or by EXAONE Path.

    Raises:
        DataFileError: missing, corrupt or half-written file; no coords; shapes or types that cannot be coordinates;
            coords and contour_index of different lengths; no patch_size.
    """
    path = Path(path)
    with open_h5(path, required=["coords"]) as file:
        try:
            return _parse(path, file)
        except (ValueError, TypeError) as exc:
            raise DataFileError(
                f"{path} cannot be read ({exc}); it is damaged: delete it and run patchfy again"
            ) from exc


def _parse(path: Path, file: h5py.File) -> PatchSet:
    if not bool(file.attrs.get("complete", False)):
        raise DataFileError(f'{path} is half written (no "complete" mark): delete it and run patchfy again')
    dataset = file["coords"]
    coords = _integers(path, dataset, "coords")
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise DataFileError(f"{path}: coords must be [N, 2], not {list(coords.shape)}")
    index = np.zeros(len(coords), np.int32)
    if "contour_index" in file:
        index = _integers(path, file["contour_index"], "contour_index")
        if index.shape != (len(coords),):
            raise DataFileError(f"{path}: contour_index is {list(index.shape)} for {len(coords)} coords")
    stated = file.attrs.get("n_coords")
    if stated is not None and int(stated) != len(coords):
        raise DataFileError(f"{path} states n_coords = {int(stated)} and holds {len(coords)}")
    if "patch_size" not in dataset.attrs:
        raise DataFileError(f"{path}: coords has no patch_size attribute")
    patch_size = int(dataset.attrs["patch_size"])
    if patch_size <= 0:
        raise DataFileError(f"{path}: patch_size is {patch_size}")
    return PatchSet(
        coords=coords,
        contour_index=index,
        patch_size=patch_size,
        patch_level=int(dataset.attrs.get("patch_level", 0)),
        name=_text(dataset.attrs.get("name")) or path.stem,
        slide_fingerprint=_text(file.attrs.get("slide_fingerprint")),
        settings_hash=_text(file.attrs.get("settings_hash")),
    )


def _integers(path: Path, dataset: h5py.Dataset, name: str) -> np.ndarray:
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "iu":
        kind = getattr(dataset, "dtype", "a group")
        raise DataFileError(f"{path}: {name} must hold integers, not {kind}")
    values = dataset[...]
    limits = np.iinfo(np.int32)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise DataFileError(f"{path}: {name} holds values beyond 32 bits")
    return values.astype(np.int32)


def stored_origin(path: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any]]:
    """(slide_path, settings) that made a readable patch file; (None, {}) for one made by EXAONE Path."""
    with open_h5(path) as file:
        settings = _text(file.attrs.get("settings"))
        return _text(file.attrs.get("slide_path")), json.loads(settings) if settings else {}


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.decode() if isinstance(value, bytes) else str(value)
