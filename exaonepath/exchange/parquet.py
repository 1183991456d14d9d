"""Parquet tables with a row a patch, and one with a row a slide.

    <name>.parquet      slide, patch, x, y, fragment, patient, more values, and `vector`: a list of D numbers
    slides.parquet      slide, patient, n_patches, patch_size, slide_embedding

Rows are written and read in parts. What made the vectors is stated in the metadata of the table (key "exaonepath").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, SettingsError
from exaonepath.exchange.foreign_hdf5 import coords_of_columns
from exaonepath.exchange.libraries import library
from exaonepath.exchange.own_metadata import KEY, describe, parse, stated, without_patches
from exaonepath.exchange.slide_patches import ArrayMatrix, FoundRows, Given, SlidePatches, Source, file_name, visible
from exaonepath.exchange.value_names import names_of_values, stored_names
from exaonepath.files.atomic import atomic_path, ensure_folder
from exaonepath.files.hdf5_output import encodable

NAME = "Parquet"
ENDING, SLIDES, VECTOR = ".parquet", "slides.parquet", "vector"
_ROWS = 1 << 13  # of a row group
_RESERVED = ("slide", "patch", "x", "y", "fragment", "patient", VECTOR)


def write(sources: Sequence[Source], path: Path) -> None:
    """Write the patches of slides to one table, whole or not at all.

    Raises:
        SettingsError: the slides do not fit into one table.
        OutputError, DataFileError, MissingDependencyError: the file or a vector cannot be written; pyarrow is missing.
    """
    arrow, parquet = _arrow()
    ensure_folder(path.parent)
    slides = []
    for source in sources:
        with source() as slide:
            _ = slide.matrix.shape
            slides.append(slide)
    names = stored_names(names_of_values(slides), "Parquet files", reserved=_RESERVED)
    schema = _schema(arrow, slides, names).with_metadata({KEY: describe(slides)})
    # To an open file: pyarrow would look for a meaning in parts of a path.
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for source in sources:
            with source() as slide:
                for start, part in slide.matrix.parts():
                    for at in range(0, len(part), _ROWS):
                        rows = slice(start + at, start + min(at + _ROWS, len(part)))
                        writer.write_table(_table(arrow, schema, names, slide, rows, part[at : at + _ROWS]))


def write_slides(slides: Sequence[SlidePatches], path: Path) -> None:
    """Write the table of slides, whole or not at all; one without a slide embedding has none in it.

    Raises:
        SettingsError: the slide embeddings differ in width.
        OutputError, MissingDependencyError: the file cannot be written; pyarrow is missing.
    """
    arrow, parquet = _arrow()
    vectors = [slide.slide_vector for slide in slides]
    widths = {len(vector) for vector in vectors if vector is not None}
    if len(widths) > 1:
        raise SettingsError(f"slide embeddings of different widths ({sorted(widths)}) do not fit into one table")
    columns = {
        "slide": arrow.array([encodable(slide.id) for slide in slides], arrow.string()),
        "patient": arrow.array([slide.patient for slide in slides], arrow.string()),
        "n_patches": arrow.array([len(slide) for slide in slides], arrow.int64()),
        "patch_size": arrow.array([slide.patch_size for slide in slides], arrow.int64()),
        "slide_embedding": arrow.array(
            [None if vector is None else np.asarray(vector, np.float32) for vector in vectors],
            arrow.list_(arrow.float32(), next(iter(widths), 1)),
        ),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        parquet.write_table(arrow.table(columns), file, compression="zstd")


def _arrow() -> tuple[Any, Any]:
    return library("pyarrow", "Parquet files"), library("pyarrow.parquet", "Parquet files")


def _schema(arrow: Any, slides: Sequence[SlidePatches], names: Mapping[str, str]) -> Any:
    fields = [("slide", arrow.string()), ("patch", arrow.int32()), ("x", arrow.int32()), ("y", arrow.int32())]
    fields += [("fragment", arrow.int32()), ("patient", arrow.string())]
    for name, column in names.items():
        texts = any(name in slide.values and slide.values[name].categories for slide in slides)
        fields.append((column, arrow.string() if texts else arrow.float32()))
    dtype = np.result_type(*{slide.matrix.dtype for slide in slides}) if slides else np.dtype("float32")
    width = slides[0].matrix.shape[1] if slides else 1
    fields.append((VECTOR, arrow.list_(arrow.from_numpy_dtype(dtype), width)))
    return arrow.schema(fields)


def _table(
    arrow: Any, schema: Any, names: Mapping[str, str], slide: SlidePatches, rows: slice, part: np.ndarray
) -> Any:
    n = len(part)
    columns: dict[str, Any] = {
        "slide": [encodable(file_name(slide.id))] * n,
        "patch": np.arange(rows.start, rows.stop, dtype=np.int32),
        "x": slide.coords[rows, 0],
        "y": slide.coords[rows, 1],
        "fragment": [None] * n if slide.fragments is None else np.asarray(slide.fragments[rows], np.int32),
        "patient": [slide.patient] * n,
    }
    for name, found in slide.values.items():
        values = np.asarray(found.values[rows], np.float32)
        texts = [found.categories[int(v)] if np.isfinite(v) else None for v in values] if found.categories else None
        columns[names[name]] = texts if texts is not None else arrow.array(values, from_pandas=True)
    vector = schema.field(VECTOR).type
    flat = arrow.array(np.ascontiguousarray(part, vector.value_type.to_pandas_dtype()).reshape(-1))
    columns[VECTOR] = arrow.FixedSizeListArray.from_arrays(flat, vector.list_size)
    arrays = [
        columns[field.name] if field.name == VECTOR else arrow.array(columns.get(field.name, [None] * n), field.type)
        for field in schema
    ]
    return arrow.Table.from_arrays(arrays, schema=schema)


def find(source: Path, given: Given) -> list[FoundRows]:
    """The slides of a table, or of all tables of patches in a folder and in its folder `patches`.

    Raises:
        DataFileError: a table is damaged, or lacks a column; there is none.
        MissingDependencyError: pyarrow is missing.
    """
    paths = [source]
    if source.is_dir():
        paths = sorted([*visible(source, f"*{ENDING}"), *visible(source, f"patches/*{ENDING}")])
        paths = [path for path in paths if path.name != SLIDES or _holds_patches(path)]
    if not paths:
        raise DataFileError(f"{source} holds no table of patches (*{ENDING})")
    return [found for path in paths for found in _slides(path, given)]


def _holds_patches(path: Path) -> bool:
    """Whether `slides.parquet` is of a slide that is called so, and not the table of slides."""
    with _opened(path) as file:
        return VECTOR in file.schema_arrow.names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    arrow, parquet = _arrow()
    try:
        with path.open("rb") as file:
            yield parquet.ParquetFile(file)
    except FileNotFoundError as exc:
        raise DataFileError(f"{path}: no such file") from exc
    except (arrow.ArrowException, OSError) as exc:
        raise DamagedFileError(f"{path} cannot be read as a table: {' '.join(str(exc).split())[:200]}") from exc


def _slides(path: Path, given: Given) -> list[FoundRows]:
    with _opened(path) as file:
        schema = file.schema_arrow
        lacking = [name for name in ("x", "y", VECTOR) if name not in schema.names]
        if lacking:
            raise DataFileError(
                f"{path} lacks {', '.join(lacking)}: a table of patches has x, y (corner in level-0 pixels) and "
                f"{VECTOR} (a list of numbers); it has {', '.join(schema.names)}"
            )
        kind = getattr(schema.field(VECTOR).type, "value_type", None)
        if kind is None or str(kind) not in ("halffloat", "float", "double"):
            raise DataFileError(
                f"{path}: {VECTOR} must be lists of floating-point numbers, got {schema.field(VECTOR).type}"
            )
        metadata = parse((schema.metadata or {}).get(KEY.encode()), str(path))
        wanted = [name for name in ("slide", "x", "y", "fragment") if name in schema.names]
        table = file.read(columns=wanted, use_threads=False)
    columns = {name: table[name].combine_chunks() for name in wanted}
    if columns["x"].null_count or columns["y"].null_count:
        raise DataFileError(f"{path}: x or y has missing values")
    coords = coords_of_columns(np.asarray(columns["x"]), np.asarray(columns["y"]), f"{path}: x, y")
    fragments = columns.get("fragment")
    index = None if fragments is None or fragments.null_count else np.asarray(fragments)
    if index is not None and index.dtype.kind not in "iu":
        raise DataFileError(f"{path}: the column fragment holds {index.dtype}, not whole numbers")
    texts = (
        columns["slide"].to_pylist()
        if "slide" in columns
        else [given.slide or path.name.removesuffix(ENDING)] * len(coords)
    )
    if None in texts:
        raise DataFileError(f"{path}: the column slide has missing values")
    names = list(dict.fromkeys([*map(str, texts), *without_patches(metadata)]))
    numbers = {name: at for at, name in enumerate(names)}
    number = np.array([numbers[str(text)] for text in texts], np.int64)
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(len(names) + 1))
    result = []
    for at, name in enumerate(names):
        rows = order[bounds[at] : bounds[at + 1]]
        found = None if index is None else index[rows]
        result.append(FoundRows(name, path, rows, coords[rows], found, stated(metadata, name, str(path))))
    return result


@contextmanager
def read(found: FoundRows, given: Given) -> Iterator[SlidePatches]:
    """The patches of a slide; its vectors can be read while the block runs.

    Raises:
        DataFileError: the table is damaged, or its vectors are no lists of numbers of one length.
        SettingsError: something has to be given.
    """
    about = dict(found.about)
    where = f"{found.path} ({found.id})"
    encoder = given.checked_encoder(about.pop("encoder", None), where)
    size = given.checked_patch_size(about.pop("patch_size", None), where)
    about["mpp"] = given.mpp or about.get("mpp")
    with _opened(found.path) as file:
        vectors = _Rows(found.path, file, found.rows) if len(found.rows) else ArrayMatrix(_empty(file))
        yield SlidePatches(found.id, found.coords, size, vectors, encoder=encoder, fragments=found.fragments, **about)


def _empty(file: Any) -> np.ndarray:
    kind = file.schema_arrow.field(VECTOR).type
    return np.empty((0, getattr(kind, "list_size", 0)), np.float32)


class _Rows:
    """The vectors of some rows, in increasing order, as a `Matrix`: a row group is in memory at a time."""

    def __init__(self, path: Path, file: Any, rows: np.ndarray) -> None:
        self._path, self._file, self._rows = path, file, rows
        counts = [file.metadata.row_group(at).num_rows for at in range(file.metadata.num_row_groups)]
        self._bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        first = self._group(int(np.searchsorted(self._bounds, rows[0], "right")) - 1)
        self.shape: tuple[int, ...] = (len(rows), first.shape[1])
        self.dtype: np.dtype = first.dtype

    def _group(self, number: int) -> np.ndarray:
        column = self._file.read_row_group(number, columns=[VECTOR], use_threads=False)[VECTOR].combine_chunks()
        flat = np.asarray(column.flatten())
        if column.null_count or flat.dtype.kind != "f":
            raise DataFileError(f"{self._path}: {VECTOR} has missing lists")
        lengths = np.asarray(column.value_lengths())
        if len(lengths) and (lengths != lengths[0]).any():
            raise DataFileError(f"{self._path}: the lists in {VECTOR} differ in length")
        return flat.reshape(len(column), -1)

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `Matrix.parts`."""
        splits = np.searchsorted(self._rows, self._bounds)
        for number, (start, stop) in enumerate(zip(splits[:-1].tolist(), splits[1:].tolist(), strict=True)):
            if stop > start:
                values = self._group(number)
                if values.shape[1] != self.shape[1]:
                    raise DataFileError(f"{self._path}: the lists in {VECTOR} differ in length")
                yield start, values[self._rows[start:stop] - self._bounds[number]]
