"""Finds the tissue of a slide (outer contours and holes) exactly as EXAONE Path's patching does, in little memory.

The level is streamed in bands, and only one byte per pixel is kept: first the saturation of the pixels with texture
around them, then, in place, its median, the mask, and the closed mask. Each step gives the same bits as the same step
on the whole image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np

from exaonepath.errors import MemoryLimitError, SettingsError, SlideReadError, SlideSkippedError
from exaonepath.files.outlines import Excluded, Outlines
from exaonepath.memory import available_host_memory
from exaonepath.slides.image import SlideImage, leaves_out_background
from exaonepath.slides.patches.levels import LevelReader
from exaonepath.slides.patches.saturation import (
    WHITE_BAND,
    Overview,
    erase_frame,
    median_in_place,
    textured_saturation,
)
from exaonepath.slides.patches.settings import AUTO, SegmentationSettings
from exaonepath.slides.patches.shrinking import (
    NEARLY_FULL,
    WANTED_DOWNSAMPLE,
    automatic_shrink,
    further_shrink,
    is_much_finer,
)

logger = logging.getLogger(__name__)

_UNIT_SIDE = 512
_MUCH_MORE = 1.5  # factor of the area; on slides with much texture, the result at full resolution differs by a third
_SMALL_CACHE = 1 << 20


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
        segmenter: what found the tissue: "exaone", "otsu", "mask", or the name of a plug-in.
        tries: (level, shrink, contours found) of each segmentation that was tried; the last one with contours is used.
        notes: warnings about the segmentation, phrases that follow the name of the slide; they were logged already.
    """

    contours: list[np.ndarray]
    holes: list[list[np.ndarray]]
    seg_level: int
    shrink: float = 1.0
    nothing: str = ""
    missing: float = 0.0
    excluded: Sequence[Excluded] = ()
    segmenter: str = "exaone"
    tries: tuple[tuple[int, float, int], ...] = ()
    notes: tuple[str, ...] = ()

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
    if settings.seg_downsample == AUTO:
        settings = replace(settings, seg_downsample=automatic_shrink(slide))
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
    factor = max(slide.level_downsamples[tissue.seg_level]) * settings.shrink
    if tissue.contours or not is_much_finer(factor):
        return tissue
    more = further_shrink(slide, tissue.seg_level, settings.shrink)
    if more == 1:
        return tissue
    again = _segment(slide, replace(settings, seg_downsample=settings.shrink * more))
    tries = (*tissue.tries, *again.tries)
    if not again.contours:
        nothing = f"{tissue.nothing}. After shrinking to {factor * more:.3g}x: {again.nothing}"
        return tissue._replace(tries=tries, nothing=nothing)
    note = (
        f"has no level near {WANTED_DOWNSAMPLE}x: 0 contours were found at {factor:.3g}x, and after shrinking to "
        f"{factor * more:.3g}x {len(again.contours)}, which are used (as with --seg-downsample auto)"
    )
    logger.warning("%s %s", slide.path, note)
    return again._replace(tries=tries, notes=(*again.notes, note))


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
            tissue = _segment_level(slide, fallback, settings)
            note = f"has an unreadable level {level}; level {fallback} was segmented in its place"
            return tissue._replace(notes=(note, *tissue.notes))


