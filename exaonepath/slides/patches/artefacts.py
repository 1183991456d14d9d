"""Finds pen marks and areas that are out of focus, by classical rules, in bounded memory.

Pen marks: on an image of about 32x, pixels whose hue, saturation and value are those of blue, green, red or black ink
and not those of haematoxylin and eosin. Out of focus: at about 2 micrometres per pixel, cells of 128 micrometres whose
Laplacian varies much less than is usual for tissue on the same slide. Both have limits, which docs/masks.md states.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.files.outlines import Excluded
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.levels import LevelReader
from exaonepath.slides.patches.rings import is_degenerate
from exaonepath.slides.patches.saturation import Overview

logger = logging.getLogger(__name__)

KINDS = ("blur", "pen")

_SMALL_CACHE = 1 << 20
_PEN_DOWNSAMPLE = 32
_PEN_SMALLEST = 40  # pixels of a mark at 32x; a stroke has hundreds
_PEN_MARGIN = 2  # pixels around a mark, where the ink fades out
_CLOSE = 9  # pixels between strokes of one mark

_FOCUS_MPP = 2.0  # micrometres per pixel at which focus is measured
_CELL = 64  # side of a cell, in those pixels: 128 micrometres, a patch of 256 pixels at 0.5
_TISSUE_SATURATION = 20
_TISSUE_SHARE = 0.5  # of a cell, for its focus to be measured
_USUAL = 75  # percentile of the slide's cells that counts as usual: up to this share of it may be blurred
_BLURRED = 0.2  # share of the usual variance; on slides that are in focus, the smoothest 1 % of cells reach 0.24
_FEWEST_CELLS = 20  # below, a slide has no usual focus


class InkRule(NamedTuple):
    """A range of colours, as OpenCV's HSV: hue 0 to 179 (may go around), saturation and value 0 to 255, inclusive."""

    hue: tuple[int, int]
    saturation: tuple[int, int]
    value: tuple[int, int]


# Haematoxylin has a hue of about 125 to 145, eosin of 150 to 172. Where ink comes close to them, it must be saturated.
INKS = {
    "blue": (InkRule((85, 116), (60, 255), (30, 255)), InkRule((117, 122), (135, 255), (30, 255))),
    "green": (InkRule((32, 84), (50, 255), (25, 255)),),
    "red": (InkRule((175, 8), (165, 255), (90, 255)),),
    "black": (InkRule((0, 179), (0, 110), (0, 65)),),
}


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Raise `SettingsError` for a kind of artefact that is not known."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise SettingsError(f"remove: {', '.join(map(repr, unknown))} cannot be removed; known: {', '.join(KINDS)}")


def find_artefacts(slide: SlideImage, level: int, shrink: float, kinds: tuple[str, ...]) -> list[Excluded]:
    """The regions of a slide that hold pen marks ("pen") or are out of focus ("blur"), in level-0 pixels.

    Args:
        slide: an opened slide.
        level: the pyramid level that was segmented.
        shrink: factor by which it was reduced.
        kinds: what to look for.

    Raises:
        SlideReadError: a region cannot be read.
    """
    found: list[Excluded] = []
    with slide.tile_cache(_SMALL_CACHE):
        if "pen" in kinds:
            found += _regions(*_pen(slide, level, shrink), "pen")
        if "blur" in kinds:
            found += _regions(*_blur(slide), "blur")
    return found


def _pen(slide: SlideImage, level: int, shrink: float) -> tuple[np.ndarray, np.ndarray]:
    """A mask uint8 [h, w] of pen marks, and the level-0 size of its pixels, (x, y)."""
    downsample = max(slide.level_downsamples[level])
    factor = max(1, round(shrink), int(_PEN_DOWNSAMPLE / downsample))
    reader = LevelReader(slide, level)
    factor = max(1, min(factor, min(reader.size)))
    overview = Overview(reader.size, factor)
    for x, y, pixels in _pieces(reader):
        overview.add(x, y, pixels)
    mask = ink_mask(overview.pixels)
    width, height = overview.size
    return mask, np.array([slide.dimensions[0] / width, slide.dimensions[1] / height])


