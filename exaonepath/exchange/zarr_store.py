"""Zarr stores (folders, format 2) of one slide or of many, a group a slide.

    <slide>/vectors          float32 or float16 [N, D], in chunks of rows
    <slide>/coords           int32 [N, 2], corners in level-0 pixels
    <slide>/fragments        int32 [N]
    <slide>/slide_embedding  float32 [W]
    <slide>/values/<name>    float32 [N]; of a column of text its categories are the attribute `categories`
                             (a name that a folder cannot have is changed, and is the attribute `name`)

What made the vectors is the attribute "exaonepath" of the store. In Zarr, an array can name codecs that run code of the
file (pickle), chunks can be links to other files, and those that are missing read as zeros: all this is refused here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, ForeignFileError, MissingDependencyError, SettingsError
from exaonepath.exchange.foreign_hdf5 import checked_coords
from exaonepath.exchange.libraries import library
from exaonepath.exchange.own_metadata import KEY, describe, parse, stated
from exaonepath.exchange.slide_patches import Given, Matrix, SlidePatches, Source, file_name, visible
from exaonepath.exchange.value_names import names_of_values, stored_names
from exaonepath.files.atomic import atomic_folder, ensure_folder
from exaonepath.files.hdf5_output import encodable
from exaonepath.files.strict_json import parse_json

NAME = "Zarr"
ENDING = ".zarr"
_CHUNK_BYTES = 1 << 22
_MAX_CHUNK, _MAX_JSON = 1 << 30, 1 << 26
_MAX_BYTES, _MAX_RATIO, _SLACK = 1 << 36, 20_000, 1 << 24
_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
# Codecs of numbers, by both versions of the format. "pickle" and codecs of plug-ins are none of them.
_CODECS = {
    *(
        "bytes",
        "transpose",
        "blosc",
        "zstd",
        "gzip",
        "zlib",
        "lz4",
        "lzma",
        "bz2",
        "crc32c",
        "crc32",
        "shuffle",
        "delta",
    ),
    *(f"numcodecs.{name}" for name in ("blosc", "zstd", "gzip", "zlib", "lz4", "lzma", "bz2", "crc32", "shuffle")),
}


def write(sources: Sequence[Source], path: Path) -> None:
    """Write the slides to one store, whole or not at all.

    Raises:
        SettingsError: the slides do not fit into one store.
        OutputError, DataFileError, MissingDependencyError: the store or a vector cannot be written; zarr is missing.
    """
    zarr = library("zarr", "Zarr stores")
    ensure_folder(path.parent)
    slides = []
    for source in sources:
        with source() as slide:
            _ = slide.matrix.shape, _group_name(slide)
            slides.append(slide)
    names = stored_names(
        names_of_values(slides),
        "Zarr stores",
        reserved=_METADATA,
        unsafe=r'[\x00-\x1f/\\<>:"|?*]',  # an array is a folder
        edges=". ",
        ignore_case=True,
    )
    with atomic_folder(path) as folder:
        root = _new_group(zarr, folder)
        root.attrs[KEY] = describe(slides)
        for source in sources:
            with source() as slide:
                _write_slide(root.create_group(_group_name(slide)), slide, names)


def _group_name(slide: SlidePatches) -> str:
    name = file_name(slide.id)
    if encodable(name) != name:
        raise SettingsError(f"the id {name!r} is not UTF-8 text, so it cannot name a group of a Zarr store")
    return name


def _new_group(zarr: Any, folder: Path) -> Any:
    if int(zarr.__version__.split(".")[0]) >= 3:
        return zarr.open_group(str(folder), mode="a", zarr_format=2)
    return zarr.open_group(str(folder), mode="a")


def _create(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype | str) -> Any:
    """An array of chunks of some MB, all of which are written: one that is missing would read as zeros."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
    chunks = (min(max(1, _CHUNK_BYTES // max(1, row)), max(1, shape[0])), *(max(1, side) for side in shape[1:]))
    if hasattr(group, "create_array"):
        return group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, config={"write_empty_chunks": True})
    return group.create_dataset(name, shape=shape, chunks=chunks, dtype=dtype, write_empty_chunks=True)


def _write_array(group: Any, name: str, values: np.ndarray) -> Any:
    array = _create(group, name, values.shape, values.dtype)
    if values.size:
        array[:] = values
    return array


def _write_slide(group: Any, slide: SlidePatches, names: Mapping[str, str]) -> None:
    matrix = slide.matrix
    vectors = _create(group, "vectors", matrix.shape, matrix.dtype)
    if matrix.shape[0] and matrix.shape[1]:
        for start, rows in _in_chunks(matrix, vectors.chunks[0]):
            vectors[start : start + len(rows)] = rows
    _write_array(group, "coords", slide.coords.astype(np.int32))
    if slide.fragments is not None:
        _write_array(group, "fragments", np.asarray(slide.fragments, np.int32))
    if slide.slide_vector is not None:
        _write_array(group, "slide_embedding", np.asarray(slide.slide_vector, np.float32))
    if slide.values:
        values = group.create_group("values")
        for name, found in slide.values.items():
            array = _write_array(values, names[name], np.asarray(found.values, np.float32))
            if names[name] != name:
                array.attrs["name"] = encodable(name)
            if found.categories:
                array.attrs["categories"] = list(found.categories)


def _in_chunks(matrix: Matrix, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The rows in parts that are whole chunks: a part of one would be read, changed and written again."""
    rest, at = np.empty((0, matrix.shape[1]), matrix.dtype), 0
    for _, part in matrix.parts():
        first = min(len(part), size - len(rest))
        rest, start = np.concatenate([rest, part[:first]]), first
        while len(rest) == size:
            yield at, rest
            at += size
            rest = part[start : start + size]
            start += size
    if len(rest):
        yield at, rest


@dataclass(frozen=True)
class Found:
    """The group of one slide; an empty path inside the store is its root."""

    id: str
    path: Path
    group: str
    about: dict[str, Any]


def find(source: Path, given: Given) -> list[Found]:
    """The slides of a store, or of all stores (*.zarr) in a folder.

    Raises:
        DataFileError: a store is damaged, or there is none.
    """
    if not source.is_dir():
        raise DataFileError(f"{source} is no Zarr store: those that are folders are read")
    stores = [source] if _is_group(source) else [path for path in visible(source, f"*{ENDING}") if _is_group(path)]
    found = [slide for store in stores for slide in _slides(store, given)]
    if not found:
        raise DataFileError(f"{source} holds no Zarr store with slides: groups with coords and vectors")
    return found


def _is_group(path: Path) -> bool:
    return any((path / name).is_file() for name in (".zgroup", "zarr.json"))


def _slides(store: Path, given: Given) -> list[Found]:
    _check_store(store)
    metadata = parse(_attributes(store).get(KEY), str(store))
    if (store / "coords").is_dir():
        name = given.slide or store.name.removesuffix(ENDING)
        return [Found(name, store, "", stated(metadata, name, str(store)))]
    names = sorted(path.name for path in store.iterdir() if (path / "coords").is_dir())
    return [Found(name, store, name, stated(metadata, name, str(store))) for name in names]


@contextmanager
def read(found: Found, given: Given) -> Iterator[SlidePatches]:
    """The patches of a slide; its vectors can be read while the block runs.

    Raises:
        DataFileError: an array is missing, damaged, or not of numbers.
        SettingsError: something has to be given.
        MissingDependencyError: zarr is missing.
    """
    zarr = library("zarr", "Zarr stores")
    about = dict(found.about)
    where = str(found.path / found.group)
    encoder = given.checked_encoder(about.pop("encoder", None), where)
    size = given.checked_patch_size(about.pop("patch_size", None), where)
    about["mpp"] = given.mpp or about.get("mpp")
    folder = found.path / found.group
    _check_store(folder)
    name = next((name for name in ("vectors", "features") if (folder / name).is_dir()), None)
    if name is None:
        raise DataFileError(
            f"{folder} has no array vectors; it holds {', '.join(sorted(child.name for child in folder.iterdir()))}"
        )
    arrays = [name, "coords", *(["fragments"] if (folder / "fragments").is_dir() else [])]
    for array in arrays:
        _check_array(folder / array)
    try:
        root = zarr.open_group(str(found.path), mode="r")
        group = root[found.group] if found.group else root
        vectors = group[name]
        coords = checked_coords(np.asarray(group["coords"][:]), f"{folder}/coords")
        fragments = np.asarray(group["fragments"][:]) if "fragments" in arrays else None
    except DataFileError:
        raise
    except Exception as exc:  # zarr and its codecs raise errors of many types for damaged stores
        raise _damaged(folder, exc) from exc
    if len(vectors.shape) != 2 or np.dtype(vectors.dtype).kind != "f":
        raise DataFileError(f"{folder}/{name} must be numbers [N, D], got {vectors.dtype} {list(vectors.shape)}")
    if vectors.shape[0] != len(coords) or (fragments is not None and fragments.shape != (len(coords),)):
        raise DataFileError(f"{folder}: {name}, coords and fragments are of different lengths")
    if fragments is not None and fragments.dtype.kind not in "iu":
        raise DataFileError(f"{folder}/fragments holds {fragments.dtype}, not whole numbers")
    yield SlidePatches(
        found.id, coords, size, _Array(folder / name, vectors), encoder=encoder, fragments=fragments, **about
    )


class _Array:
    """A two-dimensional array of a store as a `Matrix`."""

    def __init__(self, path: Path, array: Any) -> None:
        self._path, self._array = path, array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = np.dtype(array.dtype)

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `Matrix.parts`."""
        step = max(1, int(self._array.chunks[0]))
        for start in range(0, max(1, self.shape[0]), step):
            try:
                values = np.asarray(self._array[start : start + step])
            except Exception as exc:  # of any codec
                raise _damaged(self._path, exc) from exc
            yield start, values


def _damaged(path: Path, exc: Exception) -> DamagedFileError | MissingDependencyError:
    return DamagedFileError(f"{path} cannot be read: {type(exc).__name__}: {' '.join(str(exc).split())[:200]}")


def _attributes(group: Path) -> dict[str, Any]:
    if (group / ".zattrs").is_file():
        return _json(group / ".zattrs")
    found = _json(group / "zarr.json").get("attributes", {}) if (group / "zarr.json").is_file() else {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MAX_JSON + 1)
    if len(data) > _MAX_JSON:
        raise ForeignFileError(f"{path} has more than {_MAX_JSON >> 20} MB, which no metadata have")
    value = parse_json(data, str(path), DataFileError, constants=True)
    if not isinstance(value, dict):
        raise DataFileError(f"{path} holds no JSON object")
    return value


def _check_store(store: Path) -> None:
    """Refuse links in a store, or in the folder of a group: its chunks are in its own folder."""
    for root, folders, files in os.walk(store):
        for path in (Path(root, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise ForeignFileError(f"{path} is a link; such a store is not read")


def _check_array(path: Path) -> None:
    """Check an array before any of it is decoded: codecs, sizes, and that all chunks exist."""
    if (path / ".zarray").is_file():
        about = _json(path / ".zarray")
        codecs = [about.get("compressor"), *(about.get("filters") or [])]
        names = [codec.get("id") if isinstance(codec, dict) else codec for codec in codecs if codec is not None]
        chunks = about.get("chunks")
    elif (path / "zarr.json").is_file():
        about = _json(path / "zarr.json")
        listed = about.get("codecs")
        names = [codec.get("name") if isinstance(codec, dict) else codec for codec in listed or [] if codec is not None]
        grid = about.get("chunk_grid")
        chunks = grid.get("configuration", {}).get("chunk_shape") if isinstance(grid, dict) else None
        if "sharding_indexed" in names:
            raise ForeignFileError(f"{path} is stored in shards, which are not read; save it without")
    else:
        raise DataFileError(f"{path} is no Zarr array")
    unknown = [name for name in names if name not in _CODECS]
    if unknown:
        raise ForeignFileError(
            f"{path} is packed by {unknown[0]!r:.40}, which is not read: it may run code, or a plug-in"
        )
    shape, chunks = _sizes(about.get("shape")), _sizes(chunks)
    if shape is None or chunks is None or len(shape) != len(chunks) or 0 in chunks:
        raise DataFileError(f"{path}: its metadata state no shape and chunks")
    if 0 in shape:
        return
    held = [
        Path(root, name).stat().st_size for root, _, files in os.walk(path) for name in files if name not in _METADATA
    ]
    wanted = math.prod(-(-side // chunk) for side, chunk in zip(shape, chunks, strict=True))
    if len(held) < wanted:
        raise DamagedFileError(f"{path} has {len(held)} of {wanted} chunks; the others would be read as zeros")
    chunk, declared = (8 * math.prod(sides) for sides in (chunks, shape))
    if chunk > _MAX_CHUNK or declared > min(_MAX_BYTES, max(_SLACK, _MAX_RATIO * sum(held))):
        raise ForeignFileError(f"{path} declares {shape} in chunks of {chunks}, more than {sum(held)} bytes hold")


def _sizes(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**40 for n in value) else None
