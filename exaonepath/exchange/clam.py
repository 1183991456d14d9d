"""The layout of CLAM (github.com/mahmoodlab/CLAM): facts about its readers and writers, in our words.

    patches/<slide>.h5     coords [N, 2], level-0 pixels, with attributes (below)
    h5_files/<slide>.h5    features float32 [N, D], coords int32 [N, 2], without attributes
    pt_files/<slide>.pt    the same features as one tensor [N, D] (torch.save): what training reads

`coords` in patches/ has the attributes `patch_size` (pixels of `patch_level`), `patch_level`, `downsample` (of that
level, along x and y), `level_dim`, `downsampled_level_dim`, `name`, `save_path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.exchange.foreign_hdf5 import read_coords, stored_features, write_datasets
from exaonepath.exchange.slide_patches import Given, Matrix, SlidePatches, file_name, visible
from exaonepath.exchange.torch_files import stem, tensor_matrix, write_tensor
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.hdf5 import open_h5

NAME = "CLAM"
_PATCHES, _H5, _PT = "patches", "h5_files", "pt_files"


def plan(slide: SlidePatches, to: Path) -> dict[str, Path]:
    """The files of a slide: "patches", and where it has vectors "h5" and "pt"."""
    name = file_name(slide.id)
    files = {"patches": to / _PATCHES / f"{name}.h5"}
    if slide.vectors is not None:
        files |= {"h5": to / _H5 / f"{name}.h5", "pt": to / _PT / f"{name}.pt"}
    return files


def write(slide: SlidePatches, to: Path, *, batch_axis: bool = False) -> list[Path]:
    """Write the files of a slide, each whole or not at all; see `plan`.

    Args:
        slide: its patches.
        to: the folder that gets `patches`, `h5_files` and `pt_files`.
        batch_axis: write the features in `h5_files` as [1, N, D].

    Raises:
        OutputError, DataFileError, SettingsError: see `write_datasets`; the id cannot be a file name.
    """
    files = plan(slide, to)
    for kind, path in files.items():
        ensure_folder(path.parent)
        if kind == "patches":
            attrs = _attributes(slide, path.parent)
            write_datasets(path, {"coords": slide.coords.astype(np.int64)}, {"coords": attrs})
        elif kind == "h5":
            write_datasets(path, {"features": slide.matrix, "coords": slide.coords}, {}, batch_axis=batch_axis)
        else:
            write_tensor(path, slide.matrix)
    return list(files.values())


def _attributes(slide: SlidePatches, folder: Path) -> dict[str, Any]:
    size = {} if slide.level0_size is None else dict.fromkeys(("downsampled_level_dim", "level_dim"), slide.level0_size)
    attrs: dict[str, Any] = {"patch_size": slide.patch_size, "patch_level": 0, "downsample": (1.0, 1.0)}
    return {**attrs, **size, "name": slide.id, "save_path": str(folder)}


@dataclass(frozen=True)
class Found:
    """The files of one slide; None where there is none."""

    id: str
    features: Path | None
    coords: Path | None


def find(source: Path, given: Given) -> list[Found]:
    """The slides in a folder of CLAM, in its `h5_files`, `pt_files` or `patches`, or in one file.

    Raises:
        DataFileError: there are none.
    """
    if source.is_file():
        place = given.coords or source.parent.parent / _PATCHES
        if source.parent.name == _PATCHES and source.suffix == ".h5":
            return [Found(given.slide or stem(source), None, source)]
        return [_found(source, place)]
    root = source.parent if source.name in (_H5, _PT, _PATCHES) else source
    kinds = (source.name,) if root != source else (_H5, _PT, _PATCHES)
    files: dict[str, Path] = {}
    for kind in kinds:
        for path in visible(root / kind, "*.pt" if kind == _PT else "*.h5"):
            files.setdefault(stem(path), path)
    if not files:
        raise DataFileError(f"{source} holds no files of {NAME}: neither {_H5}/*.h5, {_PT}/*.pt nor {_PATCHES}/*.h5")
    place = given.coords or root / _PATCHES
    return [
        Found(name, None, path) if path.parent.name == _PATCHES else _found(path, place)
        for name, path in sorted(files.items())
    ]


def _found(path: Path, place: Path) -> Found:
    coords = place / f"{stem(path)}.h5"
    return Found(stem(path), path, coords if coords.is_file() and coords != path else None)


@contextmanager
def read(found: Found, given: Given) -> Iterator[SlidePatches]:
    """The patches of a slide; its features can be read while the block runs.

    Raises:
        DataFileError: a file is damaged or has another layout, or two files do not belong together.
        SettingsError: something has to be given.
    """
    listed, size = (None, None) if found.coords is None else _read_patches(found.coords)
    path = found.features
    if path is None:
        assert listed is not None
        yield SlidePatches(found.id, listed, given.checked_patch_size(size, str(found.coords)), None, mpp=given.mpp)
        return
    encoder = given.checked_encoder(None, str(path))
    if path.suffix == ".pt":
        if listed is None:
            raise SettingsError(
                f"{path} holds no coordinates, and there is no {_PATCHES}/{found.id}.h5; name the folder of {NAME}'s "
                "coordinates (--coords)"
            )
        yield _slide(found, listed, tensor_matrix(path), given, size, encoder)
        return
    with open_h5(path, ["features", "coords"]) as file:
        coords = read_coords(file)
        if listed is not None and not np.array_equal(coords, listed):
            # Patches that could not be read are missing from neither in CLAM, so other coordinates are another run's.
            raise DataFileError(f"{path} and {found.coords} have different coordinates: they are of different runs")
        yield _slide(found, coords, stored_features(file), given, size, encoder)


def _slide(
    found: Found, coords: np.ndarray, vectors: Matrix, given: Given, size: float | None, encoder: str
) -> SlidePatches:
    if vectors.shape[0] != len(coords):
        raise DataFileError(f"{found.features}: {vectors.shape[0]} rows of features for {len(coords)} coordinates")
    side = given.checked_patch_size(size, str(found.features))
    return SlidePatches(found.id, coords, side, vectors, encoder=encoder, mpp=given.mpp)


def _read_patches(path: Path) -> tuple[np.ndarray, float | None]:
    """(coordinates, side of a patch in level-0 pixels) of a file in `patches`."""
    with open_h5(path, ["coords"]) as file:
        coords = read_coords(file)
        names = ("patch_size", "patch_level", "downsample", "custom_downsample")
        size, level, downsample, custom = (file.attribute(name, of="coords") for name in names)
        # Some programs write a further factor; it is not known which size it belongs to.
        if size is None or (downsample is None and level != 0) or custom not in (None, 1):
            return coords, None
        factor = 1.0 if downsample is None else float(np.ravel(downsample)[0])
        return coords, float(int(size * factor))
