"""SpatialData stores (.zarr): for each slide its patches as shapes and a picture, and one table with the vectors.

shapes/<slide>_patches   squares in level-0 pixels
images/<slide>_image     a small picture, scaled to level-0 pixels by its transformation (where the slide is at hand)
tables/patches           the same table as in an AnnData file; its regions are the shapes
one coordinate system per slide, named like it, in level-0 pixels
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.exchange.h5ad import COLUMNS, make_table
from exaonepath.exchange.libraries import library
from exaonepath.exchange.slide_patches import SlidePatches, Source
from exaonepath.exchange.value_names import names_of_values, stored_names
from exaonepath.files.atomic import atomic_folder, ensure_folder

NAME = "SpatialData"
ENDING = ".zarr"
TABLE, REGION = "patches", "region"  # the table, and its column that names the shapes of a row


def write(sources: Sequence[Source], path: Path) -> None:
    """Write the slides to one store, whole or not at all. All vectors are in memory: the library needs them there.

    Raises:
        SettingsError: the slides do not fit into one store.
        OutputError, DataFileError, MissingDependencyError: the store or a vector cannot be written; the library is
            missing.
    """
    spatialdata = library("spatialdata", "SpatialData stores")
    ensure_folder(path.parent)
    slides, blocks = [], []
    for source in sources:
        with source() as slide:
            slides.append(slide)
            blocks += [part for _, part in slide.matrix.parts() if len(part)]
    width = slides[0].matrix.shape[1] if slides else 0
    x = np.concatenate(blocks) if blocks else np.empty((0, width), np.float32)
    names = element_names([slide.id for slide in slides])
    shapes = {f"{name}_patches": _shapes(slide, name) for name, slide in zip(names, slides, strict=True) if len(slide)}
    images = {
        f"{name}_image": _image(slide, name)
        for name, slide in zip(names, slides, strict=True)
        if slide.picture is not None
    }
    data = spatialdata.SpatialData(shapes=shapes, images=images, tables={TABLE: _table(slides, names, x)})
    with atomic_folder(path) as folder:
        inner = folder / "store"  # the library writes to a path that does not exist
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # addressed to the library's own developers
            data.write(inner)
        for child in inner.iterdir():
            child.rename(folder / child.name)
        inner.rmdir()


def element_names(ids: Sequence[str]) -> list[str]:
    """Names for slides of which SpatialData allows the characters (letters of ASCII, digits, _ - .), each different."""
    names: list[str] = []
    taken: set[str] = set()
    for text in ids:
        base = re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip("_.") or "slide"
        name, number = base, 1
        while name.lower() in taken:  # the library treats upper and lower case as equal, as some file systems do
            number += 1
            name = f"{base}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _shapes(slide: SlidePatches, name: str) -> Any:
    models, transformations = _models()
    geopandas, shapely = library("geopandas", "SpatialData stores"), library("shapely", "SpatialData stores")
    corner = slide.coords.astype(np.float64)
    far = corner + slide.patch_size
    frame = geopandas.GeoDataFrame(geometry=shapely.box(corner[:, 0], corner[:, 1], far[:, 0], far[:, 1]))
    return models.ShapesModel.parse(frame, transformations={name: transformations.Identity()})


def _image(slide: SlidePatches, name: str) -> Any:
    models, transformations = _models()
    assert slide.picture is not None
    x, y = (1 / scale for scale in slide.picture.scale)
    return models.Image2DModel.parse(
        np.ascontiguousarray(slide.picture.pixels.transpose(2, 0, 1)),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={name: transformations.Scale([x, y], axes=("x", "y"))},
    )


def _table(slides: Sequence[SlidePatches], names: Sequence[str], x: np.ndarray) -> Any:
    models, _ = _models()
    pandas = library("pandas", "SpatialData stores")
    columns = stored_names(
        names_of_values(slides),
        "SpatialData stores",
        reserved=(*COLUMNS, REGION, "zarr.json"),
        unsafe=r"[^\w.-]",
        edges="_.",
        ignore_case=True,
    )
    table = make_table(slides, columns, x)
    # Pictures are elements of their own here.
    del table.uns["spatial"]
    regions = [f"{name}_patches" for name, slide in zip(names, slides, strict=True) if len(slide)]
    of = np.repeat(np.arange(len(regions)), [len(slide) for slide in slides if len(slide)])
    table.obs[REGION] = pandas.Categorical.from_codes(of, regions)
    if not regions:
        return models.TableModel.parse(table)
    table.obs["patch"] = table.obs["patch"].astype(np.int64)
    return models.TableModel.parse(table, region=regions, region_key=REGION, instance_key="patch")


def _models() -> tuple[Any, Any]:
    return library("spatialdata.models", "SpatialData stores"), library(
        "spatialdata.transformations", "SpatialData stores"
    )