def _check_size(slide: SlideImage, level: int, settings: SegmentationSettings) -> None:
    w, h = slide.level_dimensions[level]
    limit = settings.max_seg_pixels
    needed, free = LevelReader(slide, level, settings.shrink).peak_bytes(), available_host_memory()
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
    reader = LevelReader(slide, level, settings.shrink)
    if min(reader.size) < 1:
        raise SettingsError(
            f"{slide.path}: seg_downsample = {settings.shrink:g} leaves nothing of level {level}, which has "
            f"{slide.level_dimensions[level]} pixels"
        )
    flat = max(slide.level_downsamples[level]) * settings.shrink < NEARLY_FULL
    further = further_shrink(slide, level, settings.shrink) if flat else 1
    overview = Overview(reader.size, further) if further > 1 else None
    mask = textured_saturation(reader, overview)
    frame = erase_frame(mask)
    outlines, hierarchy, coloured = _outline(mask, settings)
    del mask
    missing = 0.0
    if not leaves_out_background(slide.properties):
        missing = reader.empty_pixels / math.prod(slide.level_dimensions[level])
    scale = tuple(d * settings.shrink for d in slide.level_downsamples[level])
    kept = _keep(outlines, hierarchy, settings, scale)
    notes: tuple[str, ...] = ()
    if kept and overview is not None:
        notes = _overlooked(overview, settings, scale, _area(outlines, kept))
        for note in notes:
            logger.warning("%s %s", slide.path, note)
    contours = [_scaled(outlines[index], scale) for index, _ in kept]
    holes = [[_scaled(outlines[hole], scale) for hole in inside] for _, inside in kept]
    nothing = ""
    if not contours:
        # Pixels without data are black, with no texture and no saturation, so they are not tissue.
        empty = f"the file holds no data for {100 * missing:.3g} % of level {level}; " if missing else ""
        where = f"level {level}" + (f" shrunk {settings.shrink:g}x" if settings.shrink > 1 else "")
        nothing = empty + _why_nothing(where, reader.size, coloured, len(outlines), frame, settings)
    tries = ((level, settings.shrink, len(contours)),)
    return Tissue(contours, holes, level, settings.shrink, nothing, missing, tries=tries, notes=notes)


def _why_nothing(
    where: str,
    size: tuple[int, int],
    coloured: bool,
    outlines: int,
    frame: list[np.ndarray],
    settings: SegmentationSettings,
) -> str:
    """The reason why a level has no contour. `frame`: the sides that the white frame covered, in full saturation."""
    for side in frame:
        median_in_place(side, settings.mthresh | 1)
    in_frame = any((side > settings.sthresh).any() for side in frame)
    if coloured:
        reason = f"all {outlines} outlines on {where} are smaller than a_t = {settings.a_t:g} allows"
        return reason + (f"; more lies in its outer {WHITE_BAND} pixels, which are not looked at" if in_frame else "")
    if in_frame:
        return (
            f"all textured, saturated pixels of {where}, which has {size[0]} x {size[1]} pixels, lie in its outer "
            f"{WHITE_BAND} pixels, which are not looked at; give the tissue as a mask (--mask)"
        )
    return f"no textured pixel of {where} has a saturation above the threshold of {settings.sthresh}"


def _overlooked(
    overview: Overview, settings: SegmentationSettings, scale: tuple[float, ...], found: float
) -> tuple[str, ...]:
    """A warning if much more tissue would be found on the shrunk level; the result is not changed.

    At full resolution, the algorithm finds only spots of strong texture. If it finds none at all, the level is shrunk
    automatically.
    """
    mask = textured_saturation(overview)
    erase_frame(mask)
    outlines, hierarchy, _ = _outline(mask, settings)
    shrunk = tuple(factor * overview.shrink for factor in scale)
    more = _area(outlines, _keep(outlines, hierarchy, settings, shrunk)) * overview.shrink**2
    if more <= _MUCH_MORE * found:
        return ()
    return (
        f"has no level near {WANTED_DOWNSAMPLE}x and was segmented at {max(scale):.3g}x, where tissue has little "
        f"texture: {more / found:.2g} times as much tissue would be found after shrinking it (seg_downsample = "
        f'"{AUTO}", or --seg-downsample {AUTO})',
    )


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


def _area(outlines: Sequence[np.ndarray], kept: Sequence[tuple[int, list[int]]]) -> float:
    """Area of the kept contours minus that of their kept holes, in pixels."""
    return sum(
        cv2.contourArea(outlines[i]) - sum(cv2.contourArea(outlines[hole]) for hole in inside) for i, inside in kept
    )


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
