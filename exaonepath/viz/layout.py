"""Positions of the panels of the overview picture, in inches from the top left corner, for slides of any shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

_SIDE, _GAP, _LABEL = 0.40, 0.32, 0.36  # margin, space between panels, room for a panel's heading
_TITLE, _CAPTION_LINE, _BOTTOM = 1.0, 0.205, 0.24
_PORTRAIT, _WIDE = 1.10, 3.0  # width over height up to which, and from which, the panels are arranged differently
_TILE_GAP = 0.09
_NARROWEST = 9.0


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, width, height in inches."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """The figure's size and the positions of its parts, in inches.

    Attributes:
        size: (width, height).
        slide, embedding: the two large panels.
        scatter: the plot of principal components.
        tiles: [groups][examples] of patch pictures.
        tiles_heading: the area below the heading of the tiles.
        caption: top of the caption.
    """

    size: tuple[float, float]
    slide: Box
    embedding: Box
    scatter: Box
    tiles: list[list[Box]]
    tiles_heading: Box
    caption: float

    @property
    def large(self) -> tuple[Box, Box]:
        """The two large panels."""
        return self.slide, self.embedding


def arrange(aspect: float, caption_lines: int, details: bool = True) -> Layout:
    """The layout for a slide of `aspect` = width / height; without `details`, there is no space for scatter and
    tiles."""
    layout = _portrait(aspect) if aspect < _PORTRAIT else _landscape(aspect)
    width, bottom = layout.size
    if not details:
        right, below = max(b.left + b.width for b in layout.large), max(b.top + b.height for b in layout.large)
        width, bottom = max(right + _SIDE, _NARROWEST), below + 0.16
    return replace(layout, size=(width, bottom + caption_lines * _CAPTION_LINE + _BOTTOM), caption=bottom)


def _portrait(aspect: float) -> Layout:
    """Both panels next to each other, the details in a column to their right."""
    height = 6.0
    # Panels of very tall slides are narrow; below this width their headings would overlap.
    width = height * aspect
    pitch = max(width, 2.6) + _GAP
    top = _TITLE + _LABEL
    slide = Box(_SIDE, top, width, height)
    embedding = Box(_SIDE + pitch, top, width, height)
    left, column = _SIDE + 2 * pitch + 0.12, 3.1
    scatter_height = 2.15
    scatter = Box(left + 0.16, top, column - 0.16, scatter_height)
    tiles_top = top + scatter_height + 0.30 + _LABEL
    area = Box(left, tiles_top, column, top + height - tiles_top)
    bottom = top + height + 0.16
    return Layout(
        (left + column + _SIDE, bottom),
        slide,
        embedding,
        scatter,
        _tiles(area, groups_down=True, groups=4, each=4),
        area,
        bottom,
    )


def _landscape(aspect: float) -> Layout:
    """The details in a row below the panels; panels next to each other, or above each other for a wide slide."""
    total = 11.6
    top = _TITLE + _LABEL
    if aspect < _WIDE:
        width = (total - _GAP) / 2
        height = width / aspect
        slide, embedding = Box(_SIDE, top, width, height), Box(_SIDE + width + _GAP, top, width, height)
        below = top + height
    else:
        height = total / aspect
        slide = Box(_SIDE, top, total, height)
        embedding = Box(_SIDE, top + height + _LABEL + 0.12, total, height)
        below = embedding.top + height
    row, side = below + 0.16 + _LABEL, 2.35
    scatter = Box(_SIDE + 0.16, row, 3.2, side)
    left = scatter.left + scatter.width + 0.5
    area = Box(left, row, _SIDE + total - left, side + 0.2)
    bottom = row + side + 0.42
    return Layout(
        (total + 2 * _SIDE, bottom),
        slide,
        embedding,
        scatter,
        _tiles(area, groups_down=False, groups=9, each=3),
        area,
        bottom,
    )


def _tiles(area: Box, *, groups_down: bool, groups: int, each: int) -> list[list[Box]]:
    rows, columns = (groups, each) if groups_down else (each, groups)
    side = min((area.width - (columns - 1) * _TILE_GAP) / columns, (area.height - (rows - 1) * _TILE_GAP) / rows)
    # The tiles are as large as possible; the remaining space is distributed between them.
    gap_x = (area.width - columns * side) / max(columns - 1, 1)
    gap_y = (area.height - rows * side) / max(rows - 1, 1)
    gap = min(gap_x, gap_y, 0.16)

    def place(row: int, column: int) -> Box:
        return Box(area.left + column * (side + gap), area.top + row * (side + gap), side, side)

    if groups_down:
        return [[place(group, k) for k in range(each)] for group in range(groups)]
    return [[place(k, group) for k in range(each)] for group in range(groups)]
