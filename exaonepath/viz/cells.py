"""The squares in which the values of patches are drawn: on the whole slide, or on a part of it at any scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exaonepath.slides.patches.fragments import grid_step


@dataclass(frozen=True)
class Cells:
    """Squares in level-0 pixels, each of one colour; where some overlap, the later one is seen.

    Attributes:
        boxes: float64 [N, 4]: left, top, right, bottom.
        colours: uint8 [N, C].
    """

    boxes: np.ndarray
    colours: np.ndarray

    def scaled(self, scale: tuple[float, float], origin: tuple[float, float] = (0.0, 0.0)) -> Cells:
        """The cells in whole pixels of a picture, at least one in each direction.

        Args:
            scale: (x, y) picture pixels per level-0 pixel.
            origin: level-0 position of the picture's corner.
        """
        factor, shift = np.tile(scale, 2), np.tile(origin, 2)
        # Edges are rounded, not sizes: neighbours stay neighbours, without gaps.
        boxes = np.floor((self.boxes - shift) * factor + 0.5).astype(np.int64)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        return Cells(boxes, self.colours)

    def paint(self, picture: np.ndarray, corner: tuple[int, int] = (0, 0)) -> None:
        """Draw scaled cells on a picture [h, w, C], of which the top left pixel is at `corner`."""
        height, width = picture.shape[:2]
        boxes = self.boxes - np.tile(corner, 2)
        low = np.maximum(boxes[:, :2], 0)
        high = np.minimum(boxes[:, 2:], (width, height))
        seen = np.flatnonzero((low < high).all(axis=1))
        for (x0, y0), (x1, y1), colour in zip(low[seen].tolist(), high[seen].tolist(), self.colours[seen], strict=True):
            picture[y0:y1, x0:x1] = colour

    def by_tile(self, width: int, height: int, side: int) -> Iterator[tuple[tuple[int, int], Cells]]:
        """((x, y) of a tile's corner, the cells in it) of every tile of a picture of scaled cells, row by row."""
        top = np.argsort(self.boxes[:, 1], kind="stable")
        tops = self.boxes[top, 1]
        tallest = int((self.boxes[:, 3] - self.boxes[:, 1]).max(initial=1))
        for y in range(0, height, side):
            first, last = np.searchsorted(tops, (y - tallest, y + side))
            row = np.sort(top[first:last])
            row = row[self.boxes[row, 3] > y]
            left = row[np.argsort(self.boxes[row, 0], kind="stable")]
            lefts = self.boxes[left, 0]
            widest = int((self.boxes[row, 2] - self.boxes[row, 0]).max(initial=1))
            for x in range(0, width, side):
                first, last = np.searchsorted(lefts, (x - widest, x + side))
                inside = np.sort(left[first:last])  # in the order in which they are drawn
                inside = inside[self.boxes[inside, 2] > x]
                yield (x, y), Cells(self.boxes[inside], self.colours[inside])


def patch_cells(coords: np.ndarray, patch_size: int, colours: np.ndarray, step: int | None = None) -> Cells:
    """The cell of each patch: its square, or if patches overlap, the square of the grid around its centre.

    Args:
        coords: int [N, 2], corners in level-0 pixels.
        patch_size: in level-0 pixels.
        colours: uint8 [N, C].
        step: distance between neighbouring patches; None: inferred from the coordinates.
    """
    step = grid_step(coords, patch_size) if step is None else step
    side = min(patch_size, step)
    corner = np.asarray(coords, np.float64) + (patch_size - side) / 2
    return Cells(np.concatenate([corner, corner + side], axis=1).reshape(-1, 4), colours)