def ink_mask(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w]: 1 on pen marks of an RGB image [h, w, 3] of about 32x, with a margin of 2 pixels."""
    hue, saturation, value = cv2.split(cv2.cvtColor(cv2.medianBlur(image, 3), cv2.COLOR_RGB2HSV))
    mask = np.zeros(hue.shape, bool)
    for rule in (rule for rules in INKS.values() for rule in rules):
        low, high = rule.hue
        within = (hue >= low) & (hue <= high) if low <= high else (hue >= low) | (hue <= high)
        for channel, (least, most) in ((saturation, rule.saturation), (value, rule.value)):
            within &= (channel >= least) & (channel <= most)
        mask |= within
    result = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(_CLOSE))
    count, labels = cv2.connectedComponents(result, connectivity=8)
    # The area counts pixels of ink, not those that closing has joined.
    ink = np.bincount(labels[mask], minlength=count)
    small = ink < _PEN_SMALLEST
    small[0] = True
    result[small[labels]] = 0
    return cv2.dilate(result, _disc(2 * _PEN_MARGIN + 1))


def _disc(side: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _pieces(reader: LevelReader) -> Iterator[tuple[int, int, np.ndarray]]:
    """The pieces of a level as RGB; pixels without data are white: they are neither ink nor tissue."""
    for band in reader.bands():
        for x, y, pixels in band.pieces:
            rgb = pixels[..., :3]
            if pixels.shape[2] == 4 and pixels[..., 3].min() == 0:
                rgb = np.where(pixels[..., 3:] == 0, np.uint8(255), rgb)
            yield x, y, np.ascontiguousarray(rgb)


def _blur(slide: SlideImage) -> tuple[np.ndarray, np.ndarray]:
    """A mask uint8 [rows, columns] of cells that are out of focus, and the level-0 size of its pixels, (x, y)."""
    level = slide.get_best_level_for_downsample(max(1.0, _FOCUS_MPP / slide.mpp))
    downsample = max(slide.level_downsamples[level])
    factor = max(1, int(_FOCUS_MPP / (slide.mpp * downsample)))
    reader = LevelReader(slide, level)
    width, height = reader.size
    side = _CELL * factor  # of a cell, in pixels of the level
    cells = np.zeros((-(-height // side), -(-width // side), 3))  # tissue pixels, sum and sum of squares
    for x, y, pixels in _pieces(reader):
        _add_focus(cells, x // factor, y // factor, _reduced(pixels, factor))
    blurred = out_of_focus(cells)
    scale = side * np.array([slide.dimensions[0] / width, slide.dimensions[1] / height])
    # Outlines go through the centres of pixels: with four pixels a cell they keep close to the border of the cell.
    return cv2.resize(blurred, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST), scale / 4


def _reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return pixels
    size = (max(1, pixels.shape[1] // factor), max(1, pixels.shape[0] // factor))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _add_focus(cells: np.ndarray, x: int, y: int, pixels: np.ndarray) -> None:
    """Add the Laplacian of the tissue pixels of a piece at (x, y) to the cells that it lies in."""
    laplacian = cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_16S).astype(np.float64)
    tissue = cv2.extractChannel(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), 1) > _TISSUE_SATURATION
    # A piece does not know its neighbours: the Laplacian of its border is not used.
    tissue[[0, -1]] = False
    tissue[:, [0, -1]] = False
    laplacian *= tissue
    h, w = tissue.shape
    for row in range(y // _CELL, min((y + h - 1) // _CELL + 1, len(cells))):
        top, bottom = max(0, row * _CELL - y), min(h, (row + 1) * _CELL - y)
        starts = np.maximum(0, np.arange(x // _CELL, (x + w - 1) // _CELL + 1) * _CELL - x)
        last = min(len(starts), cells.shape[1] - x // _CELL)
        part = laplacian[top:bottom]
        sums = [tissue[top:bottom].sum(0), part.sum(0), (part * part).sum(0)]
        totals = np.stack([np.add.reduceat(values, starts) for values in sums], axis=1)
        cells[row, x // _CELL : x // _CELL + last] += totals[:last]


def out_of_focus(cells: np.ndarray) -> np.ndarray:
    """uint8 [rows, columns]: 1 for cells whose Laplacian varies much less than usual on the slide.

    Args:
        cells: float64 [rows, columns, 3], the number of tissue pixels, the sum of their Laplacian, that of its square.
    """
    count, total, squares = np.moveaxis(cells, 2, 0)
    some = np.maximum(count, 1)
    variance = squares / some - (total / some) ** 2
    measured = count >= _TISSUE_SHARE * _CELL**2
    if measured.sum() < _FEWEST_CELLS:
        return np.zeros(count.shape, np.uint8)
    blurred = measured & (variance < _BLURRED * np.percentile(variance[measured], _USUAL))
    # Single cells are smooth tissue (fat, mucus); blur of a scan covers several. Cells at the edge of the tissue that
    # are hardly measured join their neighbours.
    count_near = cv2.filter2D(blurred.astype(np.uint8), -1, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT)
    blurred &= count_near >= 3
    near = cv2.dilate(blurred.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return (blurred | (near & ~measured & (count > 0))).astype(np.uint8)


def _regions(mask: np.ndarray, scale: np.ndarray, reason: str) -> Iterator[Excluded]:
    outlines, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if hierarchy is None:
        return
    parents = hierarchy[0, :, 3].tolist()
    rings = [((outline.reshape(-1, 2) + 0.5) * scale).astype(np.int32) for outline in outlines]
    regions = {at: Excluded([ring], reason) for at, ring in enumerate(rings) if parents[at] < 0}
    for ring, parent in zip(rings, parents, strict=True):
        if parent >= 0 and not is_degenerate(ring):
            regions[parent].rings.append(ring)
    yield from (region for region in regions.values() if not is_degenerate(region.rings[0]))
