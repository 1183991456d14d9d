"""Readers from other packages, for formats that need a library of their own.

A package offers a reader as an entry point in the group `exaonepath.readers`: a function that takes the path of a file
and returns an opened `SlideReader`, or None if the file is not of its format. Entry points are loaded only for files
that no built-in reader reads.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from pathlib import Path

from exaonepath.errors import ExaonePathError, SettingsError, SlideOpenError
from exaonepath.slides.readers.base import SlideReader

logger = logging.getLogger(__name__)

GROUP = "exaonepath.readers"


def plugin_names() -> list[str]:
    """Names of the installed plug-ins, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def plugin_reader(path: Path, name: str | None = None) -> SlideReader | None:
    """The reader of the first plug-in that reads a file; None if there is none.

    Args:
        path: the slide file.
        name: ask only the plug-in of this name.

    Raises:
        SettingsError: there is no plug-in of that name.
        SlideOpenError: a plug-in failed, or returned something else.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    if name is not None:
        points = [point for point in points if point.name == name]
        if not points:
            known = ", ".join(["auto", "openslide", "tiff", "image", *plugin_names()])
            raise SettingsError(f"there is no reader {name!r}; known: {known} (plug-ins: entry points in {GROUP})")
    for point in points:
        try:
            reader = point.load()(path)
        except ExaonePathError:
            raise
        except Exception as exc:  # a plug-in may raise anything, and only this file must fail
            raise SlideOpenError(
                f"{path} cannot be opened by the reader {point.name} ({point.value}): {exc!r}"
            ) from exc
        if reader is None:
            continue
        if not isinstance(reader, SlideReader):
            raise SlideOpenError(
                f"{path}: the reader {point.name} ({point.value}) returned {type(reader).__name__}, not a SlideReader"
            )
        logger.info("%s is read by the plug-in %s", path, point.name)
        return reader
    return None
