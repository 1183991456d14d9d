"""The sheet that pictures of patches are drawn on: a figure whose pixels are kept as they are, a heading and notes."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exaonepath.files.atomic import atomic_path
from exaonepath.plotting import HAIRLINE, INK, MUTED, require_matplotlib
from exaonepath.slides.image import SlideImage

DPI = 150
LEFT, TOP = 0.3, 0.95  # inches: margin, and height of the heading
_BOTTOM, _LINE = 0.3, 0.2
_NOTE_COLOUR = "#9a3b00"
_CHARACTERS_PER_INCH, _TITLE_CHARACTERS_PER_INCH = 12.5, 7.0


class Frame(NamedTuple):
    """Where the slide is on the figure, in pixels: (left, top) of its corner, and (width, height) of the figure."""

    left: int
    top: int
    width: int
    height: int


def new_figure(frame: Frame) -> Any:
    """An empty matplotlib figure of the frame's size.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    # The hundredth of a pixel keeps the size from being rounded down.
    size = ((frame.width + 0.01) / DPI, (frame.height + 0.01) / DPI)
    return require_matplotlib()(figsize=size, dpi=DPI, facecolor="white")


def write_png(figure: Any, out_png: str | os.PathLike[str], slide: SlideImage) -> Path:
    """Write a figure, whole or not at all, and only if the slide is still the one that was opened.

    Raises:
        SlideChangedError, SlideOpenError: it is not.
        OutputError: the file cannot be written.
    """
    path = Path(out_png)
    with atomic_path(path) as temporary:
        # Without creation date and version, the same input gives the same file.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        slide.check_unchanged()
    return path


def write_heading(figure: Any, frame: Frame, title: str, about: str) -> None:
    """Write title and subtitle, shortened to the width of the figure."""
    inches = frame.width / DPI - 2 * LEFT
    texts = (
        (0.24, title, 17, "bold", INK, _TITLE_CHARACTERS_PER_INCH),
        (0.58, about, 10.5, "normal", MUTED, _CHARACTERS_PER_INCH),
    )
    for top, text, size, weight, color, density in texts:
        room = int(inches * density)
        shown = text if len(text) <= room else f"{text[: room - 1]}…"
        x, y = LEFT * DPI / frame.width, 1 - top * DPI / frame.height
        # Names of files may contain a dollar sign, which would otherwise start a formula.
        figure.text(x, y, shown, va="top", parse_math=False, size=size, weight=weight, color=color)


def wrapped(notes: Sequence[str], width: int) -> list[str]:
    """Notes as lines that fit on a figure of `width` pixels."""
    characters = int((width / DPI - 2 * LEFT) * _CHARACTERS_PER_INCH)
    return [line for note in notes for line in textwrap.wrap(note, characters)]


def notes_height(lines: Sequence[str]) -> int:
    """Pixels that the notes and the margin take at the lower edge."""
    return round((_BOTTOM + len(lines) * _LINE) * DPI)


def write_notes(figure: Any, frame: Frame, lines: Sequence[str]) -> None:
    """Write the notes at the lower edge."""
    if lines:
        y = (0.14 + len(lines) * _LINE) * DPI / frame.height
        style = {"va": "top", "parse_math": False, "size": 9.5, "color": _NOTE_COLOUR, "linespacing": 1.3}
        figure.text(LEFT * DPI / frame.width, y, "\n".join(lines), **style)


def axes_over(figure: Any, frame: Frame, corner: tuple[int, int], size: tuple[int, int]) -> Any:
    """Transparent axes over some pixels of the figure, in which data coordinates are pixels from their corner."""
    (left, top), (width, height) = corner, size
    box = (left / frame.width, 1 - (top + height) / frame.height, width / frame.width, height / frame.height)
    axes = figure.add_axes(box, facecolor="none")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=HAIRLINE, linewidth=0.8)
    return axes


def place_pixels(figure: Any, frame: Frame, corner: tuple[int, int], pixels: np.ndarray) -> None:
    """Put an image uint8 [h, w, 3] on the figure, pixel for pixel."""
    below = frame.height - corner[1] - pixels.shape[0]
    figure.figimage(pixels, corner[0], below, origin="upper", zorder=-1)
