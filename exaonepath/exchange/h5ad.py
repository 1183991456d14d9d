"""AnnData files (.h5ad) of one slide or of many, as scanpy and squidpy read them.

    X                  the vectors, [N, D]
    obs                slide, patch (its number), x, y (corner in level-0 pixels), fragment, patient, more values
    obsm["spatial"]    centres of the patches in level-0 pixels, where squidpy draws them
    uns["spatial"]     for each slide: images (hires), scalefactors (spot_diameter_fullres, tissue_hires_scalef)
    uns["exaonepath"]  what made the vectors (JSON), and the slide embeddings

The vectors are written and read in parts; everything else is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, ForeignFileError, SettingsError
from exaonepath.exchange.foreign_hdf5 import coords_of_columns
from exaonepath.exchange.libraries import library
from exaonepath.exchange.own_metadata import KEY, describe, parse, stated, without_patches
from exaonepath.exchange.slide_patches import FoundRows, Given, SlidePatches, Source, file_name, part_rows, visible
from exaonepath.exchange.value_names import names_of_values, stored_names
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.hdf5 import open_h5_tree, open_h5_tree_in_parts
from exaonepath.files.hdf5_output import atomic_h5_tree, encodable

NAME = "AnnData"
ENDING = ".h5ad"
_MOST_SLIDES = 1 << 20
COLUMNS = ("slide", "patch", "x", "y", "fragment", "patient", "_index")  # of `obs`; "_index" is the library's


def write(sources: Sequence[Source], path: Path) -> None:
    """Write the slides to one file, whole or not at all.

    Raises:
        SettingsError: the slides do not fit into one file.
        OutputError, DataFileError, MissingDependencyError: the file or a vector cannot be written; AnnData is missing.
    """
    anndata = library("anndata", "AnnData files")
    ensure_folder(path.parent)
    slides = []
    for source in sources:
        with source() as slide:
            _ = slide.matrix.shape  # they are needed; an error comes before anything is written
            slides.append(slide)
    table = make_table(slides, stored_names(names_of_values(slides), "AnnData files", reserved=COLUMNS, unsafe="[\0/]"))
    shape = (table.n_obs, slides[0].matrix.shape[1] if slides else 0)
    dtype = np.result_type(*{slide.matrix.dtype for slide in slides}) if slides else np.dtype("float32")
    with atomic_h5_tree(path) as file:
        anndata.io.write_elem(file, "/", table)
        for name in ("X", "raw"):  # stated as missing; `raw` must not exist then, or the file cannot be read in parts
            if name in file:
                del file[name]
        x = file.create_dataset("X", shape, dtype)
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        row = 0
        for source in sources:
            with source() as slide:
                for _, part in slide.matrix.parts():
                    if part.size:
                        x[row : row + len(part)] = part
                    row += len(part)


def make_table(slides: Sequence[SlidePatches], columns: Mapping[str, str], x: np.ndarray | None = None) -> Any:
    """An AnnData object of slides; without `x` [N, D], it has the width of the vectors but no vectors.

    `columns` are the names of the columns of the slides' values.

    Raises:
        SettingsError: the slides do not fit into one table.
        MissingDependencyError: AnnData is missing.
    """
    anndata, pandas = library("anndata", "AnnData files"), library("pandas", "AnnData files")
    metadata = describe(slides)
    counts = [len(slide) for slide in slides]
    names = [encodable(file_name(slide.id)) for slide in slides]
    number = np.repeat(np.arange(len(slides)), counts)
    patch = np.concatenate([np.arange(n, dtype=np.int32) for n in counts] or [np.empty(0, np.int32)])
    coords = np.concatenate([slide.coords for slide in slides] or [np.empty((0, 2), np.int32)])
    sizes = np.repeat([slide.patch_size for slide in slides], counts)
    obs = pandas.DataFrame(
        {
            "slide": pandas.Categorical.from_codes(number, names),
            "patch": patch,
            "x": coords[:, 0].astype(np.int32),
            "y": coords[:, 1].astype(np.int32),
        },
        index=[f"{names[at]}-{row}" for at, row in zip(number.tolist(), patch.tolist(), strict=True)],
    )
    if slides and all(slide.fragments is not None for slide in slides):
        obs["fragment"] = np.concatenate([np.asarray(slide.fragments, np.int32) for slide in slides])
    if any(slide.patient is not None for slide in slides):
        patients = sorted({slide.patient for slide in slides if slide.patient is not None})
        codes = [-1 if slide.patient is None else patients.index(slide.patient) for slide in slides]
        obs["patient"] = pandas.Categorical.from_codes(np.repeat(codes, counts), patients)
    for name, column in _joined_values(slides, pandas).items():
        obs[columns[name]] = column
    kind = "feature" if not slides or slides[0].kind == "features" else "embedding"
    width = 0 if not slides or slides[0].vectors is None else slides[0].vectors.shape[1]
    var = pandas.DataFrame(index=[f"{kind}_{at}" for at in range(width)])
    centres = coords + sizes[:, None] / 2.0
    own: dict[str, Any] = {"metadata": metadata}
    vectors = [np.asarray(slide.slide_vector) for slide in slides if slide.slide_vector is not None]
    if slides and len(vectors) == len(slides) and len({vector.shape for vector in vectors}) == 1:
        own |= {"slide_embedding": np.stack(vectors), "slides": np.array(names, object)}
    uns = {"spatial": {name: _spatial(slide) for name, slide in zip(names, slides, strict=True)}, KEY: own}
    return anndata.AnnData(X=x, obs=obs, var=var, obsm={"spatial": centres.reshape(-1, 2)}, uns=uns)


def _joined_values(slides: Sequence[SlidePatches], pandas: Any) -> dict[str, Any]:
    """The values of all slides by name; where a slide has none, they are missing."""
    joined: dict[str, Any] = {}
    for name in names_of_values(slides):
        found = [slide.values.get(name) for slide in slides]
        categories = sorted({text for value in found if value is not None for text in value.categories})
        parts = []
        for slide, value in zip(slides, found, strict=True):
            column = np.full(len(slide), np.nan) if value is None else np.asarray(value.values, np.float64)
            if value is not None and value.categories:  # from numbers of this slide's categories to those of all
                mapped = np.array([categories.index(text) for text in value.categories], float)
                present = np.isfinite(column)
                column[present] = mapped[column[present].astype(int)]
            parts.append(column)
        values = np.concatenate(parts)
        if categories:
            joined[name] = pandas.Categorical.from_codes(np.nan_to_num(values, nan=-1).astype(int), categories)
        else:
            joined[name] = values.astype(np.float32)
    return joined


def _spatial(slide: SlidePatches) -> dict[str, Any]:
    """What squidpy looks for: with a picture, its pixels for each level-0 pixel."""
    scalefactors = {"spot_diameter_fullres": float(slide.patch_size)}
    if slide.picture is None:
        return {"scalefactors": scalefactors}
    scale = float(np.mean(slide.picture.scale))
    return {"images": {"hires": slide.picture.pixels}, "scalefactors": {**scalefactors, "tissue_hires_scalef": scale}}


def find(source: Path, given: Given) -> list[FoundRows]:
    """The slides of a file, or of all .h5ad files in a folder.

    Raises:
        DataFileError: a file is damaged, or there are none.
        SettingsError: it is not known where patches are.
        MissingDependencyError: AnnData is missing.
    """
    paths = visible(source, f"*{ENDING}") if source.is_dir() else [source]
    if not paths:
        raise DataFileError(f"{source} holds no *{ENDING} file")
    return [found for path in paths for found in _slides(path, given)]


def _slides(path: Path, given: Given) -> list[FoundRows]:
    anndata = library("anndata", "AnnData files")
    with open_h5_tree(path) as file:
        if file.attrs.get("encoding-type") != "anndata" and not {"X", "obs"} <= set(file):
            raise ForeignFileError(f"{path} is no AnnData file")
        try:
            obs = anndata.io.read_elem(file["obs"])
            text = file[f"uns/{KEY}/metadata"][()] if f"uns/{KEY}/metadata" in file else None
        except Exception as exc:  # anndata and h5py raise errors of many types for damaged files
            raise DamagedFileError(f"{path} cannot be read as AnnData: {' '.join(str(exc).split())[:200]}") from exc
        metadata = parse(text, str(path))
        if "x" not in obs or "y" not in obs:
            raise SettingsError(
                f"{path} has no columns x and y in obs: the corners of the patches in level-0 pixels, as whole numbers "
                "(obsm['spatial'] does not say whether it holds corners or centres)"
            )
    coords = coords_of_columns(np.asarray(obs["x"]), np.asarray(obs["y"]), f"{path}: x, y")
    fragments = np.asarray(obs["fragment"]) if "fragment" in obs else None
    if fragments is not None and fragments.dtype.kind not in "iu":
        raise DataFileError(f"{path}: the column fragment holds {fragments.dtype}, not whole numbers")
    if "slide" not in obs:
        names = [given.slide or path.name.removesuffix(ENDING)]
        number = np.zeros(len(obs), np.int64)
    else:
        column = obs["slide"].astype("category").cat.remove_unused_categories().cat
        names, number = [str(name) for name in column.categories], np.asarray(column.codes, np.int64)
        if (number < 0).any():
            raise DataFileError(f"{path}: the column slide has missing values")
        names += [name for name in without_patches(metadata) if name not in names]
    if len(names) > _MOST_SLIDES:
        raise DataFileError(f"{path} has {len(names)} slides, more than patches could be of")
    order = np.argsort(number, kind="stable")
    bounds = np.searchsorted(number[order], np.arange(len(names) + 1))
    result = []
    for at, name in enumerate(names):
        rows = order[bounds[at] : bounds[at + 1]]
        about = stated(metadata, name, str(path))
        result.append(FoundRows(name, path, rows, coords[rows], None if fragments is None else fragments[rows], about))
    return result


@contextmanager
def read(found: FoundRows, given: Given) -> Iterator[SlidePatches]:
    """The patches of a slide; its vectors can be read while the block runs.

    Raises:
        DataFileError: the file is damaged, or its X is not a plain matrix of numbers.
        SettingsError: something has to be given.
    """
    about = dict(found.about)
    where = f"{found.path} ({found.id})"
    encoder = given.checked_encoder(about.pop("encoder", None), where)
    size = given.checked_patch_size(about.pop("patch_size", None), where)
    with open_h5_tree_in_parts(found.path) as (file, check):
        x = file.get("X")
        if not isinstance(x, h5py.Dataset) or x.ndim != 2 or x.dtype.kind != "f":
            raise DataFileError(f"{found.path}: X must be a dense matrix of floating-point numbers")
        if len(found.rows) and int(found.rows.max()) >= len(x):
            raise DataFileError(f"{found.path}: X has {len(x)} rows, obs more")
        about["mpp"] = given.mpp or about.get("mpp")
        vectors = _Rows(x, found.rows, check)
        yield SlidePatches(found.id, found.coords, size, vectors, encoder=encoder, fragments=found.fragments, **about)


class _Rows:
    """Some rows of a dataset as a `Matrix`."""

    def __init__(self, dataset: h5py.Dataset, rows: np.ndarray, check: Callable[[], None]) -> None:
        self._dataset, self._rows, self._check = dataset, rows, check
        self.shape: tuple[int, ...] = (len(rows), dataset.shape[1])
        self.dtype: np.dtype = dataset.dtype

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `Matrix.parts`."""
        step = part_rows(self.shape, self.dtype)
        for start in range(0, max(1, len(self._rows)), step):
            rows = self._rows[start : start + step]
            if not len(rows):
                values = np.empty((0, self.shape[1]), self.dtype)
            elif rows[-1] - rows[0] == len(rows) - 1:  # they increase, so they follow each other
                values = self._dataset[rows[0] : rows[-1] + 1]
            else:
                values = self._dataset[rows]
            self._check()
            yield start, values
