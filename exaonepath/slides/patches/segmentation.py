"""Finds the tissue of a slide (outer contours and holes) exactly as EXAONE Path's patching does, in little memory.

The level is streamed in bands, and only one byte per pixel is kept: first the saturation of the pixels with texture
around them, then, in place, its median, the mask, and the closed mask. Each step gives the same bits as the same step
on the whole image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple

import cv2
import numpy as np

from exaonepath.errors import MemoryLimitError, SettingsError, SlideReadError, SlideSkippedError
from exaonepath.files.outlines import Excluded, Outlines
from exaonepath.memory import available_host_memory
from exaonepath.slides.image import SlideImage, leaves_out_background
from exaonepath.slides.patches.levels import Band, LevelReader, Piece

logger = logging.getLogger(__name__)

MAX_SEG_PIXELS = 40_000_000_000
WANTED_DOWNSAMPLE = 64
_WHITE_BAND = 20
_SMALLEST_SHRUNK = 8 * _WHITE_BAND
_FLAT_LAPLACIAN = 15
_UNIT_SIDE = 512
_NEARLY_FULL = WANTED_DOWNSAMPLE / 8  # a level with a smaller downsample is checked for overlooked tissue
_MUCH_MORE = 1.5  # factor of the area; on slides with much texture, the result at full resolution differs by a third
_BAND_PIXELS = 1 << 20
_SMALL_CACHE = 1 << 20


@dataclass(frozen=True)
class SegmentationSettings:
    """How tissue is distinguished from background. Defaults are EXAONE Path's.

    Attributes:
        sthresh: saturation (0-255) above which a pixel is tissue; ignored with `use_otsu`.
        mthresh: side of the median filter, in pixels of the segmentation level; made odd.
        use_otsu: choose the saturation threshold by Otsu's method.
        close: side of the morphological closing, in pixels; 0: none.
        a_t: smallest tissue area, in units of 512 x 512 level-0 pixels.
        a_h: smallest hole area (exclusive), in the same units.
        max_n_holes: holes kept per contour, largest first.
        seg_downsample: reduce the segmentation level further by this factor, >= 1.
        max_seg_pixels: largest number of pixels of the segmentation level; None or <= 0: no limit.
    """

    sthresh: int = 8
    mthresh: int = 7
    use_otsu: bool = False
    close: int = 4
    a_t: float = 1
    a_h: float = 1
    max_n_holes: int = 100
    seg_downsample: float = 1.0
    max_seg_pixels: int | None = MAX_SEG_PIXELS

    def __post_init__(self) -> None:
        for name in ("sthresh", "mthresh", "close", "a_t", "a_h", "max_n_holes", "seg_downsample", "max_seg_pixels"):
            value = getattr(self, name)
            if name == "max_seg_pixels" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise SettingsError(f"{name} must be a finite number, not {value!r}")
        for name in ("mthresh", "close", "max_n_holes"):
            value = getattr(self, name)
            if value != int(value):
                raise SettingsError(f"{name} must be a whole number, not {value!r}")
            object.__setattr__(self, name, int(value))
        if not 0 <= self.sthresh <= 255:
            raise SettingsError(f"sthresh is a saturation and must be 0 to 255, not {self.sthresh}")
        if not 0 <= self.mthresh <= 254:
            raise SettingsError(f"mthresh is the side of the median filter and must be 0 to 254, not {self.mthresh}")
        if not 0 <= self.close <= 4096:
            raise SettingsError(f"close is the side of the closing in pixels and must be 0 to 4096, not {self.close}")
        for name in ("a_t", "a_h"):
            value = getattr(self, name)
            if value < 0:
                raise SettingsError(f"{name} is an area and must be a number >= 0, not {value}")
        if self.max_n_holes < 0:
            raise SettingsError(f"max_n_holes must be >= 0, not {self.max_n_holes}")
        if self.seg_downsample < 1:
            raise SettingsError(f"seg_downsample must be a number >= 1, not {self.seg_downsample}")


class Tissue(NamedTuple):
    """The tissue of a slide, in level-0 pixels.

    Attributes:
        contours: outer outlines, each int32 [P, 2] as (x, y); their index is the patches' `contour_index`.
        holes: for each contour, its kept holes, each int32 [P, 2].
        seg_level: the pyramid level that was segmented.
        shrink: factor by which that level was reduced before segmentation.
        nothing: the reason why there is no contour; empty if there is one.
        missing: fraction of that level for which the file holds no data, in formats in which that is a fault.
        excluded: regions whose patches are left out.
    """

    contours: list[np.ndarray]
    holes: list[list[np.ndarray]]
    seg_level: int
    shrink: float = 1.0
    nothing: str = ""
    missing: float = 0.0
    excluded: Sequence[Excluded] = ()

    @property
    def outlines(self) -> Outlines:
        """The outlines as they are stored with the patches."""
        return Outlines(self.contours, self.holes, list(self.excluded))


def segment_tissue(slide: SlideImage, settings: SegmentationSettings | None = None) -> Tissue:
    """Outlines of the tissue on a slide.

    Memory stays below 8 bytes per pixel of the segmented level, whatever its size. If a level cannot be read, level
    min(2, levels - 1) is used in its place and a warning is logged.

    If a slide has no level near the wanted downsample and no tissue is found, its level is segmented again, shrunk to
    the wanted downsample. On a small slide it is shrunk less, so that its shorter side keeps 160 pixels.

    Raises:
        SlideSkippedError: the level has more than `max_seg_pixels` pixels.
        MemoryLimitError: segmentation needs more memory than is available.
        SlideReadError: neither level can be read.
    """
    settings = settings or SegmentationSettings()
    tissue = _segment_or_shrink(slide, settings)
    if tissue.missing:
        logger.warning("%s %s", slide.path, about_missing(tissue.missing))
    return tissue


def about_missing(share: float) -> str:
    """A phrase for a slide whose segmented level lacks this fraction of its data."""
    return (
        f"is incomplete: the file holds no data for {100 * share:.3g} % of the segmented level (tiles of "
        "zero length), and tissue there is not found"
    )


def _segment_or_shrink(slide: SlideImage, settings: SegmentationSettings) -> Tissue:
    tissue = _segment(slide, settings)
    factor = max(slide.level_downsamples[tissue.seg_level]) * settings.seg_downsample
    if tissue.contours or factor >= WANTED_DOWNSAMPLE / 2:
        return tissue
    # Laplacian and median are designed for a coarse image: at full resolution they find no texture in stained tissue.
    more = _further_shrink(slide, tissue.seg_level, settings)
    if more == 1:
        return tissue
    shrink = settings.seg_downsample * more
    again = _segment(slide, replace(settings, seg_downsample=shrink))
    if again.contours:
        logger.warning(
            "%s has no level near %dx: 0 contours were found at %.3gx, and after shrinking to %.3gx %d, which are used",
            slide.path,
            WANTED_DOWNSAMPLE,
            factor,
            factor * shrink / settings.seg_downsample,
            len(again.contours),
        )
        return again
    return tissue


def _further_shrink(slide: SlideImage, level: int, settings: SegmentationSettings) -> int:
    """The power of 2 by which a level must be shrunk further to come near the wanted downsample.

    It is limited, so that the white frame, measured in pixels of the shrunk image, stays a small part of the image.
    """
    factor = max(slide.level_downsamples[level]) * settings.seg_downsample
    side = min(slide.level_dimensions[level]) / settings.seg_downsample
    powers = [2**n for n in range(1, 7) if 2**n * factor <= WANTED_DOWNSAMPLE and side / 2**n >= _SMALLEST_SHRUNK]
    return powers[-1] if powers else 1


def _segment(slide: SlideImage, settings: SegmentationSettings) -> Tissue:
    level = slide.get_best_level_for_downsample(WANTED_DOWNSAMPLE)
    fallback = min(2, len(slide.level_dimensions) - 1)
    _check_size(slide, level, settings)
    # Pieces are read along tile borders, once each: a tile cache would only increase the peak memory.
    with slide.tile_cache(_SMALL_CACHE):
        try:
            return _segment_level(slide, level, settings)
        except SlideReadError as exc:
            if level == fallback:
                raise
            logger.warning("%s; segmenting level %d in place of level %d", exc, fallback, level)
            _check_size(slide, fallback, settings)
            return _segment_level(slide, fallback, settings)


def _check_size(slide: SlideImage, level: int, settings: SegmentationSettings) -> None:
    w, h = slide.level_dimensions[level]
    limit = settings.max_seg_pixels
    needed, free = LevelReader(slide, level, settings.seg_downsample).peak_bytes(), available_host_memory()
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"{slide.path}: segmenting level {level} of {w} x {h} pixels takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; shrink it first (seg_downsample = 16, or --seg-downsample 16)"
        )
    if limit is not None and 0 < limit < w * h:
        raise SlideSkippedError(
            f"{slide.path}: segmentation level {level} has {w} x {h} = {w * h} pixels, more than max_seg_pixels = "
            f"{limit}; raise the limit to process this slide"
        )


def _segment_level(slide: SlideImage, level: int, settings: SegmentationSettings) -> Tissue:
    reader = LevelReader(slide, level, settings.seg_downsample)
    if min(reader.size) < 1:
        raise SettingsError(
            f"{slide.path}: seg_downsample = {settings.seg_downsample:g} leaves nothing of level {level}, which has "
            f"{slide.level_dimensions[level]} pixels"
        )
    flat = max(slide.level_downsamples[level]) * settings.seg_downsample < _NEARLY_FULL
    shrink = _further_shrink(slide, level, settings) if flat else 1
    overview = Overview(reader.size, shrink) if shrink > 1 else None
    mask = textured_saturation(reader, overview)
    outlines, hierarchy, coloured = _outline(mask, settings)
    del mask
    missing = 0.0
    if not leaves_out_background(slide.properties):
        missing = reader.empty_pixels / math.prod(slide.level_dimensions[level])
    scale = tuple(d * settings.seg_downsample for d in slide.level_downsamples[level])
    kept = _keep(outlines, hierarchy, settings, scale)
    if kept and overview is not None:
        _warn_if_overlooked(slide, overview, settings, scale, _area(outlines, kept))
    contours = [_scaled(outlines[index], scale) for index, _ in kept]
    holes = [[_scaled(outlines[hole], scale) for hole in inside] for _, inside in kept]
    nothing = ""
    if not contours:
        # Pixels without data are black, with no texture and no saturation, so they are not tissue.
        empty = f"the file holds no data for {100 * missing:.3g} % of level {level}; " if missing else ""
        where = f"level {level}" + (f" shrunk {settings.seg_downsample:g}x" if settings.seg_downsample > 1 else "")
        if not coloured:
            nothing = (
                f"{empty}no textured pixel of {where} has a saturation above the threshold of {settings.sthresh}; the "
                f"outer {_WHITE_BAND} pixels are not looked at"
            )
        else:
            nothing = f"{empty}all {len(outlines)} outlines on {where} are smaller than a_t = {settings.a_t:g} allows"
    return Tissue(contours, holes, level, settings.seg_downsample, nothing, missing)


def _outline(mask: np.ndarray, settings: SegmentationSettings) -> tuple[Sequence[np.ndarray], np.ndarray | None, bool]:
    """Contours and hierarchy, as OpenCV returns them, of a textured saturation; and whether any pixel is tissue.

    The saturation is overwritten.
    """
    median_in_place(mask, settings.mthresh | 1)
    kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if settings.use_otsu else 0)
    cv2.threshold(mask, settings.sthresh, 255, kind, dst=mask)
    if settings.close > 0:
        cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((settings.close, settings.close), np.uint8), dst=mask)
    outlines, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return outlines, hierarchy, bool(mask.any())


class Overview:
    """A small copy of a level, built from the pieces that are read of it anyway.

    Its outlines are accurate to one pixel of the copy, which is enough to detect that much tissue was overlooked.

    Args:
        size: (width, height) of the level as it is read.
        shrink: reduction factor, an integer.
    """

    def __init__(self, size: tuple[int, int], shrink: int) -> None:
        self.size = (size[0] // shrink, size[1] // shrink)
        self.shrink = shrink
        self._pixels = np.full((self.size[1], self.size[0], 3), 255, np.uint8)

    def add(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Add a piece, uint8 [h, w, 3 or 4], whose top left corner is at (x, y) of the level as it is read."""
        h, w = pixels.shape[:2]
        left, top = x // self.shrink, y // self.shrink
        right, bottom = (min(-(-end // self.shrink), full) for end, full in zip((x + w, y + h), self.size, strict=True))
        if right > left and bottom > top:
            small = cv2.resize(pixels, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
            self._pixels[top:bottom, left:right] = small[..., :3]

    def bands(self) -> Iterator[Band]:
        """The whole overview as one band."""
        yield Band(0, self.size[1], iter([Piece(0, 0, self._pixels)]))


def _warn_if_overlooked(
    slide: SlideImage, overview: Overview, settings: SegmentationSettings, scale: tuple[float, ...], found: float
) -> None:
    """Log a warning if much more tissue would be found on the shrunk level; the result is not changed.

    At full resolution, the algorithm finds only spots of strong texture. If it finds none at all, the level is shrunk
    automatically.
    """
    outlines, hierarchy, _ = _outline(textured_saturation(overview), settings)
    scale = tuple(factor * overview.shrink for factor in scale)
    more = _area(outlines, _keep(outlines, hierarchy, settings, scale)) * overview.shrink**2
    if more > _MUCH_MORE * found:
        wanted = settings.seg_downsample * overview.shrink
        logger.warning(
            "%s has no level near %dx and was segmented at %.3gx, where tissue has little texture: %.2g times as much "
            "tissue would be found after shrinking it (seg_downsample = %g, or --seg-downsample %g)",
            slide.path,
            WANTED_DOWNSAMPLE,
            max(slide.level_downsamples[0]) * settings.seg_downsample,
            more / found,
            wanted,
            wanted,
        )


def _area(outlines: Sequence[np.ndarray], kept: Sequence[tuple[int, list[int]]]) -> float:
    """Area of the kept contours minus that of their kept holes, in pixels."""
    return sum(
        cv2.contourArea(outlines[i]) - sum(cv2.contourArea(outlines[hole]) for hole in inside) for i, inside in kept
    )


def textured_saturation(reader: LevelReader | Overview, overview: Overview | None = None) -> np.ndarray:
    """uint8 [h, w]: HSV saturation of each pixel; 0 where |Laplacian| <= 15 and in the white frame of 20-21 pixels.

    The original paints those pixels white, and white has saturation 0. The pixels read are also added to `overview`.
    """
    width, height = reader.size
    saturation = np.empty((height, width), np.uint8)
    grey = np.empty((0, width), np.uint8)  # rows [top - len(carry), bottom): the Laplacian needs one row on each side
    for top, bottom, pieces in reader.bands():
        carried = len(grey)
        grey = np.concatenate([grey, np.empty((bottom - top, width), np.uint8)])
        for x, y, pixels in pieces:
            if overview is not None:
                overview.add(x, y, pixels)
            h, w = pixels.shape[:2]
            row = y - top + carried
            cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY, dst=grey[row : row + h, x : x + w])
            cv2.extractChannel(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), 1, dst=saturation[y : y + h, x : x + w])
        first = top - carried
        _erase_flat(saturation, grey, first, top - (carried > 0), bottom if bottom == height else bottom - 1)
        grey = grey[-2:].copy()
    # Filled cv2 rectangles include their far corners: 21 rows at the top, 20 at the bottom.
    saturation[: _WHITE_BAND + 1] = 0
    saturation[max(0, height - _WHITE_BAND) :] = 0
    saturation[:, : _WHITE_BAND + 1] = 0
    saturation[:, max(0, width - _WHITE_BAND) :] = 0
    return saturation


def _erase_flat(saturation: np.ndarray, grey: np.ndarray, first: int, start: int, stop: int) -> None:
    """Zero the saturation of rows [start, stop) where the grey image, which starts at row `first`, has no texture."""
    height, width = saturation.shape
    # 128 + Laplacian, saturated to a byte, decides |Laplacian| <= 15 exactly, in an eighth of the memory of float64.
    values = np.arange(256)
    keep = np.where(np.abs(values - 128) <= _FLAT_LAPLACIAN, 0, 255).astype(np.uint8)
    rows = max(1, _BAND_PIXELS // (4 * width))
    for top in range(start, stop, rows):
        bottom = min(top + rows, stop)
        above, below = int(top > 0), int(bottom < height)
        laplacian = cv2.Laplacian(grey[top - above - first : bottom + below - first], cv2.CV_8U, delta=128)
        textured = cv2.LUT(laplacian[above : above + bottom - top], keep)
        cv2.bitwise_and(saturation[top:bottom], textured, dst=saturation[top:bottom])


def median_in_place(image: np.ndarray, side: int) -> None:
    """cv2.medianBlur of a uint8 image [h, w] by an odd `side`, in bands; the image border is replicated, as in cv2."""
    if side == 1:
        return
    height, width = image.shape
    reach = side // 2
    rows, columns = max(4 * side, _BAND_PIXELS // width), 512
    above = np.empty((0, width), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        source = np.concatenate([above, image[top : bottom + reach]])
        offset = len(above)
        above = source[max(0, offset + bottom - top - reach) : offset + bottom - top].copy()
        for x in range(0, width, columns):
            x0, x1 = max(0, x - reach), min(x + columns + reach, width)
            block = source[:, x0:x1]
            # Most of a slide is empty, and the median of zeros is zero: empty blocks are skipped.
            if cv2.countNonZero(block):
                blurred = cv2.medianBlur(block, side)
                image[top:bottom, x : x + columns] = blurred[offset : offset + bottom - top, x - x0 : x - x0 + columns]


def _keep(
    outlines: Sequence[np.ndarray],
    hierarchy: np.ndarray | None,
    settings: SegmentationSettings,
    scale: tuple[float, ...],
) -> list[tuple[int, list[int]]]:
    """Indices of the outer contours that are large enough, each with its kept holes, largest first."""
    if hierarchy is None:
        return []
    unit = max(1, int(_UNIT_SIDE**2 / (scale[0] * scale[1])))
    areas = [cv2.contourArea(outline) for outline in outlines]
    parents = hierarchy[0, :, 3].tolist()
    inside: dict[int, list[int]] = {}
    for index, parent in enumerate(parents):
        if parent >= 0:
            inside.setdefault(parent, []).append(index)
    kept = []
    for index, parent in enumerate(parents):
        if parent >= 0:
            continue
        holes = inside.get(index, [])
        area = areas[index] - sum(areas[hole] for hole in holes)
        if area > 0 and area >= settings.a_t * unit:
            largest = sorted(holes, key=lambda hole: areas[hole], reverse=True)[: settings.max_n_holes]
            kept.append((index, [hole for hole in largest if areas[hole] > settings.a_h * unit]))
    return kept


def _scaled(outline: np.ndarray, scale: tuple[float, ...]) -> np.ndarray:
    return (outline.reshape(-1, 2) * np.array(scale)).astype(np.int32)
