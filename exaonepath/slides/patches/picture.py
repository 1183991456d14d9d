"""The picture of a segmentation: the slide with contours in green and holes in blue."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from exaonepath.errors import OutputError
from exaonepath.files.atomic import atomic_path
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.segmentation import Tissue

LONGEST_SIDE = 4096
_SMALL_CACHE = 8 << 20
_GREEN, _BLUE = (0, 255, 0), (0, 0, 255)


def draw_tissue(slide: SlideImage, tissue: Tissue, line_thickness: int = 100) -> np.ndarray:
    """uint8 RGB [h, w, 3]: the segmented level, at most 4096 pixels on its longest side, with the outlines drawn on it.

    Args:
        slide: the slide.
        tissue: its contours and holes.
        line_thickness: of the outlines, in level-0 pixels; limited to 1/150 of the picture's longest side.
    """
    longest = max(slide.level_dimensions[tissue.seg_level])
    # A thumbnail is read from left to right, top to bottom: few tiles are needed twice, so a small cache is enough.
    with slide.tile_cache(_SMALL_CACHE):
        picture = slide.thumbnail(min(longest, LONGEST_SIDE))
    scale = np.array([picture.shape[1], picture.shape[0]]) / slide.dimensions
    wanted = round(line_thickness * float(np.sqrt(scale.prod())))
    # On a small slide without a pyramid, lines of 100 level-0 pixels would cover the tissue.
    thickness = max(1, min(wanted, max(picture.shape) // 150))
    for outlines, colour in ((tissue.contours, _GREEN), ([h for group in tissue.holes for h in group], _BLUE)):
        # The outlines are scaled one at a time: the scaled copies of all of them would double the memory on a noisy
        # slide.
        for outline in outlines:
            points = np.round(outline * scale).astype(np.int32)
            cv2.polylines(picture, [points], True, colour, thickness, lineType=cv2.LINE_8)
    return picture


def write_picture(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Write an RGB picture [h, w, 3] as JPEG, whole or not at all. The channels of `picture` are reversed in place.

    Raises:
        OutputError: the file cannot be written.
    """
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR, dst=picture))
    if not ok:
        raise OutputError(f"cannot write {path}: OpenCV could not encode it as JPEG")
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(data.tobytes())
