"""The values of patches as a pyramidal OME-TIFF of the slide's size, to be laid over the slide in other programs."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import MissingDependencyError
from exaonepath.files.artifact import canonical_json, settings_hash
from exaonepath.files.atomic import atomic_path
from exaonepath.slides.image import SlideImage
from exaonepath.slides.scale import ASSUMED
from exaonepath.text import printable
from exaonepath.version import __version__
from exaonepath.viz.cells import Cells, patch_cells
from exaonepath.viz.heatmap import check_values, figure_notes, subtitle
from exaonepath.viz.palettes import FAILED, Palette, category_colour, patch_colours
from exaonepath.viz.values.patch_values import PatchValues
from exaonepath.viz.values.results import Results

TILE = 512
_SMALLEST_LEVEL = 512
_BIG_PIXELS = 1 << 30  # from here on, 64-bit offsets: four bytes a pixel, if nothing could be compressed
_SPACE = uuid.UUID("5c1e7f0a-3f0b-4a6e-9d0c-6d1f4e2b7a10")  # of the identifiers of these files


def write_overlay(
    slide: SlideImage,
    results: Results,
    values: PatchValues,
    out_tiff: str | os.PathLike[str],
    *,
    palette: Palette = "viridis",
) -> Path:
    """Write the colours of the patches as an OME-TIFF with the size of the slide's level 0, RGBA, deflate, in tiles.

    A pixel of a patch has exactly its colour and is opaque; all others are transparent (0, 0, 0, 0). Patches that could
    not be read are dark grey. Levels have half the sides of the one before (rounded up), until the longer side is at
    most 512; in each of them, pixels have the colour of a patch, never a mixture. The file states the slide's pixel
    size, unless that was assumed. Tiles are written one after another: memory does not grow with the slide. The same
    input gives the same file.

    Args:
        slide, results, values, palette: as for `draw_heatmap`; nothing is read of the slide's pixels.
        out_tiff: the file to write, in an existing folder, whole or not at all.

    Returns:
        The path.

    Raises:
        MissingDependencyError: tifffile or matplotlib is not installed.
        SettingsError: the values are of other patches, or there is no such palette.
        SlideChangedError: the slide was replaced meanwhile.
        OutputError: the file cannot be written.
    """
    tifffile = _tifffile()
    check_values(results, values)
    cells = _opaque(results, patch_colours(values, palette))
    sizes = level_sizes(*slide.dimensions)
    width, height = slide.dimensions
    tags: dict[str, Any] = {}
    if slide.mpp_source != ASSUMED:
        tags = {"resolution": (1e4 / slide.mpp, 1e4 / slide.mpp_y), "resolutionunit": "CENTIMETER"}
    path = Path(out_tiff)
    with atomic_path(path) as temporary:
        with tifffile.TiffWriter(temporary, bigtiff=width * height > _BIG_PIXELS, ome=True) as writer:
            for number, (w, h) in enumerate(sizes):
                scaled = cells.scaled((w / width, h / height))
                writer.write(
                    _tiles(scaled, w, h),
                    shape=(h, w, 4),
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    photometric="rgb",
                    extrasamples=["unassalpha"],
                    compression="adobe_deflate",
                    software=f"exaonepath {__version__}",
                    **(
                        {"subifds": len(sizes) - 1, "metadata": _ome(slide, results, values, palette), **tags}
                        if number == 0
                        else {"subfiletype": 1, "metadata": None}
                    ),
                )
        slide.check_unchanged()
    return path


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """(width, height) of each level of the overlay of a slide."""
    sizes = [(width, height)]
    while max(sizes[-1]) > _SMALLEST_LEVEL:
        factor = 1 << len(sizes)
        sizes.append((-(-width // factor), -(-height // factor)))
    return sizes


def _opaque(results: Results, colours: np.ndarray) -> Cells:
    """The cells of the patches, and below them those of the patches that could not be read, RGBA."""
    cells = patch_cells(results.coords, results.patch_size, colours)
    failed = np.array([(failure.x, failure.y) for failure in results.failures], np.int64).reshape(-1, 2)
    lost = patch_cells(failed, results.patch_size, np.full((len(failed), 3), FAILED, np.uint8), _side(cells))
    rgb = np.concatenate([lost.colours, cells.colours])
    rgba = np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], axis=1)
    return Cells(np.concatenate([lost.boxes, cells.boxes]), rgba)


def _side(cells: Cells) -> int | None:
    return round(float(cells.boxes[0, 2] - cells.boxes[0, 0])) if len(cells.boxes) else None


def _tiles(cells: Cells, width: int, height: int) -> Iterator[bytes]:
    """The compressed tiles of a level, row by row."""
    empty = zlib.compress(bytes(4 * TILE * TILE))
    for corner, inside in cells.by_tile(width, height, TILE):
        if not len(inside.boxes):
            yield empty
            continue
        tile = np.zeros((TILE, TILE, 4), np.uint8)
        inside.paint(tile[: height - corner[1], : width - corner[0]], corner)
        yield zlib.compress(tile.tobytes())


def _ome(slide: SlideImage, results: Results, values: PatchValues, palette: Palette) -> dict[str, Any]:
    """What tifffile writes as OME-XML; without its random identifier, the same input gives the same file."""
    name = f"{values.title} - {printable(slide.name)}"
    notes = figure_notes(slide, results)
    description = [subtitle(slide, results, values), _legend(values, palette), *notes]
    if results.failures:
        description.append(f"{len(results.failures)} patches could not be read: rgb{FAILED}")
    made_from = {
        "name": name,
        "description": description,
        "slide": slide.fingerprint(),
        "values": settings_hash({"bytes": zlib.crc32(values.values.tobytes()), "colours": palette}),
    }
    found: dict[str, Any] = {
        "axes": "YXS",
        "Name": name,
        "Description": "\n".join(filter(None, description)),
        "UUID": f"urn:uuid:{uuid.uuid5(_SPACE, canonical_json(made_from))}",
        "Creator": f"exaonepath {__version__}",
    }
    if slide.mpp_source != ASSUMED:
        found |= {"PhysicalSizeX": slide.mpp, "PhysicalSizeXUnit": "µm"}
        found |= {"PhysicalSizeY": slide.mpp_y, "PhysicalSizeYUnit": "µm"}
    return found


def _legend(values: PatchValues, palette: Palette) -> str:
    if values.categories:
        colours = category_colour(np.arange(len(values.categories))).tolist()
        return "; ".join(f"{name}: rgb{tuple(rgb)}" for name, rgb in zip(values.categories, colours, strict=True))
    if values.colours is not None:
        return ""
    low, high = values.limits
    return f"{values.label} from {low:.6g} to {high:.6g} in matplotlib's colours {palette}"


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as exc:
        raise MissingDependencyError(f'OME-TIFF files need tifffile ({exc}): pip install "exaonepath[viz]"') from exc
    return tifffile
