"""Patches as GeoJSON that QuPath opens: a tile for each patch, with measurements and, if wanted, a class.

What QuPath reads (qupath-core, `QuPathTypeAdapters`): a FeatureCollection or a list of features with `geometry`, an
`id` that is a UUID, and the properties `objectType` ("tile" is a kind of detection), `name`, `isLocked`,
`classification` ({"name", "color": [r, g, b]}) and `measurements`, an object of numbers by name. Coordinates are
level-0 pixels. A class (`PathClass`) has no line break, and text on both sides of a colon.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.exchange.slide_patches import SlidePatches, Values, file_name
from exaonepath.exchange.value_names import stored_names
from exaonepath.files.atomic import atomic_path, ensure_folder
from exaonepath.text import few

NAME = "QuPath"
ENDING = ".geojson"
FRAGMENT, PATCH = "Fragment", "Patch"
# Colours that remain distinct for colour-blind readers (Okabe and Ito), then mixtures of them.
_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66))
_NAMESPACE = uuid.UUID("0d4f34a2-6d6a-5f0c-9d2e-3c1f6b1f7a55")
_PER_WRITE = 4096


def plan(slide: SlidePatches, to: Path) -> dict[str, Path]:
    """The file of a slide: `to` itself, if it ends with .geojson."""
    return {"tiles": to if to.suffix.lower() == ENDING else to / f"{file_name(slide.id)}{ENDING}"}


def write(slide: SlidePatches, to: Path, *, classify: str | None = None) -> list[Path]:
    """Write a feature for each patch, whole or not at all.

    Args:
        slide: its patches; `values` become measurements (categories as their number), as do patch number and fragment.
        to: the file, or a folder.
        classify: the value that becomes the class of a tile: one of text, or of whole numbers (clusters, fragments).

    Raises:
        SettingsError: `classify` names no value, or one that is no class or has a name that QuPath refuses; the id
            cannot be a file name.
        OutputError: the file cannot be written.
    """
    path = plan(slide, to)["tiles"]
    ensure_folder(path.parent)
    classes = [""] * len(slide) if classify is None else _classes(slide, classify)
    colours = {name: _colour(number) for number, name in enumerate(sorted(set(classes), key=_natural))}
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
        file.write('{"type":"FeatureCollection","features":[')
        lines: list[str] = []
        for at, feature in enumerate(_features(slide, classes, colours)):
            lines.append(f"{',' if at else ''}\n{json.dumps(feature, separators=(',', ':'), allow_nan=False)}")
            if len(lines) == _PER_WRITE:
                file.write("".join(lines))
                lines.clear()
        file.write("".join(lines) + "]}\n")
    return [path]


def _features(
    slide: SlidePatches, classes: list[str], colours: Mapping[str, tuple[int, int, int]]
) -> Iterator[dict[str, Any]]:
    corners = (slide.coords.astype(np.int64) - np.array(slide.origin)).tolist()
    names, numbers = _measurements(slide)
    size = slide.patch_size
    for row, ((x, y), of) in enumerate(zip(corners, classes, strict=True)):
        ring = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
        # JSON has no NaN: a value that is missing is left out.
        values = {name: float(column[row]) for name, column in zip(names, numbers, strict=True)}
        properties: dict[str, Any] = {
            "objectType": "tile",
            "name": f"{PATCH} {row}",
            "isLocked": True,
            "measurements": {name: value for name, value in values.items() if np.isfinite(value)},
        }
        if of:
            properties["classification"] = {"name": of, "color": list(colours[of])}
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMESPACE, f"{slide.id}/{row}".encode("utf-8", "backslashreplace").decode())),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": properties,
        }


def _measurements(slide: SlidePatches) -> tuple[list[str], list[np.ndarray]]:
    columns: dict[str, np.ndarray] = {PATCH: np.arange(len(slide))}
    if slide.fragments is not None:
        columns[FRAGMENT] = slide.fragments
    # Shortest text that gives the same float32, not the many digits of its double.
    stored = stored_names(list(slide.values), f"{NAME}'s files", reserved=(PATCH, FRAGMENT))
    columns |= {stored[name]: _shortest(found.values) for name, found in slide.values.items()}
    return list(columns), list(columns.values())


def _shortest(values: np.ndarray) -> np.ndarray:
    return np.array([float(str(value)) for value in np.asarray(values, np.float32)], np.float64)


def _classes(slide: SlidePatches, name: str) -> list[str]:
    """The class of each patch; empty for a missing value."""
    found = slide.values.get(name)
    if not len(slide):  # a table has no row of it
        return []
    if found is None and name.lower() == FRAGMENT.lower() and slide.fragments is not None:
        found = Values(slide.fragments.astype(np.float32))
    if found is None:
        known = [*slide.values, *([] if slide.fragments is None else [FRAGMENT.lower()])]
        raise SettingsError(f"{slide.id} has no value {name!r} to classify patches by; it has {', '.join(known)}")
    values = np.asarray(found.values, np.float64)
    present = np.isfinite(values)
    if (values[present] != np.rint(values[present])).any():
        raise SettingsError(
            f"{name} holds fractions, which are no classes; classify by clusters or by a column of text"
        )
    classes = [
        "" if not there else found.categories[int(value)] if found.categories else f"{name} {int(value)}"
        for value, there in zip(values.tolist(), present.tolist(), strict=True)
    ]
    refused = sorted({text for text in classes if text and not _is_class(text)})
    if refused:
        raise SettingsError(
            f"{NAME} does not open files with the class {few(map(repr, refused), 3)} (value {name!r}): a class has no "
            "line break, and text on both sides of a colon; change the text"
        )
    return classes


def _is_class(text: str) -> bool:
    """Whether QuPath accepts a class; a colon separates a class from those derived from it ("Tumor: Positive")."""
    return not re.search(r"[\r\n]", text) and all(part.strip() for part in text.split(":"))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts "cluster 2" before "cluster 10"."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name) if part]


def _colour(number: int) -> tuple[int, int, int]:
    round_, at = divmod(number, len(_COLOURS))
    colour = np.array(_COLOURS[at], float)
    mixed = colour if not round_ else (colour + 255 * ((round_ % 2) == 1)) / 2
    r, g, b = np.rint(mixed).astype(int).tolist()
    return r, g, b
