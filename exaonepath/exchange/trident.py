"""The layout of TRIDENT (github.com/mahmoodlab/TRIDENT): facts about its readers and writers, in our words.

    <magnification>x_<size>px_<overlap>px_overlap/
        patches/<slide>_patches.h5              coords [N, 2]
        features_<encoder>/<slide>.h5           features [N, D], coords [N, 2]
        slide_features_<encoder>/<slide>.h5     features [D], coords [N, 2]

`coords` has the attributes `patch_size` (pixels of the target magnification), `patch_size_level0`,
`target_magnification`, `level0_magnification`, `overlap`, `name`, `savetodir`; `features` has `name`. Its readers take
the side of a patch at level 0 as patch_size * level0_magnification / target_magnification. Some tools write and read
features with a batch axis, [1, N, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.exchange.foreign_hdf5 import read_coords, stored_features, write_datasets
from exaonepath.exchange.slide_patches import Given, SlidePatches, encoder_name, file_name, visible
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.hdf5 import StoredFile, open_h5
from exaonepath.text import few

NAME = "TRIDENT"
_COORDS, _FEATURES = "_patches.h5", "features_"
_MAGNIFICATION = 10.0  # times micrometres per pixel


def plan(slide: SlidePatches, to: Path) -> dict[str, Path]:
    """The files of a slide: "coords", and where they exist "features" and "slide".

    Raises:
        SettingsError: the id cannot be a file name, or it is not known at which size and scale patches were asked for.
    """
    size, magnification, overlap = _target(slide)
    base = to / f"{magnification:g}x_{size}px_{overlap}px_overlap"
    name, encoder = file_name(slide.id), encoder_name(slide)
    files = {"coords": base / "patches" / f"{name}{_COORDS}"}
    if slide.vectors is not None:
        files["features"] = base / f"{_FEATURES}{encoder}" / f"{name}.h5"
    if slide.slide_vector is not None:
        files["slide"] = base / f"slide_{_FEATURES}{encoder}" / f"{name}.h5"
    return files


def write(slide: SlidePatches, to: Path, *, batch_axis: bool = False) -> list[Path]:
    """Write the files of a slide, each whole or not at all; see `plan`.

    Args:
        slide: its patches.
        to: the job folder.
        batch_axis: write features as [1, N, D].

    Raises:
        OutputError, DataFileError, SettingsError: see `plan` and `write_datasets`.
    """
    files = plan(slide, to)
    attrs = coords_attributes(slide)
    coords = slide.coords.astype(np.int64)
    for kind, path in files.items():
        ensure_folder(path.parent)
        about = {
            "coords": {**attrs, "savetodir": str(to)},
            "features": {"name": slide.id, "savetodir": str(path.parent)},
        }
        if kind == "coords":
            write_datasets(path, {"coords": coords}, about)
        elif kind == "features":
            write_datasets(path, {"features": slide.matrix, "coords": coords}, about, batch_axis=batch_axis)
        elif slide.slide_vector is not None:
            vector = np.asarray(slide.slide_vector, np.float32)
            write_datasets(path, {"features": vector, "coords": coords}, about)
    return list(files.values())


def coords_attributes(slide: SlidePatches) -> dict[str, Any]:
    """The attributes of `coords`: patch_size * level0_magnification / target_magnification is exactly the side of a
    patch at level 0, so that its readers see the same pixels."""
    size, magnification, overlap = _target(slide)
    level0 = magnification * slide.patch_size / size
    attrs = {
        "patch_size": size,
        "patch_size_level0": slide.patch_size,
        "level0_magnification": int(level0) if level0 == int(level0) else level0,
        "target_magnification": int(magnification) if magnification == int(magnification) else magnification,
        "overlap": overlap,
        "name": slide.id,
    }
    if slide.level0_size is not None:
        attrs |= {"level0_width": slide.level0_size[0], "level0_height": slide.level0_size[1]}
    return attrs


def _target(slide: SlidePatches) -> tuple[int, float, int]:
    """(side of a patch, magnification at which it counts, overlap)."""
    if slide.target_size is None or not slide.target_mpp:
        raise SettingsError(
            f"the results of {slide.id} do not state for which size of patches they were made, which {NAME}'s layout "
            "needs; state it in pixels at 0.5 um (--target-size)"
        )
    step = slide.target_step or slide.target_size
    return slide.target_size, _MAGNIFICATION / slide.target_mpp, slide.target_size - step


@dataclass(frozen=True)
class Found:
    """The files of one slide.

    Attributes:
        id: the slide.
        features: file with features and coordinates; None: coordinates only.
        coords: file with coordinates; None if there is none.
        encoder: as the folder's name states it.
    """

    id: str
    features: Path | None
    coords: Path | None
    encoder: str | None


def find(source: Path, given: Given) -> list[Found]:
    """The slides in a job folder, in a folder of one patch size, in a folder of features, or in one file.

    Raises:
        DataFileError: there are none.
        SettingsError: the folder has features of several encoders or patch sizes.
    """
    if source.is_file():
        if source.name.endswith(_COORDS):
            return [Found(given.slide or source.name[: -len(_COORDS)], None, source, None)]
        return [_found(source, source.parent, given)]
    bases = [source, *sorted(path for path in source.iterdir() if path.is_dir())] if source.is_dir() else []
    if source.name.startswith(_FEATURES):
        folders = [source]
    else:
        folders = [path for base in bases for path in visible(base, f"{_FEATURES}*") if path.is_dir()]
    if len(folders) > 1:
        raise SettingsError(f"{source} has features of several encoders or sizes; name one: {few(map(str, folders))}")
    if folders:
        return [_found(path, folders[0], given) for path in visible(folders[0], "*.h5")]
    lists = sorted(
        {path for base in bases for path in (*visible(base, f"*{_COORDS}"), *visible(base, f"patches/*{_COORDS}"))}
    )
    if not lists:
        raise DataFileError(f"{source} holds no files of {NAME}: neither {_FEATURES}*/*.h5 nor *{_COORDS}")
    return [Found(path.name[: -len(_COORDS)], None, path, None) for path in lists]


def _found(path: Path, folder: Path, given: Given) -> Found:
    name = path.name.removesuffix(".h5")
    places = [given.coords] if given.coords is not None else [folder.parent / "patches", folder.parent]
    lists = [place / f"{name}{_COORDS}" for place in places]
    encoder = folder.name.removeprefix(_FEATURES) if folder.name.startswith(_FEATURES) else None
    return Found(name, path, next((place for place in lists if place.is_file()), None), encoder)


@contextmanager
def read(found: Found, given: Given) -> Iterator[SlidePatches]:
    """The patches of a slide; its features can be read while the block runs.

    Raises:
        DataFileError: a file is damaged or has another layout.
        SettingsError: something has to be given.
    """
    path = found.features or found.coords
    assert path is not None
    with open_h5(path, ["coords"]) as file:
        vectors = stored_features(file) if found.features is not None else None
        coords = read_coords(file)
        attrs = _attributes(file)
        if attrs.get("patch_size_level0") is None and found.features is not None and found.coords is not None:
            with open_h5(found.coords, ["coords"]) as other:
                attrs = _attributes(other)
        if vectors is not None and vectors.shape[0] != len(coords):
            raise DataFileError(f"{path}: {vectors.shape[0]} rows of features for {len(coords)} coordinates")
        magnification = attrs.get("target_magnification")
        yield SlidePatches(
            found.id,
            coords,
            given.checked_patch_size(attrs.get("patch_size_level0"), str(path)),
            vectors,
            encoder="" if vectors is None else given.checked_encoder(found.encoder, str(path)),
            mpp=given.mpp,
            target_size=_whole(attrs.get("patch_size")),
            target_mpp=_MAGNIFICATION / magnification if magnification else None,
        )


def _attributes(file: StoredFile) -> Mapping[str, Any]:
    names = ("patch_size", "patch_size_level0", "target_magnification")
    values = {name: file.attribute(name, of="coords") for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int | float) and value > 0}


def _whole(value: float | None) -> int | None:
    return None if value is None or value != int(value) else int(value)
