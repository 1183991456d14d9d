"""Regions that a user drew and named, as GeoJSON: QuPath opens it, and `--mask` and `--exclude` read it.

A file of another program, or one that another program changed, is never replaced: it may hold more than is known here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaonepath.errors import MaskError, OutputCollisionError
from exaonepath.files.annotations import read_polygons
from exaonepath.files.artifact import canonical_json
from exaonepath.files.atomic import atomic_path
from exaonepath.files.geojson import geojson_made_from
from exaonepath.files.strict_json import parse_json
from exaonepath.text import printable

_BEGIN = '{"type":"FeatureCollection","exaonepath":'
_KEY = "regions_sha256"  # of the lines after the first: shows whether another program changed the file
MOST_REGIONS, MOST_POINTS, LONGEST_TEXT = 2_000, 20_000, 120


@dataclass(frozen=True)
class Region:
    """A polygon with a name.

    Attributes:
        name: what the user called it; may be empty.
        class_name: QuPath's classification, "Tissue" say; may be empty.
        ring: (x, y) of its points in level-0 pixels, without a repeated last point.
    """

    name: str
    class_name: str
    ring: tuple[tuple[float, float], ...]


def parse_region(value: Any, extent: tuple[int, int], where: str) -> Region:
    """A region from untrusted JSON: {"name", "class", "points"}.

    Raises:
        MaskError: it has fewer than 3 points, no area, points that are no finite numbers on the slide, or long names.
    """
    if not isinstance(value, dict) or not isinstance(value.get("points"), list):
        raise MaskError(f"{where} is not an object with a list of points")
    texts = []
    for key in ("name", "class"):
        text = value.get(key, "")
        if not isinstance(text, str) or len(text) > LONGEST_TEXT or printable(text) != text:
            raise MaskError(f"{where}: its {key} must be plain text of up to {LONGEST_TEXT} characters")
        texts.append(text.strip())
    if not 3 <= len(value["points"]) <= MOST_POINTS:
        raise MaskError(f"{where} has {len(value['points'])} points; 3 to {MOST_POINTS} are possible")
    ring = tuple(_point(point, extent, where) for point in value["points"])
    following = (*ring[1:], ring[0])
    doubled = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, following, strict=True))
    if doubled == 0:
        raise MaskError(f"{where} has no area")
    return Region(texts[0], texts[1], ring)


def read_regions(path: str | os.PathLike[str]) -> tuple[list[Region], str, bool]:
    """The regions of a file, its revision (changes with its content), and whether this package may replace it.

    A file that does not exist has no regions, and the revision "". Holes in polygons of other programs are left out.

    Raises:
        MaskError: the file is no GeoJSON.
    """
    path = Path(path)
    if not path.exists():
        return [], "", True
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise MaskError(f"{path} cannot be read: {exc.strerror}") from exc
    revision = hashlib.sha256(data).hexdigest()
    _, _, body = data.partition(b"\n")
    made_from = geojson_made_from(path)
    ours = made_from is not None and made_from.get(_KEY) == hashlib.sha256(body).hexdigest()
    if not ours:
        polygons = read_polygons(path)
        return (
            [Region("", p.class_name, tuple((float(x), float(y)) for x, y in p.rings[0])) for p in polygons if p.rings],
            revision,
            False,
        )
    regions = []
    for feature in parse_json(data, str(path), MaskError)["features"]:
        points = feature["geometry"]["coordinates"][0][:-1]
        properties = feature["properties"]
        class_name = properties.get("classification", {}).get("name", "")
        regions.append(Region(properties.get("name", ""), class_name, tuple((x, y) for x, y in points)))
    return regions, revision, True


def write_regions(
    path: str | os.PathLike[str],
    regions: Sequence[Region],
    made_from: Mapping[str, str],
    revision: str | None = None,
) -> str:
    """Write the regions as a FeatureCollection of annotations, whole or not at all; returns the new revision.

    Args:
        path: the file, in an existing folder.
        regions: in level-0 pixels.
        made_from: texts that are stored with them (the fingerprint of the slide).
        revision: that of the file that the regions replace, as `read_regions` returned it; None: whatever it is.

    Raises:
        OutputCollisionError: another program wrote or changed the file, or it has another revision.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    _, current, ours = read_regions(path)
    if not ours:
        raise OutputCollisionError(
            f"{path} was written or changed by another program (QuPath, say) and is not replaced; move it away first"
        )
    if revision is not None and revision != current:
        raise OutputCollisionError(f"{path} was changed since it was read (in another window, say); load it again")
    lines = ",\n".join(_feature(region) for region in regions)
    body = f'"features":[\n{lines}]}}\n'.encode()
    head = f"{_BEGIN}{canonical_json({**made_from, _KEY: hashlib.sha256(body).hexdigest()})},\n".encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(head + body)
    return hashlib.sha256(head + body).hexdigest()


def _point(value: Any, extent: tuple[int, int], where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise MaskError(f"{where} has a point that is no pair of numbers")
    x, y = value
    for number, side in ((x, extent[0]), (y, extent[1])):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= side:  # NaN fails too
            raise MaskError(f"{where} has a point that is not on the slide of {extent[0]} x {extent[1]} pixels")
    return round(float(x), 2), round(float(y), 2)


def _feature(region: Region) -> str:
    properties: dict[str, Any] = {"objectType": "annotation", "name": region.name, "isLocked": False}
    if region.class_name:
        properties["classification"] = {"name": region.class_name}
    ring = [list(point) for point in (*region.ring, region.ring[0])]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return json.dumps({"type": "Feature", "geometry": geometry, "properties": properties}, separators=(",", ":"))
