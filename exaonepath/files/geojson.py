"""Writes tissue outlines as GeoJSON that QuPath opens: coordinates are level-0 pixels, whatever the standard says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from exaonepath.errors import OutputCollisionError
from exaonepath.files.artifact import canonical_json
from exaonepath.files.atomic import atomic_path
from exaonepath.files.outlines import Outlines

TISSUE_CLASS, EXCLUDED_CLASS = "Tissue", "Excluded"
_COLOURS = {"tissue": (0, 170, 0), "excluded": (220, 60, 0), "pen": (0, 180, 200), "blur": (230, 180, 0)}
# The first bytes of every file that this package writes; QuPath's own files never begin so.
_OURS = b'{"type":"FeatureCollection","exaonepath":'
_LARGEST_MARK = 1 << 12


def refuse_changed_geojson(path: str | os.PathLike[str]) -> None:
    """Raise `OutputCollisionError` if another program wrote or changed the file: it may hold a user's annotations."""
    if Path(path).exists() and geojson_made_from(path) is None:
        raise OutputCollisionError(
            f"{path} was written or changed by another program (QuPath, say) and is not replaced; move it away, or ask "
            "to overwrite it"
        )


def stated_origin(made_from: Mapping[str, str]) -> tuple[int, int]:
    """The level-0 position from which the coordinates of a file of this package count."""
    x, _, y = made_from.get("origin", "0,0").partition(",")
    return (int(x), int(y)) if x.isdecimal() and y.isdecimal() else (0, 0)


def write_outlines_geojson(path: str | os.PathLike[str], outlines: Outlines, made_from: Mapping[str, str]) -> None:
    """Write the outlines as a FeatureCollection of polygons with holes, whole or not at all.

    Points between two others on a straight line are left out, which changes no polygon. Each contour is an unlocked
    annotation of class "Tissue" named by its contour index; excluded regions are annotations of class "Excluded".

    Args:
        path: the file to write, in an existing folder.
        outlines: in level-0 pixels.
        made_from: hashes that `geojson_made_from` returns, and "origin" ("x,y") if the coordinates are to count from
            another position than (0, 0); QuPath ignores them.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
        file.write(f"{_OURS.decode()}{canonical_json(made_from)},\n")
        file.write('"features":[')
        for at, feature in enumerate(_features(outlines, np.array(stated_origin(made_from)))):
            file.write(f"{',' if at else ''}\n{feature}")
        file.write("]}\n")


def geojson_made_from(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """The hashes in a file of `write_outlines_geojson`; None if the file was not written by it, or is missing."""
    try:
        with Path(path).open("rb") as file:
            line = file.readline(_LARGEST_MARK)
        if line.startswith(_OURS) and line.endswith(b",\n"):
            value = json.loads(line[len(_OURS) : -2])
            return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else None
    except (OSError, ValueError):
        return None
    return None


def _features(outlines: Outlines, origin: np.ndarray) -> Iterator[str]:
    for index, (contour, holes) in enumerate(zip(outlines.contours, outlines.holes, strict=True)):
        yield _feature([ring - origin for ring in (contour, *holes)], f"Contour {index}", TISSUE_CLASS, "tissue")
    for index, (rings, reason) in enumerate(outlines.excluded):
        name = EXCLUDED_CLASS if reason == "excluded" else f"{EXCLUDED_CLASS}: {reason}"
        yield _feature([ring - origin for ring in rings], f"Excluded {index}", name, reason)


def _feature(rings: list[np.ndarray], name: str, class_name: str, colour: str) -> str:
    coordinates = [without_collinear_points(ring) for ring in rings]
    closed = [np.concatenate([ring, ring[:1]]).tolist() for ring in coordinates]
    properties = {
        "objectType": "annotation",
        "name": name,
        "classification": {"name": class_name, "color": _COLOURS[colour]},
        "isLocked": False,
    }
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": closed}, "properties": properties}
    return json.dumps(feature, separators=(",", ":"))


def without_collinear_points(ring: np.ndarray) -> np.ndarray:
    """The ring, integer [P, 2], without repeated points and points that lie between their neighbours on one line.

    The polygon stays the same set of points: a point at which the outline turns back is kept.
    """
    points = np.asarray(ring, np.int64)
    points = points[(points != np.roll(points, 1, axis=0)).any(1)]
    if len(points) < 3:
        return np.asarray(ring)[:1] if not len(points) else points
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    straight = before[:, 0] * after[:, 1] == before[:, 1] * after[:, 0]
    onwards = (before * after).sum(1) > 0
    return points[~(straight & onwards)]
