"""The picture of a segmentation: the slide with contours in green and holes in blue, and what was left out, and why."""

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
_LEFT_OUT = {
    "excluded": ((230, 90, 0), "left out: excluded by the user"),
    "pen": ((0, 180, 200), "left out: pen mark"),
    "blur": ((235, 190, 0), "left out: out of focus"),
}
_TINT = 0.45  # weight of the colour of a region that was left out


def draw_tissue(slide: SlideImage, tissue: Tissue, line_thickness: int = 100) -> np.ndarray:
    """uint8 RGB [h, w, 3]: the segmented level, at most 4096 pixels on its longest side, with the outlines drawn on it.

    Regions that were left out are tinted, and a legend names the colours and the reasons.

    Args:
        slide: the slide.
        tissue: its contours and holes, and the regions that were left out.
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
    reasons = _tint_left_out(picture, tissue, scale)
    for outlines, colour in ((tissue.contours, _GREEN), ([h for group in tissue.holes for h in group], _BLUE)):
        # The outlines are scaled one at a time: the scaled copies of all of them would double the memory on a noisy
        # slide.
        for outline in outlines:
            points = np.round(outline * scale).astype(np.int32)
            cv2.polylines(picture, [points], True, colour, thickness, lineType=cv2.LINE_8)
    if reasons:
        _draw_legend(picture, [(_GREEN, "tissue"), (_BLUE, "hole in the tissue"), *(_LEFT_OUT[r] for r in reasons)])
    return picture


def _tint_left_out(picture: np.ndarray, tissue: Tissue, scale: np.ndarray) -> list[str]:
    """Tint the regions that were left out; returns the reasons that occur."""
    reasons = [reason for reason in _LEFT_OUT if any(region.reason == reason for region in tissue.excluded)]
    for reason in reasons:
        mask = np.zeros(picture.shape[:2], np.uint8)
        for region in tissue.excluded:
            if region.reason == reason:
                cv2.fillPoly(mask, [np.round(ring * scale).astype(np.int32) for ring in region.rings], 1)
        colour = np.array(_LEFT_OUT[reason][0], np.float32)
        inside = mask > 0
        picture[inside] = (picture[inside] * (1 - _TINT) + colour * _TINT).astype(np.uint8)
    return reasons


def _draw_legend(picture: np.ndarray, lines: list[tuple[tuple[int, int, int], str]]) -> None:
    """Write lines of text, each after a square of its colour, on white in the top left corner."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, max(0.35, max(picture.shape) / 2400)
    weight = max(1, round(size))
    boxes = [cv2.getTextSize(text, font, size, weight)[0] for _, text in lines]
    step = round(1.8 * max(height for _, height in boxes))
    width = max(width for width, _ in boxes) + 2 * step
    cv2.rectangle(picture, (0, 0), (width, step * len(lines) + step // 2), (255, 255, 255), cv2.FILLED)
    for row, (colour, text) in enumerate(lines):
        top = step // 3 + row * step
        cv2.rectangle(picture, (step // 3, top), (step // 3 + step // 2, top + step // 2), colour, cv2.FILLED)
        cv2.putText(picture, text, (step + step // 4, top + step // 2), font, size, (0, 0, 0), weight, cv2.LINE_AA)


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
