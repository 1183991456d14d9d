"""The parts of the overview picture, each drawn into given axes. Sizes of text and lines are in points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from exaonepath.plotting import HAIRLINE, INK, MUTED
from exaonepath.slides.image import SlideImage
from exaonepath.viz.canvas import Canvas
from exaonepath.viz.gallery import read_tile

OUTLINE, HOLE = "#0a7f6f", "#d9560b"
_MOST_CELLS = 20_000
_SMALLEST_CELL = 4.5  # points on the picture; a finer grid would look grey


def heading(axes: Any, title: str, *notes: str | tuple[str, str]) -> None:
    """Title above a panel, followed by notes: grey, or (text, colour) for a legend of the panel's colours."""
    text = axes.annotate(title, (0, 1), (0, 7), "axes fraction", "offset points", color=INK, size=11, weight="bold")
    gap = 9
    for note in notes:
        words, color = (note, MUTED) if isinstance(note, str) else note
        text = axes.annotate(words, (1, 0), (gap, 0), text, "offset points", color=color, size=9.5, va="bottom")
        gap = 6


def image(axes: Any, pixels: np.ndarray) -> None:
    """Show an image uint8 RGB [h, w, 3] in pixel coordinates, framed by a hairline."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="antialiased", aspect="auto")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=HAIRLINE, linewidth=0.8)


def outlines(
    axes: Any, canvas: Canvas, contours: Sequence[np.ndarray], holes: Sequence[Sequence[np.ndarray]], *, faint: bool
) -> None:
    """Draw contours and holes; `faint` for pictures in which they are not the main content."""
    from matplotlib.collections import LineCollection

    for group, color in ((contours, OUTLINE), ([hole for inside in holes for hole in inside], HOLE)):
        lines = [_simplified(canvas.points(line)) for line in group if len(line)]
        if not lines:
            continue
        if faint:
            axes.add_collection(LineCollection(lines, colors="#3b4250", linewidths=0.5, alpha=0.55))
            continue
        # A light line below, so that the outline is visible on dark and on pale tissue.
        axes.add_collection(LineCollection(lines, colors="white", linewidths=2.6, alpha=0.75))
        axes.add_collection(LineCollection(lines, colors=color, linewidths=1.3))


def cells(axes: Any, canvas: Canvas, coords: np.ndarray, patch_size: int, step: int, points_per_pixel: float) -> bool:
    """Draw the grid, for every patch the square of `step` around its centre; returns False if it would be too fine."""
    from matplotlib.collections import LineCollection

    side = step * float(np.mean(canvas.scale)) * points_per_pixel
    if side < _SMALLEST_CELL or len(coords) > _MOST_CELLS:
        return False
    centre = np.asarray(coords, np.float64) + patch_size / 2
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) * step / 2
    corners = canvas.points((centre[:, None] + square).reshape(-1, 2)).reshape(-1, 5, 2)
    width = min(0.5, side / 30)
    axes.add_collection(LineCollection(list(corners), colors=INK, linewidths=width, alpha=0.26))
    return True


def scale_bar(axes: Any, canvas: Canvas, mpp: float, points_per_pixel: float, *, assumed: bool) -> None:
    """A bar of a round length in the lower left corner, in micrometres or millimetres."""
    width, height = canvas.size
    micron = canvas.scale[0] / mpp  # picture pixels per micrometre
    span = width * points_per_pixel
    length = nice_length(min(max(0.22 * span, 42), 130, 0.8 * span) / points_per_pixel / micron)
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    pixels = length * micron
    x, y = 11 / points_per_pixel, height - 12 / points_per_pixel
    from matplotlib.patheffects import withStroke

    glow = [withStroke(linewidth=3.2, foreground="white", alpha=0.85)]
    axes.plot([x, x + pixels], [y, y], color=INK, linewidth=2.4, solid_capstyle="butt", path_effects=glow)
    note = label + (" (pixel size assumed)" if assumed else "")
    axes.annotate(note, (x, y), (0, 5), textcoords="offset points", color=INK, size=9.5, path_effects=glow)


def nice_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... micrometres that is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))


def scatter(axes: Any, scores: np.ndarray, colors: np.ndarray, explained: np.ndarray) -> None:
    """Embeddings on their first two principal components, in their colours."""
    size = float(np.clip(4200 / max(len(scores), 1), 3, 46))
    edge = 0.35 if size > 12 else 0.0
    axes.scatter(
        scores[:, 0], scores[:, 1], s=size, c=colors / 255.0, edgecolors="white", linewidths=edge, rasterized=True
    )
    centre, half = _limits(scores[:, :2])
    axes.set(xlim=(centre[0] - half[0], centre[0] + half[0]), ylim=(centre[1] - half[1], centre[1] + half[1]))
    axes.set(xticks=[], yticks=[])
    for name, share in (("x", explained[0]), ("y", explained[1])):
        getattr(axes, f"set_{name}label")(
            f"component {'12'[name == 'y']} · {share:.0%} of the variance", color=MUTED, size=8.5, labelpad=5
        )
    for side, spine in axes.spines.items():
        spine.set(color=HAIRLINE, linewidth=0.8, visible=side in ("left", "bottom"))


def _limits(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width of the plot: all points except a few far ones, and at least the usual range."""
    low, high = np.quantile(points, (0.002, 0.998), axis=0)
    return (low + high) / 2, np.maximum((high - low) / 2 * 1.12, 0.8)


def tile(axes: Any, slide: SlideImage, corner: np.ndarray, patch_size: int, color: np.ndarray, side: int) -> None:
    """One example patch in a frame of its colour."""
    image(axes, read_tile(slide, corner, patch_size, side))
    for spine in axes.spines.values():
        spine.set(color=tuple(color / 255.0), linewidth=3.0)


def _simplified(points: np.ndarray) -> np.ndarray:
    """The closed line without points that coincide on the picture: contours have one point per segmented pixel."""
    moved = np.abs(np.diff(np.round(points * 2), axis=0, prepend=np.inf)).max(axis=1) > 0
    kept = points[moved]
    return np.concatenate([kept, kept[:1]])
