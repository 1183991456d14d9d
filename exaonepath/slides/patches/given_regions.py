"""Regions that the user gives: tissue to use (`mask`) and areas to leave out (`exclude`), as GeoJSON or as an image."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from exaonepath.errors import MaskError, SettingsError
from exaonepath.files.annotations import Polygon, read_polygons
from exaonepath.files.geojson import EXCLUDED_CLASS, geojson_made_from, stated_origin
from exaonepath.files.outlines import Excluded
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.mask_image import image_regions
from exaonepath.slides.patches.rings import clipped, is_degenerate

logger = logging.getLogger(__name__)

GEOJSON_SUFFIXES, IMAGE_SUFFIXES = (".geojson", ".json"), (".png", ".tif", ".tiff")
_LOSSY = (".jpg", ".jpeg")
_HASH_BYTES = 1 << 24

Warn = Callable[[str], None]


@dataclass(frozen=True)
class RegionFile:
    """A file of regions of one slide.

    Attributes:
        path: GeoJSON or an image.
        sha256: hash of its content, which is a part of the settings of a result.
    """

    path: Path
    sha256: str


class Region(NamedTuple):
    """An area of a slide.

    Attributes:
        rings: int32 [P, 2] each, level-0 (x, y): the outline, then the outlines of the holes in it.
        class_name: QuPath's classification, or empty.
    """

    rings: list[np.ndarray]
    class_name: str


def check_exists(given: str | os.PathLike[str] | None) -> None:
    """Raise `MaskError` if a file or folder of regions does not exist, `SettingsError` if it is no path."""
    if given is None:
        return
    if not isinstance(given, str | os.PathLike):
        raise SettingsError(f"regions are given by the path of a file or folder, not as {type(given).__name__}")
    try:
        exists = Path(given).exists()
    except (OSError, ValueError) as exc:
        raise MaskError(f"{given} cannot be read: {exc}") from exc
    if not exists:
        raise MaskError(f"{given}: no such file")


def find_region_file(given: str | os.PathLike[str] | None, slide: SlideImage, *, required: bool) -> RegionFile | None:
    """The file of regions for a slide: `given` itself, or the file in the folder `given` that has the slide's name.

    In a folder, <id>.geojson, <id>.json, <id>.png, <id>.tif and <id>.tiff are looked for, and the same after the full
    name of the slide file (slide.svs.geojson).

    Raises:
        MaskError: the file is missing (in a folder only if it is `required`), or there are several for the slide.
    """
    if given is None:
        return None
    path = Path(given)
    try:
        if path.is_dir():
            found = _in_folder(path, slide, required)
            if found is None:
                return None
            path = found
        return RegionFile(path, _sha256(path))
    except FileNotFoundError as exc:
        raise MaskError(f"{path}: no such file") from exc
    except OSError as exc:
        raise MaskError(f"{path} cannot be read: {exc.strerror}") from exc


def _in_folder(folder: Path, slide: SlideImage, required: bool) -> Path | None:
    stems = dict.fromkeys((slide.name, slide.path.name))
    names = [stem + suffix for stem in stems for suffix in (*GEOJSON_SUFFIXES, *IMAGE_SUFFIXES)]
    # The slide itself may lie in the same folder: a.tif is no mask of a.tif.
    found = [folder / name for name in names if (folder / name).is_file()]
    found = [path for path in found if not path.samefile(slide.path)]
    if len(found) > 1:
        raise MaskError(f"{folder} has several files for {slide.path}: {', '.join(path.name for path in found)}")
    if not found:
        looked_for = f"{slide.name}.geojson, .json, .png, .tif or .tiff"
        if required:
            raise MaskError(f"{folder} has no mask for {slide.path} ({looked_for})")
        logger.warning("%s has no regions to exclude for %s (%s): none are excluded", folder, slide.path, looked_for)
        return None
    return found[0]


def _sha256(path: Path) -> str:
    if not path.is_file() and path.exists():
        raise MaskError(f"{path} is not a regular file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def mask_and_exclusions(
    slide: SlideImage,
    mask: RegionFile | None,
    mask_classes: Sequence[str],
    exclude: RegionFile | None,
    exclude_classes: Sequence[str],
    origin: tuple[int, int] = (0, 0),
    *,
    exclude_given: bool = False,
) -> tuple[list[Region], list[Excluded], tuple[str, ...]]:
    """The regions of tissue (empty without a mask), the regions to exclude, and the warnings that were logged.

    In a mask, annotations of class "Excluded" (which this package writes), of QuPath's ignored classes (their names end
    with *), and of `exclude_classes`, are regions to exclude; but `exclude_classes` are those of the file `exclude` if
    regions to exclude were given (`exclude_given`), also where they hold no file for this slide. Everything else is
    tissue, or, with `mask_classes`, what has one of these classes. `origin`: see `read_regions`.

    Raises:
        MaskError: a file cannot be read, does not fit the slide, or holds no tissue to use.
    """
    excluded: list[Excluded] = []
    tissue: list[Region] = []
    notes: list[str] = []

    def warn(text: str) -> None:
        notes.append(f"has given regions: {text}")
        logger.warning("%s %s", slide.path, notes[-1])

    if mask is not None:
        regions = read_regions(mask.path, slide, origin, warn)
        own_exclusions = () if exclude_given else exclude_classes
        for region in regions:
            if _is_exclusion(region.class_name) or _named(region, own_exclusions):
                excluded.append(Excluded(region.rings, "excluded"))
            else:
                tissue.append(region)
        if mask_classes:
            tissue = [r for r in tissue if _named(r, mask_classes)]
        if not tissue:
            wanted = f" of class {', '.join(mask_classes)}" if mask_classes else ""
            raise MaskError(f"{mask.path} has no region of tissue{wanted}; {_classes_of(regions)}")
        _warn_missing(mask.path, regions, mask_classes, "as tissue", warn)
        _warn_missing(mask.path, regions, own_exclusions, "to exclude", warn)
    if exclude is not None:
        regions = read_regions(exclude.path, slide, origin, warn)
        _warn_missing(exclude.path, regions, exclude_classes, "to exclude", warn)
        if exclude_classes:
            regions = [r for r in regions if _named(r, exclude_classes)]
        excluded += [Excluded(r.rings, "excluded") for r in regions]
    return tissue, excluded, tuple(notes)


def _is_exclusion(class_name: str) -> bool:
    return class_name.partition(":")[0].casefold() == EXCLUDED_CLASS.casefold() or class_name.endswith("*")


def _named(region: Region, classes: Iterable[str]) -> bool:
    return region.class_name.casefold() in {name.casefold() for name in classes}


def _classes_of(regions: Sequence[Region]) -> str:
    counts = {name: sum(r.class_name == name for r in regions) for name in dict.fromkeys(r.class_name for r in regions)}
    return "its classes are " + ", ".join(f"{name or '(none)'} ({count})" for name, count in counts.items())


def _warn_missing(path: Path, regions: Sequence[Region], classes: Sequence[str], purpose: str, warn: Warn) -> None:
    missing = [name for name in classes if not any(_named(r, [name]) for r in regions)]
    if missing:
        warn(f"{path} has no region of class {', '.join(missing)} {purpose}; {_classes_of(regions)}")


def bounds_origin(slide: SlideImage) -> tuple[int, int]:
    """Where the area that the scanner recorded begins, (x, y) in level-0 pixels: QuPath counts from there.

    MIRAX and Leica slides are larger than that area; for other formats it is (0, 0).
    """
    x, y = (slide.properties.get(f"openslide.bounds-{axis}", "0") for axis in "xy")
    return (int(x), int(y)) if x.isdecimal() and y.isdecimal() else (0, 0)


def read_regions(
    path: Path, slide: SlideImage, origin: tuple[int, int] = (0, 0), warn: Warn = logger.warning
) -> list[Region]:
    """The regions of a GeoJSON file or an image, in level-0 pixels of a slide; never an empty list.

    Args:
        path: the file.
        slide: the slide that it belongs to.
        origin: level-0 position from which GeoJSON of other programs counts; files of this package state their own.
        warn: called with the text of a warning.

    Raises:
        MaskError: the file cannot be read, holds no area, or does not fit the slide.
    """
    suffix = path.suffix.lower()
    if suffix in _LOSSY:
        raise MaskError(f"{path} is a JPEG, whose compression changes the values at every border; use PNG or TIFF")
    if suffix not in (*GEOJSON_SUFFIXES, *IMAGE_SUFFIXES):
        raise MaskError(f"{path} is neither GeoJSON (.geojson, .json) nor an image (.png, .tif, .tiff)")
    if suffix in IMAGE_SUFFIXES:
        found, specks = image_regions(path, slide)
        regions = [Region(rings, "") for rings in found]
        if specks:
            warn(f"{specks} specks of {path}, one pixel wide, have no area and are ignored")
    else:
        ours = geojson_made_from(path)
        if ours is None and bounds_origin(slide) != (0, 0) and origin == (0, 0):
            warn(
                f"the coordinates of {path} are taken to count from the corner of the slide. QuPath counts from the "
                f"recorded area, which begins at {bounds_origin(slide)}: for its files, set geojson_origin to bounds "
                "(--geojson-origin bounds)"
            )
        shift = origin if ours is None else stated_origin(ours)
        regions = _of_polygons(path, [_shifted(polygon, shift) for polygon in read_polygons(path, warn)], slide, warn)
    if not regions:
        raise MaskError(f"{path} holds no area; regions smaller than a pixel do not count")
    return regions


def _shifted(polygon: Polygon, by: tuple[int, int]) -> Polygon:
    return polygon._replace(rings=[ring + by for ring in polygon.rings]) if by != (0, 0) else polygon


def _of_polygons(path: Path, polygons: list[Polygon], slide: SlideImage, warn: Warn) -> list[Region]:
    size = slide.dimensions
    total = len(polygons)
    polygons = [polygon for polygon in polygons if polygon.rings and len(polygon.rings[0])]
    low, high = _extent(polygons)
    if polygons and (high < 0).any() | (low > np.array(size)).any():
        raise MaskError(
            f"{path} does not fit {slide.path}: its regions lie at x {low[0]:.6g} to {high[0]:.6g}, y {low[1]:.6g} to "
            f"{high[1]:.6g}, and the slide has {size[0]} x {size[1]} pixels. Is it the file of another slide, or in "
            "other units than level-0 pixels?"
        )
    regions: list[Region] = []
    cut, outside, empty = 0, 0, total - len(polygons)
    for polygon in polygons:
        rings = [np.rint(clipped(ring, size)).astype(np.int32) for ring in polygon.rings]
        # QuPath's outline of a whole slide reaches one pixel further than the last pixel's position.
        cut += any((ring < -1).any() or (ring > size).any() for ring in polygon.rings)
        if is_degenerate(rings[0]):
            lost = is_degenerate(np.rint(polygon.rings[0]))
            empty, outside = empty + lost, outside + (not lost)
            continue
        regions.append(Region([rings[0], *(ring for ring in rings[1:] if not is_degenerate(ring))], polygon.class_name))
    if polygons and not regions and outside:
        raise MaskError(
            f"{path} does not fit {slide.path}: none of its regions lies on the {size[0]} x {size[1]} pixels"
        )
    for count, what in (
        (cut, "reach beyond the slide and are cut at its border"),
        (outside, "lie outside the slide and are ignored"),
        (empty, "have no area (fewer than three points, or all on one line) and are ignored"),
    ):
        if count:
            warn(f"{count} of {total} regions of {path} {what}")
    return regions


def _extent(polygons: list[Polygon]) -> tuple[np.ndarray, np.ndarray]:
    if not polygons:
        return np.zeros(2), np.zeros(2)
    outer = [polygon.rings[0] for polygon in polygons]
    return np.min([ring.min(0) for ring in outer], 0), np.max([ring.max(0) for ring in outer], 0)
