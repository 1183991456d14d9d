"""A picture of a slide with its patches in the colours of their values, with legend, scale bar and notes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from exaonepath.errors import SettingsError, SlideReadError
from exaonepath.plotting import INK
from exaonepath.slides.image import SlideImage
from exaonepath.text import printable
from exaonepath.viz import panels
from exaonepath.viz.canvas import Canvas, view
from exaonepath.viz.cells import Cells, patch_cells
from exaonepath.viz.legend import draw_legend, legend_height
from exaonepath.viz.palettes import CROSS, Palette, colour_map, patch_colours
from exaonepath.viz.sheet import (
    DPI,
    LEFT,
    TOP,
    Frame,
    axes_over,
    new_figure,
    notes_height,
    place_pixels,
    wrapped,
    write_heading,
    write_notes,
    write_png,
)
from exaonepath.viz.values.banners import OpenSlideFacts, banners
from exaonepath.viz.values.patch_values import PatchValues
from exaonepath.viz.values.results import Results

_LEGEND = 2.5  # inches at the right of the slide
_STRIP = 256  # rows
_NARROWEST = 7.5  # inches of the whole picture


def draw_heatmap(
    slide: SlideImage,
    results: Results,
    values: PatchValues,
    out_png: str | os.PathLike[str],
    *,
    palette: Palette = "viridis",
    opacity: float = 0.6,
    longest: int = 1600,
) -> Path:
    """Draw the part of the slide that has patches, in grey, and over it each patch in the colour of its value.

    Pixels of a patch are `(1 - opacity) * grey + opacity * colour`, rounded: with opacity 1 exactly the colour. The
    same input gives the same file.

    Args:
        slide: the open slide.
        results: its results.
        values: what is shown of the patches.
        out_png: the file to write, in an existing folder, whole or not at all.
        palette: colour map of numbers.
        opacity: of the patches, 0 to 1.
        longest: longer side of the slide on the picture, in pixels.

    Returns:
        The path of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SettingsError: an argument cannot be used, or the values are of other patches.
        SlideChangedError: the slide was replaced while it was read.
        OutputError: the picture cannot be written.
    """
    colour_map(palette)
    if not 0 <= opacity <= 1:
        raise SettingsError(f"opacity is a number from 0 to 1, not {opacity!r}")
    if not 100 <= longest <= 6000:
        raise SettingsError(f"the longer side of the picture can have 100 to 6000 pixels, not {longest!r}")
    check_values(results, values)
    unreadable: list[SlideReadError] = []
    cells = patch_cells(results.coords, results.patch_size, patch_colours(values, palette))
    outlines = [] if results.outlines is None else results.outlines.contours
    canvas = view(slide, [*outlines, cells.boxes[:, :2], cells.boxes[:, 2:]], longest, unreadable=unreadable)
    pixels = _blended(canvas, cells, opacity)

    notes = figure_notes(slide, results)
    if unreadable:
        notes.append(f"Unreadable: {len(unreadable)} area(s) of the slide cannot be read and are shown in plain grey.")
    failed = len(results.failures)
    frame, lines = _frame(canvas, notes, legend_height(values, failed))
    figure = new_figure(frame)
    write_heading(figure, frame, f"{values.title} — {printable(slide.name)}", subtitle(slide, results, values))
    write_notes(figure, frame, lines)
    axes = _on_slide(figure, frame, canvas, pixels)
    _annotate(axes, canvas, slide, results, values, cells)
    draw_legend(figure, frame, canvas.size, values, palette, failed=failed)
    return write_png(figure, out_png, slide)


def check_values(results: Results, values: PatchValues) -> None:
    """Raise `SettingsError` unless there is a value for each patch."""
    if len(values) != len(results.coords):
        raise SettingsError(f"there are {len(values)} values for {len(results.coords)} patches")


def figure_notes(slide: SlideImage, results: Results) -> list[str]:
    """What must not be overlooked about a picture: random weights, an assumed scale, another slide file."""
    return [banner["text"] for banner in banners(OpenSlideFacts.of(slide), results)] + list(results.notes)


def subtitle(slide: SlideImage, results: Results, values: PatchValues) -> str:
    """How the values were computed, and of how many patches of which size."""
    count = len(results.coords)
    if not count:
        return "no tissue found, so there are no patches"
    patches = f"{count:,} patch{'es' * (count != 1)} of {results.patch_size * slide.mpp:.0f} µm"
    return "  ·  ".join(filter(None, [values.about, patches]))


def _frame(canvas: Canvas, notes: Sequence[str], legend: int) -> tuple[Frame, list[str]]:
    width, height = canvas.size
    full = max(round(_NARROWEST * DPI), width + round((2 * LEFT + _LEGEND) * DPI))
    lines = wrapped(notes, full)
    tall = max(height, legend) + round(TOP * DPI) + notes_height(lines)
    return Frame(round(LEFT * DPI), round(TOP * DPI), full, tall), lines


def _blended(canvas: Canvas, cells: Cells, opacity: float) -> np.ndarray:
    """The slide in grey and the cells over it, uint8 RGB [h, w, 3]."""
    grey = cv2.cvtColor(canvas.image, cv2.COLOR_RGB2GRAY)
    base = np.repeat(grey[..., None], 3, axis=2)
    layer = np.zeros((*grey.shape, 4), np.uint8)
    opaque = np.concatenate([cells.colours, np.full((len(cells.colours), 1), 255, np.uint8)], axis=1)
    Cells(cells.boxes, opaque).scaled(canvas.scale, canvas.origin).paint(layer)
    for top in range(0, len(base), _STRIP):  # not the whole picture in floating point, which takes eight times as much
        part, over = base[top : top + _STRIP], layer[top : top + _STRIP]
        mixed = np.rint((1 - opacity) * part + opacity * over[..., :3]).astype(np.uint8)
        np.copyto(part, mixed, where=over[..., 3:] > 0)
    return base


def _on_slide(figure: Any, frame: Frame, canvas: Canvas, pixels: np.ndarray) -> Any:
    place_pixels(figure, frame, (frame.left, frame.top), pixels)
    return axes_over(figure, frame, (frame.left, frame.top), canvas.size)


def _annotate(
    axes: Any, canvas: Canvas, slide: SlideImage, results: Results, values: PatchValues, cells: Cells
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import withStroke

    if results.outlines is not None:
        panels.outlines(axes, canvas, results.outlines.contours, results.outlines.holes, faint=True)
    if results.failures:
        corners = np.array([(failure.x, failure.y) for failure in results.failures], np.float64)
        low = canvas.points(corners)
        high = canvas.points(corners + results.patch_size)
        crosses = [line for (x0, y0), (x1, y1) in zip(low, high, strict=True) for line in _cross(x0, y0, x1, y1)]
        glow = [withStroke(linewidth=2.6, foreground="white", alpha=0.8)]
        axes.add_collection(LineCollection(crosses, colors=CROSS, linewidths=1.3, path_effects=glow))
    if values.marked is not None:
        corner = results.coords[values.marked].astype(np.float64)
        (x0, y0), (x1, y1) = canvas.points(np.stack([corner, corner + results.patch_size]))
        ring = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]]
        glow = [withStroke(linewidth=3.4, foreground="white")]
        axes.add_collection(LineCollection(ring, colors=INK, linewidths=1.6, path_effects=glow))
    if not len(results.coords):
        centre = {"xy": (0.5, 0.5), "xycoords": "axes fraction", "ha": "center", "va": "center"}
        glow = [withStroke(linewidth=4, foreground="white")]
        axes.annotate("No tissue found", **centre, color=INK, size=13, weight="bold", path_effects=glow)
    panels.scale_bar(axes, canvas, slide.mpp, 72 / DPI, assumed=slide.mpp_source == "assumed")


def _cross(x0: float, y0: float, x1: float, y1: float) -> list[list[tuple[float, float]]]:
    return [[(x0, y0), (x1, y1)], [(x0, y1), (x1, y0)]]
