"""Pen marks and areas out of focus, drawn on the pixels of a synthetic slide, with the truth about where they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from exaonepath.files.atomic import atomic_path
from exaonepath.synthetic.slide import _tifffile
from exaonepath.synthetic.tissue import Tissue

INK_COLOURS = {"blue": (35, 55, 165), "green": (30, 120, 60), "red": (205, 25, 40), "black": (25, 25, 30)}
_TRANSITION = 15.0  # pixels over which an area goes out of focus


def tissue_pixels(width: int, height: int, *, fragments: int = 2, holes: bool = True, seed: int = 0) -> np.ndarray:
    """Level 0 of a synthetic slide at 0.5 micrometres per pixel, uint8 RGB [h, w, 3]."""
    return Tissue(width, height, fragments, holes, 0.5, seed).render((0.0, 0.0), (1.0, 1.0), (width, height))


def draw_pen_marks(
    pixels: np.ndarray, colours: Sequence[str] = tuple(INK_COLOURS), *, stroke: float = 0.06, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A wavy stroke of uneven, slightly transparent ink for each colour, from left to right.

    Args:
        pixels: uint8 RGB [h, w, 3].
        colours: keys of `INK_COLOURS`.
        stroke: width of a stroke, as a part of the shorter side.
        seed: of the unevenness.

    Returns:
        The image with the marks, and bool [h, w], where the ink is.
    """
    height, width = pixels.shape[:2]
    ink = np.zeros_like(pixels)
    cover: np.ndarray = np.zeros((height, width), np.float32)
    time = np.linspace(0, 1, 60)
    for index, colour in enumerate(colours):
        x = width * (0.12 + 0.8 * index / len(colours) + 0.22 * time + 0.02 * np.sin(9 * time + index))
        y = height * (0.25 + (0.5 if index % 2 else 0.4) * time + 0.03 * np.cos(7 * time))
        line = np.stack([x, y], axis=1).astype(np.int32)
        mark = np.zeros((height, width), np.uint8)
        cv2.polylines(mark, [line], False, 255, max(1, round(stroke * min(width, height))), cv2.LINE_AA)
        ink[mark > 0] = INK_COLOURS[colour]
        np.maximum(cover, mark / np.float32(255), out=cover)
    noise = np.random.default_rng(seed).standard_normal((height // 16 + 1, width // 16 + 1)).astype(np.float32)
    density = cv2.resize(0.85 + 0.1 * cv2.GaussianBlur(noise, (0, 0), 4), (width, height))
    weight = (np.clip(density, 0.6, 1) * cover)[..., None]
    return np.rint(pixels * (1 - weight) + ink * weight).astype(np.uint8), cover > 0.5


def defocus(pixels: np.ndarray, box: tuple[int, int, int, int], sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle (x0, y0, x1, y1) of the image out of focus, by a Gaussian of `sigma` pixels, with a soft transition.

    Returns:
        The image, and bool [h, w], where it is blurred.
    """
    x0, y0, x1, y1 = box
    weight: np.ndarray = np.zeros(pixels.shape[:2], np.float32)
    weight[y0:y1, x0:x1] = 1
    weight = cv2.GaussianBlur(weight, (0, 0), _TRANSITION)
    soft = cv2.GaussianBlur(pixels, (0, 0), sigma)
    mixed = pixels * (1 - weight[..., None]) + soft * weight[..., None]
    return np.rint(mixed).astype(np.uint8), weight > 0.5


def write_pixels(path: str | os.PathLike[str], pixels: np.ndarray, factors: Sequence[int] = (1, 4, 16)) -> Path:
    """Write level-0 pixels, uint8 RGB [h, w, 3], as a tiled TIFF of 0.5 micrometres per pixel with these levels.

    Raises:
        MissingDependencyError: tifffile (extra `synthetic`) is not installed.
    """
    height, width = pixels.shape[:2]
    with atomic_path(path) as temporary, _tifffile().TiffWriter(temporary) as file:
        for factor in factors:
            size = (max(1, width // factor), max(1, height // factor))
            file.write(
                pixels if factor == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
                tile=(256, 256),
                compression="jpeg",
                photometric="rgb",
                subfiletype=int(factor > 1),
                resolution=(20_000 / factor, 20_000 / factor),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return Path(path)
