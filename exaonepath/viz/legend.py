"""The legend of the values of patches: a colour bar or names of categories, and what the other marks mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from exaonepath.plotting import INK, MUTED
from exaonepath.viz.palettes import CATEGORY_COLOURS, CROSS, MISSING, Palette, category_colour, colour_map
from exaonepath.viz.sheet import DPI, Frame
from exaonepath.viz.values.patch_values import MOST_COLOURS, PatchValues

_GAP, _BAR, _ROW, _SWATCH = 0.28, 0.18, 0.24, 0.15  # inches
_SMALLEST_BAR, _TALLEST_BAR = 1.0, 2.6
_LONGEST_NAME = 24


def draw_legend(
    figure: Any, frame: Frame, size: tuple[int, int], values: PatchValues, palette: Palette, *, failed: int
) -> None:
    """Draw the legend at the right of the slide.

    Args:
        figure, frame: the figure, and where the slide is on it.
        size: (width, height) of the slide on the figure, in pixels.
        values: what is shown.
        palette: of numbers.
        failed: number of patches that could not be read.
    """
    left, top = frame.left + size[0] + _GAP * DPI, float(frame.top)
    known = np.isfinite(values.values)
    if _has_bar(values, known):
        top = _numbers(figure, frame, (left, top), size[1], values, palette)
    for kind, color, text in _entries(values, known, failed):
        _entry(figure, frame, (left, top), kind, color, text)
        top += _ROW * DPI


def legend_height(values: PatchValues, failed: int) -> int:
    """Pixels that the legend takes at least."""
    known = np.isfinite(values.values)
    bar = _SMALLEST_BAR + 2.5 * _ROW if _has_bar(values, known) else 0.0
    return round((bar + len(_entries(values, known, failed)) * _ROW) * DPI)


def _has_bar(values: PatchValues, known: np.ndarray) -> bool:
    return bool(known.any()) and not values.categories and values.colours is None


def _numbers(
    figure: Any,
    frame: Frame,
    corner: tuple[float, float],
    room: int,
    values: PatchValues,
    palette: Palette,
) -> float:
    """Draw the colour bar; returns where the next row starts."""
    left, top = corner
    text(figure, frame, (left, top), values.label, color=INK, weight="bold")
    low, high = values.limits
    if not high > low:
        _entry(figure, frame, (left, top + _ROW * DPI), "fill", colour_map(palette)(0.0)[:3], f"{low:.3g}")
        return top + 2.5 * _ROW * DPI
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    height = min(_TALLEST_BAR * DPI, max(_SMALLEST_BAR * DPI, room - 1.2 * DPI))
    start = top + 1.3 * _ROW * DPI
    width, tall = frame.width, frame.height
    box = (left / width, 1 - (start + height) / tall, _BAR * DPI / width, height / tall)
    bar = figure.add_axes(box)
    mappable = ScalarMappable(Normalize(low, high), colour_map(palette))
    figure.colorbar(mappable, cax=bar, extend=ends[values.beyond], extendfrac=0.04)
    bar.tick_params(labelsize=8.5, colors=INK, length=3)
    bar.yaxis.get_offset_text().set(size=8.5, color=INK)
    return start + height + 1.2 * _ROW * DPI


def _entries(values: PatchValues, known: np.ndarray, failed: int) -> list[tuple[str, Any, str]]:
    """(kind of mark, colour, text) of every row."""
    rows: list[tuple[str, Any, str]] = []
    if values.categories:
        numbers = values.values[known].astype(np.int64)
        counts = np.bincount(numbers, minlength=len(values.categories))
        if len(values.categories) <= MOST_COLOURS:
            colours = category_colour(np.arange(len(values.categories))) / 255.0
            for name, count, colour in zip(values.categories, counts.tolist(), colours, strict=True):
                rows.append(("fill", tuple(colour), f"{_short(name)}  {count:,}"))
        else:
            rows.append(
                ("fill", tuple(CATEGORY_COLOURS[0] / 255.0), f"{len(values.categories)} {values.title.lower()}")
            )
            rows.append(("", None, f"(colours repeat after {MOST_COLOURS})"))
    missing = int((~known).sum())
    if missing:
        rows.append(("fill", tuple(shade / 255 for shade in MISSING), f"{values.missing}  {missing:,}"))
    if failed:
        rows.append(("cross", CROSS, f"could not be read  {failed:,}"))
    if values.marked is not None:
        rows.append(("frame", INK, f"patch {values.marked}"))
    return rows


def _entry(figure: Any, frame: Frame, corner: tuple[float, float], kind: str, color: Any, label: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    left, top = corner
    side = _SWATCH * DPI
    x, y = left / frame.width, 1 - (top + side) / frame.height
    width, height = side / frame.width, side / frame.height
    if kind == "cross":
        for ends in ((y, y + height), (y + height, y)):
            figure.add_artist(Line2D((x, x + width), ends, color=color, linewidth=1.4))
    elif kind:
        look = {"facecolor": color, "linewidth": 0} if kind == "fill" else {"fill": False, "edgecolor": color}
        figure.add_artist(Rectangle((x, y), width, height, **look))
    offset = side + 0.08 * DPI if kind else 0.0
    text(figure, frame, (left + offset, top - 0.01 * DPI), label, color=INK if kind else MUTED)


def text(
    figure: Any, frame: Frame, corner: tuple[float, float], words: str, *, color: str, weight: str = "normal"
) -> None:
    """Write words with their top left corner at a pixel of the figure."""
    x, y = corner[0] / frame.width, 1 - corner[1] / frame.height
    figure.text(x, y, _short(words, 40), va="top", parse_math=False, size=9.5, color=color, weight=weight)


def _short(name: str, most: int = _LONGEST_NAME) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
