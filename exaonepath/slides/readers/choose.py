"""Chooses the reader of a slide file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exaonepath.errors import SlideOpenError
from exaonepath.slides.formats import why_not_readable, wrong_pixels
from exaonepath.slides.readers.base import SlideReader
from exaonepath.slides.readers.openslide import OpenSlideReader


def open_reader(path: Path, check_unchanged: Callable[[], None]) -> SlideReader:
    """Open a slide file with the reader that is right for it.

    Args:
        path: the slide file.
        check_unchanged: called after a file was opened again; raises if it is another one now.

    Raises:
        SlideOpenError: the file is missing, unreadable, truncated, has no level, or is not a slide.
    """
    _check_path(path)
    reader = OpenSlideReader(path, check_unchanged)
    if not reader.level_dimensions or min(reader.level_dimensions[0]) <= 0:
        reader.close()
        raise SlideOpenError(f"{path} has no image level; it cannot be used as a slide")
    wrong = wrong_pixels(path, reader.properties)
    if wrong is not None:
        reader.close()
        raise SlideOpenError(f"{path} {wrong}")
    return reader


def _check_path(path: Path) -> None:
    reason = why_not_readable(path)
    if reason is not None:
        raise SlideOpenError(f"{path} {reason}")
    if not path.exists():
        raise SlideOpenError(f"{path}: no such file")
    if not (path.is_file() or path.is_dir()):  # opening a pipe would block forever
        raise SlideOpenError(f"{path} is neither a file nor a folder; it cannot be a slide")
