"""The layout of slide2vec (github.com/clemsgrs/slide2vec) and of hs2p, which tiles for it: facts, in our words.

    tile_embeddings/<slide>.pt, .meta.json          features [N, D] as one tensor, or .npz with the array `features`
    slide_embeddings/<slide>.pt, .meta.json         [D]
    tiles/<slide>.coordinates.npz, .coordinates.meta.json
        x, y int64 [N] (level-0 pixels), tile_index int32 [N] (0 to N - 1), tissue_fractions float32 [N]

The metadata of the features has `encoder_name`, `tile_size_lv0`, `requested_tile_size_px`, `requested_spacing_um`, ...;
that of the tiles has six sections, of which hs2p requires every key. A slide without a tile has no .pt and no .npz.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, ForeignFileError, SettingsError
from exaonepath.exchange.foreign_hdf5 import coords_of_columns
from exaonepath.exchange.slide_patches import ArrayMatrix, Given, Matrix, SlidePatches, encoder_name, file_name, visible
from exaonepath.exchange.torch_files import tensor_matrix, write_tensor
from exaonepath.files.atomic import atomic_path, ensure_folder, write_text
from exaonepath.files.strict_json import parse_json

NAME = "slide2vec"
_TILES, _FEATURES, _SLIDES = "tiles", "tile_embeddings", "slide_embeddings"
_META, _COORDS = ".meta.json", ".coordinates"
_MAX_JSON = 1 << 22
_MAX_BYTES = 1 << 36
_MAX_RATIO = 1100  # deflate cannot compress more
# fmt: off
_SEGMENTATION = (
    "requested_seg_downsample", "seg_downsample", "seg_level", "seg_spacing_um", "sthresh", "sthresh_up", "mthresh",
    "close", "sam2_checkpoint_path", "sam2_config_path", "mask_path", "ref_tile_size_px", "tissue_mask_tissue_value",
    "mask_level", "mask_spacing_um",
)
_FILTERING = (
    "a_t", "a_h", "filter_white", "filter_black", "white_threshold", "black_threshold", "fraction_threshold",
    "filter_grayspace", "grayspace_saturation_threshold", "grayspace_fraction_threshold", "filter_blur",
    "blur_threshold", "qc_spacing_um",
)
# fmt: on
_DTYPES = {"float16": "fp16", "float32": "fp32"}


def plan(slide: SlidePatches, to: Path) -> dict[str, Path]:
    """The files of a slide: the coordinates, and where it has vectors and a slide embedding, those.

    Raises:
        SettingsError: the id cannot be a file name, or it is not known at which size patches were asked for.
    """
    if slide.target_size is None or not slide.target_mpp:
        raise SettingsError(
            f"the results of {slide.id} do not state for which size of patches they were made, which {NAME}'s layout "
            "needs; state it in pixels at 0.5 um (--target-size)"
        )
    name = file_name(slide.id)
    files = {"tiles-meta": to / _TILES / f"{name}{_COORDS}{_META}"}
    if len(slide):
        files["tiles"] = to / _TILES / f"{name}{_COORDS}.npz"
    if slide.vectors is not None:
        files["features-meta"] = to / _FEATURES / f"{name}{_META}"
        if len(slide):
            files["features"] = to / _FEATURES / f"{name}.pt"
    if slide.slide_vector is not None:
        files["slide-meta"] = to / _SLIDES / f"{name}{_META}"
        files["slide"] = to / _SLIDES / f"{name}.pt"
    return files


def write(slide: SlidePatches, to: Path) -> list[Path]:
    """Write the files of a slide, each whole or not at all, metadata last; see `plan`.

    Raises:
        OutputError, DataFileError, SettingsError: see `plan`; a vector cannot be written.
    """
    files = plan(slide, to)
    for path in files.values():
        ensure_folder(path.parent)
    if "tiles" in files:
        with atomic_path(files["tiles"]) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                tile_index=np.arange(len(slide), dtype=np.int32),
                x=slide.coords[:, 0].astype(np.int64),
                y=slide.coords[:, 1].astype(np.int64),
                # Not measured here: NaN says so, and is a number to its readers.
                tissue_fractions=np.full(len(slide), np.nan, np.float32),
            )
    if "features" in files:
        write_tensor(files["features"], slide.matrix)
    if "slide" in files and slide.slide_vector is not None:
        write_tensor(files["slide"], np.asarray(slide.slide_vector, np.float32))
    _write_json(files["tiles-meta"], _tiling(slide))
    if "features-meta" in files:
        _write_json(files["features-meta"], _about_features(slide, files))
    if "slide-meta" in files and slide.slide_vector is not None:
        about = {"artifact_type": "slide_embeddings", "encoder_level": "slide", "feature_dtype": "fp32"}
        _write_json(files["slide-meta"], {**_about(slide), **about, "feature_dim": len(slide.slide_vector)})
    return list(files.values())


def _about(slide: SlidePatches) -> dict[str, Any]:
    return {
        "sample_id": slide.id,
        "encoder_name": encoder_name(slide),
        "format": "pt",
        "image_path": _image(slide),
        "mask_path": None,
        "annotation": None,
    }


def _image(slide: SlidePatches) -> str:
    return str(slide.attrs.get("slide_path", ""))


def _about_features(slide: SlidePatches, files: Mapping[str, Path]) -> dict[str, Any]:
    tiles = files.get("tiles")
    return {
        **_about(slide),
        "artifact_type": "tile_embeddings",
        "encoder_level": "tile",
        "feature_dim": slide.matrix.shape[1] if len(slide) else None,
        "feature_dtype": _DTYPES[slide.matrix.dtype.name],
        "num_tiles": len(slide),
        "requested_tile_size_px": slide.target_size,
        "requested_spacing_um": slide.target_mpp,
        "tile_size_lv0": slide.patch_size,
        "coordinates_npz_path": None if tiles is None else str(tiles),
        "coordinates_meta_path": str(files["tiles-meta"]),
    }


def _tiling(slide: SlidePatches) -> dict[str, Any]:
    """What hs2p requires; null where this package has no such setting or does not know the value."""
    size = slide.target_size or slide.patch_size
    step = slide.target_step or size
    made_by = {"backend": "exaonepath", "requested_backend": "exaonepath", "mask_backend": None}
    return {
        "provenance": {
            **{"sample_id": slide.id, "image_path": _image(slide), "mask_path": None, "requested_mask_backend": None},
            **made_by,
            "spacing_at_level_0": slide.mpp,
        },
        "slide": {
            "dimensions": None if slide.level0_size is None else list(slide.level0_size),
            "base_spacing_um": slide.mpp,
            "level_downsamples": [1.0],
        },
        "tiling": {
            "requested_tile_size_px": size,
            "requested_spacing_um": slide.target_mpp,
            "read_level": 0,
            "read_tile_size_px": slide.patch_size,
            "read_spacing_um": slide.mpp
            if slide.mpp is not None
            else (slide.target_mpp or 0) * size / slide.patch_size,
            "tile_size_lv0": slide.patch_size,
            "tolerance": None,
            "step_px_lv0": slide.patch_size * step // size,
            "overlap": max(0.0, 1 - step / size),
            "min_tissue_fraction": None,
            "is_within_tolerance": True,
            "n_tiles": len(slide),
        },
        "segmentation": {"tissue_method": "exaonepath", **dict.fromkeys(_SEGMENTATION)},
        "filtering": dict.fromkeys(_FILTERING),
        "artifact": {
            "coordinate_space": "level0_px",
            "tile_order": "by_contour",
            **dict.fromkeys(("annotation", "selection_strategy", "output_mode")),
        },
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Found:
    """The files of one slide: the metadata of its features, and of its tiles."""

    id: str
    features: Path
    tiles: Path


def find(source: Path, given: Given) -> list[Found]:
    """The slides in a run's folder, or in its `tile_embeddings`, or one file of it.

    Raises:
        DataFileError: there are none.
    """
    if source.is_file():
        name = source.name.removesuffix(_META).removesuffix(".pt").removesuffix(".npz")
        folder, names = source.parent, [name]
    else:
        folder = source if source.name == _FEATURES else source / _FEATURES
        names = sorted(path.name.removesuffix(_META) for path in visible(folder, f"*{_META}"))
    tiles = given.coords or folder.parent / _TILES
    if not names:
        raise DataFileError(f"{source} holds no files of {NAME}: no {_FEATURES}/*{_META}")
    return [Found(name, folder / f"{name}{_META}", tiles / f"{name}{_COORDS}{_META}") for name in names]


@contextmanager
def read(found: Found, given: Given) -> Iterator[SlidePatches]:
    """The patches of a slide.

    Raises:
        DataFileError: a file is missing or damaged, has another layout, or two files do not belong together.
        SettingsError: something has to be given.
    """
    about = _read_json(found.features)
    where = str(found.features)
    tiling = _section(_read_json(found.tiles), "tiling", found.tiles) if found.tiles.is_file() else {}
    count = about.get("num_tiles")
    if count == 0:
        vectors: Matrix = ArrayMatrix(np.empty((0, int(_number(about.get("feature_dim"), where) or 0)), np.float32))
        coords = np.empty((0, 2), np.int32)
    else:
        base = found.features.name.removesuffix(_META)
        tensor, archive = (found.features.with_name(f"{base}{ending}") for ending in (".pt", ".npz"))
        use_archive = about.get("format") == "npz" or not tensor.is_file()
        vectors = ArrayMatrix(_arrays(archive, ["features"])[0]) if use_archive else tensor_matrix(tensor)
        listed = found.tiles.with_name(found.tiles.name.removesuffix(_META) + ".npz")
        x, y = _arrays(listed, ["x", "y"])
        coords = coords_of_columns(x, y, str(listed))
    if len(vectors.shape) != 2 or vectors.dtype.kind != "f" or vectors.shape[0] != len(coords):
        raise DataFileError(f"{where}: features {list(vectors.shape)} for {len(coords)} tiles; they must be [N, D]")
    stated = (about.get("tile_size_lv0"), tiling.get("tile_size_lv0"))
    sizes = {number for number in (_number(value, where) for value in stated) if number is not None}
    if len(sizes) > 1:
        raise DataFileError(f"{where} and {found.tiles} state different sizes of tiles: {sorted(sizes)}")
    encoder = about.get("encoder_name")
    target = _number(about.get("requested_tile_size_px", tiling.get("requested_tile_size_px")), where)
    yield SlidePatches(
        found.id,
        coords,
        given.checked_patch_size(next(iter(sizes), None), where),
        vectors,
        encoder=given.checked_encoder(encoder if isinstance(encoder, str) else None, where),
        mpp=given.mpp or _number(_read_mpp(found.tiles), where),
        target_size=None if target is None else int(target),
        target_mpp=_number(about.get("requested_spacing_um", tiling.get("requested_spacing_um")), where),
    )


def _read_mpp(path: Path) -> Any:
    return _section(_read_json(path), "slide", path).get("base_spacing_um") if path.is_file() else None


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
        raise DataFileError(f"{where} states {value!r:.40} where a positive number is needed")
    return float(value)


def _section(value: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = value.get(name, {})
    if not isinstance(section, dict):
        raise DataFileError(f"{path}: {name} is not an object")
    return section


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
    except FileNotFoundError as exc:
        raise DataFileError(f"{path}: no such file") from exc
    except OSError as exc:
        raise DataFileError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(data) > _MAX_JSON:
        raise ForeignFileError(f"{path} has more than {_MAX_JSON >> 20} MB, which no file of {NAME} has")
    value = parse_json(data, str(path), DataFileError, constants=True)
    if not isinstance(value, dict):
        raise DataFileError(f"{path} holds no JSON object")
    return value


def _arrays(path: Path, names: list[str]) -> list[np.ndarray]:
    """Arrays of numbers of an .npz file; nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                large = entry.file_size > max(1 << 24, _MAX_RATIO * entry.compress_size)
                if large or entry.file_size > _MAX_BYTES:
                    raise ForeignFileError(f"{path} declares {entry.file_size} bytes for {entry.filename}")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise DataFileError(f"{path} lacks {', '.join(missing)}; it holds {sorted(file.files)}")
            return [file[name] for name in names]
    except FileNotFoundError as exc:
        raise DataFileError(f"{path}: no such file") from exc
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.error) as exc:
        raise DamagedFileError(f"{path} cannot be read as arrays: {' '.join(str(exc).split())[:200]}") from exc
