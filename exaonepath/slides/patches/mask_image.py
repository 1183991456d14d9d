"""Reads a mask that is an image: checks that it has the slide's shape, and traces its outlines."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from exaonepath.errors import MaskError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.rings import is_degenerate

_FORMATS = ("PNG", "TIFF")
_ORIENTATION = 274  # EXIF, and the TIFF tag


def image_regions(path: Path, slide: SlideImage) -> tuple[list[list[np.ndarray]], int]:
    """The regions of an image, in OpenCV's order, and the number of specks without area, which are left out.

    Returns:
        For each region its rings, int32 [P, 2] each, level-0 (x, y): the outline, then the holes.

    Raises:
        MaskError: the file cannot be read as an image, or does not have the shape of the slide.
    """
    mask = _read_image(path)
    height, width = mask.shape
    full_width, full_height = slide.dimensions
    # A reduced image has the slide's sides divided by one factor, each rounded up or down.
    least = max(full_width / (width + 1), full_height / (height + 1))
    most = min(full_width / max(width - 1, 1e-9), full_height / max(height - 1, 1e-9))
    if least > most:
        raise MaskError(
            f"{path} does not fit {slide.path}: it has {width} x {height} pixels (ratio {width / height:.4g}), and the "
            f"slide {full_width} x {full_height} (ratio {full_width / full_height:.4g}); a mask covers the whole slide"
        )
    scale = np.array([full_width / width, full_height / height])
    # OpenCV's outlines run through the centres of border pixels, and a pixel of a coarse mask covers many of the slide.
    # On the mask with doubled pixels, even positions are left or upper halves of pixels, and odd ones right or lower
    # halves. So each position gives the outermost slide pixel of that side.
    doubled = np.repeat(np.repeat(mask, 2, axis=0), 2, axis=1)
    outlines, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if hierarchy is None:
        return [], 0
    rings = []
    for outline in outlines:
        halves = outline.reshape(-1, 2)
        last = np.ceil((halves + 1) / 2 * scale) - 1
        rings.append(np.where(halves % 2, last, np.floor(halves / 2 * scale)).astype(np.int32))
    parents = hierarchy[0, :, 3].tolist()
    regions = {i: [ring] for i, ring in enumerate(rings) if parents[i] < 0 and not is_degenerate(ring)}
    for ring, parent in zip(rings, parents, strict=True):
        if parent in regions and not is_degenerate(ring):
            regions[parent].append(ring)
    return list(regions.values()), sum(parent < 0 for parent in parents) - len(regions)


def _read_image(path: Path) -> np.ndarray:
    """uint8 [h, w]: 1 where any colour channel is not 0 and the pixel is not transparent, else 0. NaN counts as 0."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size and of harmless tags
            with Image.open(path) as file:
                image: Image.Image = file
                if image.format not in _FORMATS:
                    raise MaskError(f"{path} is {image.format}, whatever its name says; masks are PNG or TIFF")
                orientation = image.getexif().get(_ORIENTATION, 1)
                if orientation != 1:
                    raise MaskError(
                        f"{path} states a rotation (orientation {orientation}); save it as it lies on the slide"
                    )
                if image.mode == "P" and "transparency" in image.info:
                    image = image.convert("RGBA")
                elif image.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa"):
                    image = image.convert({"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB"))
                values: np.ndarray[Any, Any] = np.asarray(image)
    except Image.DecompressionBombError as exc:
        raise MaskError(
            f"{path} is too large ({exc}); a mask at 1/16 of the slide's resolution is accurate enough"
        ) from exc
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as exc:
        raise MaskError(f"{path} cannot be read as an image: {' '.join(str(exc).split())}") from exc
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), 0, values)
    if values.ndim == 2:
        return (values != 0).astype(np.uint8)
    if values.shape[2] in (2, 4):
        return ((values[..., :-1] != 0).any(2) & (values[..., -1] != 0)).astype(np.uint8)
    return (values != 0).any(2).astype(np.uint8)
