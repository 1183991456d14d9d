"""Reads polygons from GeoJSON as QuPath, TRIDENT and this package write it: coordinates in level-0 pixels.

Accepted are a FeatureCollection, a list of features, one feature, or one geometry. Polygons, MultiPolygons and
collections of them are areas; every other geometry (points, lines) is none and is counted in a warning.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exaonepath.errors import MaskError, MemoryLimitError
from exaonepath.files.strict_json import parse_json, shown
from exaonepath.memory import available_host_memory

logger = logging.getLogger(__name__)

_LARGEST_FILE = 1 << 30
_MEMORY_PER_BYTE = 28  # mostly Python's objects; measured: 7 (indented) to 27 (pairs of short integers)
_FARTHEST = float(1 << 30)  # pixels; the largest slides have 2^18 along a side
_NO_AREAS = ("Point", "MultiPoint", "LineString", "MultiLineString")


class Polygon(NamedTuple):
    """An area. Rings are float64 [P, 2], as (x, y) in level-0 pixels, without a repeated last point.

    Attributes:
        rings: the outline, then the outlines of the holes.
        class_name: QuPath's classification; empty if there is none.
    """

    rings: list[np.ndarray]
    class_name: str


def read_polygons(path: str | os.PathLike[str], warn: Callable[[str], None] = logger.warning) -> list[Polygon]:
    """The polygons of a GeoJSON file, in the order of the file; a MultiPolygon is several polygons.

    Of the objects of QuPath, only annotations count: detections, cells and tiles are ignored with a warning.

    Args:
        path: the file.
        warn: called with the text of a warning.

    Raises:
        MaskError: the file is missing or too large, is not GeoJSON, or has coordinates that are no finite numbers.
        MemoryLimitError: reading it needs more memory than is available.
    """
    path = Path(path)
    value = parse_json(_read(path), str(path), MaskError, constants=True)
    ignored: Counter[str] = Counter()
    polygons = [
        Polygon(rings, class_name)
        for number, (geometry, class_name) in enumerate(_objects(path, value, ignored))
        for rings in _areas(path, geometry, f"object {number}", ignored)
    ]
    if ignored:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
        warn(f"{path}: only annotations that are areas are used; ignored: {what}")
    return polygons


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise MaskError(f"{path} has {size / 1e9:.1f} GB; a GeoJSON file of more than 1 GB is not read")
        free = available_host_memory()
        if free is not None and _MEMORY_PER_BYTE * size > free:
            raise MemoryLimitError(
                f"{path}: reading GeoJSON of {size / 1e9:.2f} GB takes about {_MEMORY_PER_BYTE * size / 1e9:.1f} GB of "
                f"memory, and {free / 1e9:.1f} GB are free; export fewer objects (annotations without detections)"
            )
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise MaskError(f"{path}: no such file") from exc
    except OSError as exc:
        raise MaskError(f"{path} cannot be read: {exc.strerror}") from exc
    if data.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise MaskError(f"{path} is compressed; unpack it first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise MaskError(f"{path} is UTF-16 text; save it again as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")  # Windows programs write this mark before UTF-8


def _objects(path: Path, value: Any, ignored: Counter[str]) -> Iterator[tuple[Any, str]]:
    """(geometry, class name) of the objects of a document."""
    if isinstance(value, dict) and value.get("crs") is not None:
        ignored["coordinate reference system (coordinates are level-0 pixels)"] += 1
    if isinstance(value, dict) and value.get("type") == "FeatureCollection":
        value = value.get("features")
        if not isinstance(value, list):
            raise MaskError(f"{path}: the FeatureCollection has no list of features")
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind is None or not isinstance(kind, str):
            raise MaskError(f"{path}: object {number} is {shown(item)}, not a GeoJSON feature or geometry")
        if kind == "FeatureCollection":
            yield from _objects(path, item, ignored)
        elif kind != "Feature":
            yield item, ""
        else:
            properties = item.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            # QuPath before version 0.4 wrote "PathAnnotationObject" as the id.
            role = properties.get("objectType", properties.get("object_type"))
            if role is None and isinstance(item.get("id"), str) and item["id"].startswith("Path"):
                role = item["id"]
            if isinstance(role, str) and role.lower() not in ("annotation", "pathannotationobject"):
                ignored[f"of type {role}"] += 1
            else:
                yield item.get("geometry"), _class_name(properties.get("classification"))


def _class_name(classification: Any) -> str:
    if isinstance(classification, str):
        return classification
    if not isinstance(classification, dict):
        return ""
    names = classification.get("names")
    if isinstance(names, list) and names:  # a class with subclasses, in QuPath from version 0.5
        return ": ".join(str(name) for name in names)
    name = classification.get("name")
    return name if isinstance(name, str) else ""


def _areas(path: Path, geometry: Any, where: str, ignored: Counter[str]) -> Iterator[list[np.ndarray]]:
    """The polygons of a geometry, each a list of rings."""
    if geometry is None:
        ignored["without geometry"] += 1
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        for member in _listed(path, geometry.get("geometries"), where):
            yield from _areas(path, member, where, ignored)
    elif kind == "Polygon":
        yield _rings(path, geometry.get("coordinates"), where)
    elif kind == "MultiPolygon":
        for polygon in _listed(path, geometry.get("coordinates"), where):
            yield _rings(path, polygon, where)
    elif kind in _NO_AREAS:
        ignored[kind] += 1
    else:
        raise MaskError(f"{path}: {where} has a geometry of type {shown(kind)}, which GeoJSON does not have")


def _listed(path: Path, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise MaskError(f"{path}: {where} has {shown(value)} where GeoJSON has a list")
    return value


def _rings(path: Path, value: Any, where: str) -> list[np.ndarray]:
    return [_ring(path, points, where) for points in _listed(path, value, where)]


def _ring(path: Path, value: Any, where: str) -> np.ndarray:
    listed = _listed(path, value, where)
    try:
        points = np.array(listed)
    except ValueError:  # positions of different lengths
        points = np.array(None)
    if points.shape == (0,):
        return np.empty((0, 2))
    numbers = points.dtype.kind in "iuf" and points.ndim == 2 and points.shape[1] >= 2
    if not numbers or any(isinstance(number, bool) for point in listed for number in point):  # true would count as 1
        raise MaskError(f"{path}: {where} has a ring whose points are not pairs of numbers: {shown(value)}")
    ring = points[:, :2].astype(np.float64)  # a third number is a height
    if not np.isfinite(ring).all():
        raise MaskError(f"{path}: {where} has coordinates that are not finite")
    if np.abs(ring).max(initial=0) > _FARTHEST:
        raise MaskError(f"{path}: {where} has a coordinate of {np.abs(ring).max():.4g}; these are no pixels of a slide")
    return ring[:-1] if len(ring) > 1 and (ring[0] == ring[-1]).all() else ring
