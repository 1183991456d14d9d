"""The pixels of the pictures: the part of the slide with tissue, and the colours of the embeddings on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from exaonepath.errors import SlideReadError
from exaonepath.slides.image import SlideImage
from exaonepath.viz.colors import to_oklab, to_srgb

_MARGIN = 0.03  # margin around the tissue, relative to its longer side
_LONGEST_THUMBNAIL = 6000  # of the whole slide; limits memory if the tissue is a small part of it
_GLASS = 0.97  # approximate OKLab lightness of empty glass
_TINT = 0.22  # share of the colour for pixels without stain
_TEXTURE = 0.75  # share of the tissue's own lightness differences that is kept
_BACKGROUND = 1.0
_NEAR = 0.55  # width of the blending of neighbouring patches, in steps


@dataclass(frozen=True)
class Canvas:
    """A part of the slide as pixels.

    Attributes:
        image: uint8 RGB [h, w, 3].
        origin: (x, y) of its top left corner at level 0.
        scale: (x, y) picture pixels per level-0 pixel.
    """

    image: np.ndarray
    origin: tuple[float, float]
    scale: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]

    def points(self, level0: np.ndarray) -> np.ndarray:
        """Picture positions float [P, 2] of level-0 positions [P, 2]; pixel i spans i to i + 1."""
        return (np.asarray(level0, np.float64) - self.origin) * self.scale


def view(
    slide: SlideImage, boxes: Sequence[np.ndarray], longest: int, *, unreadable: list[SlideReadError] | None = None
) -> Canvas:
    """The slide cropped to the area of `boxes` (each level-0 points [P, 2]), `longest` pixels on the longer side.

    Without points: the whole slide. `unreadable` is as for `SlideImage.thumbnail`.

    Raises:
        SlideReadError: the slide cannot be read.
    """
    full = np.array(slide.dimensions, np.float64)
    low, high = np.zeros(2), full
    points = [box for box in boxes if len(box)]
    if points:
        low = np.min([box.min(axis=0) for box in points], axis=0).astype(np.float64)
        high = np.max([box.max(axis=0) for box in points], axis=0).astype(np.float64)
        margin = _MARGIN * (high - low).max()
        low, high = np.clip(low - margin, 0, full), np.clip(high + margin, 0, full)
        if (high - low).min() < 1:
            low, high = np.zeros(2), full
    wanted = min(longest * full.max() / (high - low).max(), _LONGEST_THUMBNAIL)
    picture = slide.thumbnail(round(wanted), unreadable=unreadable)
    scale = np.array([picture.shape[1], picture.shape[0]]) / full
    x0, y0 = np.floor(low * scale).astype(int)
    x1, y1 = np.maximum(np.ceil(high * scale).astype(int), (x0 + 1, y0 + 1))
    crop = np.ascontiguousarray(picture[y0:y1, x0:x1])
    return Canvas(crop, (x0 / scale[0], y0 / scale[1]), (float(scale[0]), float(scale[1])))


def tissue_mask(canvas: Canvas, contours: Sequence[np.ndarray], holes: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """float32 [h, w], 1 inside the tissue and 0 outside and in its holes, with a soft edge of about a pixel."""
    width, height = canvas.size
    mask: np.ndarray = np.zeros((height, width), np.uint8)
    # Each contour is drawn with its holes before the next one: an island inside a hole is another contour and is kept.
    for contour, inside in zip(contours, holes, strict=True):
        one = _filled(canvas, [contour], 255)
        if len(inside):
            one = cv2.subtract(one, _filled(canvas, inside, 255))
        cv2.max(mask, one, dst=mask)
    return cv2.GaussianBlur(mask, (0, 0), 0.7).astype(np.float32) / 255


def _filled(canvas: Canvas, outlines: Sequence[np.ndarray], value: int) -> np.ndarray:
    width, height = canvas.size
    mask: np.ndarray = np.zeros((height, width), np.uint8)
    # OpenCV's fixed-point coordinates: 4 fractional bits, so that outlines are not rounded to the pixel grid.
    polygons = [np.round((canvas.points(outline) - 0.5) * 16).astype(np.int32) for outline in outlines]
    for polygon in polygons:
        cv2.fillPoly(mask, [polygon], value, lineType=cv2.LINE_AA, shift=4)
    return mask


def color_field(
    canvas: Canvas, centres: np.ndarray, lab: np.ndarray, patch_size: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Colours of patches blended over the picture: at each pixel a weighted mean of the nearby patches.

    Time and memory depend only on the picture, not on the number of patches.

    Args:
        canvas: the picture.
        centres: float [N, 2], centres of the patches at level 0.
        lab: OKLab [N, 3]; a patch with NaN gets the colour of its neighbours.
        patch_size, step: side of a patch, and distance between neighbouring ones, at level 0.

    Returns:
        OKLab float32 [h, w, 3], and float32 [h, w]: 1 inside a patch (or inside its cell of the grid, if there are gaps
        between patches), 0 elsewhere.
    """
    width, height = canvas.size
    # Computed at a few pixels per step: the field is smooth, and a wide blur of a large picture takes seconds.
    unit = float(np.sqrt(canvas.scale[0] * canvas.scale[1]))  # pixels per level-0 pixel
    shrink = max(1.0, step * unit / 8)
    small = max(1, round(width / shrink)), max(1, round(height / shrink))
    factor = np.array(small) / (width, height)
    sums = np.zeros((small[1], small[0], 4), np.float32)
    at = np.clip(np.floor(canvas.points(centres) * factor).astype(int), 0, np.array(small) - 1)
    known = np.isfinite(lab).all(axis=1)[:, None]
    np.add.at(sums, (at[:, 1], at[:, 0]), np.concatenate([np.where(known, lab, 0), known], axis=1).astype(np.float32))
    unit *= float(np.sqrt(factor.prod()))
    pitch, reach = max(step * unit, 1.0), max(step * unit, patch_size * unit, 1.0)
    # The wider blurs have tiny weights, so they have an effect only if no patch with a colour is near.
    mixed = np.zeros_like(sums)
    for sigma, share in ((_NEAR * pitch, 1.0), (1.2 * pitch, 1e-2), (max(4 * pitch, reach), 1e-5)):
        mixed += np.float32(share) * cv2.GaussianBlur(sums, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    field: np.ndarray = mixed[..., :3] / np.maximum(mixed[..., 3:], 1e-20)

    marks: np.ndarray = np.zeros((small[1], small[0]), np.uint8)
    marks[at[:, 1], at[:, 0]] = 255
    side = round(reach) | 1
    cv2.dilate(marks, np.ones((1, side), np.uint8), dst=marks)
    cv2.dilate(marks, np.ones((side, 1), np.uint8), dst=marks)
    cover = cv2.GaussianBlur(marks, (0, 0), max(0.5, 0.1 * pitch)).astype(np.float32) / 255
    field = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    return field, cv2.resize(cover, (width, height), interpolation=cv2.INTER_LINEAR)


def restain(image: np.ndarray, field: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """The tissue as if it had been stained with the field's colours.

    Args:
        image: the slide, uint8 RGB [h, w, 3].
        field: OKLab float32 [h, w, 3].
        cover: float32 [h, w]; 0 leaves the pixel grey.

    Returns:
        uint8 RGB [h, w, 3].
    """
    light = to_oklab(image)[..., 0]
    stain = np.clip((_GLASS - light) / 0.16, 0, 1)
    stained = (cover > 0.5) & (stain > 0.9)
    middle = float(np.median(light[stained])) if stained.any() else 0.7
    grey = np.stack([np.clip(1 - 0.45 * (_GLASS - light), 0, 1), np.zeros_like(light), np.zeros_like(light)], axis=-1)
    amount = (_TINT + (1 - _TINT) * stain)[..., None]
    dyed = field.copy()
    dyed[..., 0] += _TEXTURE * (light - middle)
    # Very dark pixels (ink, folds) get a minimum lightness; otherwise their colour would not be visible.
    dyed[..., 0] = np.clip(dyed[..., 0], 0.30, 0.95)
    glass = np.array([_BACKGROUND, 0, 0], np.float32)
    dyed = glass + (dyed - glass) * amount
    return to_srgb(grey + (dyed - grey) * cover[..., None])
