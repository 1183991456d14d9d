"""Periodic textures ("plates") that can be sampled at any position and magnification, without storing the image."""

from __future__ import annotations

import cv2
import numpy as np

_SMALLEST_MIP = 8


class Plate:
    """A square float32 texture that repeats infinitely (or is clamped at its border), with reduced copies for low
    levels.

    Args:
        texture: float32 [n, m]; for a wrapping plate n = m is a power of two.
        scale: level-0 pixels per texture pixel.
        wrap: repeat the texture; otherwise its border is extended.
    """

    def __init__(self, texture: np.ndarray, scale: float, wrap: bool = True) -> None:
        self.scale, self.wrap = scale, wrap
        self.mips: list[np.ndarray] = [np.ascontiguousarray(texture, np.float32)]
        while min(self.mips[-1].shape) >= 2 * _SMALLEST_MIP:
            h, w = self.mips[-1].shape
            self.mips.append(cv2.resize(self.mips[-1], (w // 2, h // 2), interpolation=cv2.INTER_AREA))

    def sample(self, origin: tuple[float, float], step: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """float32 [h, w]: the texture at `origin + (i + 0.5) * step` (level-0 pixels) for a (w, h) grid of pixels."""
        # The reduced copy whose pixels are not larger than the requested ones: aliasing is below a factor of two.
        mip = min(max(0, int(np.log2(max(min(step) / self.scale, 1.0)))), len(self.mips) - 1)
        texture = self.mips[mip]
        rows, y, sy = self._window(origin[1], step[1], size[1], self.mips[0].shape[0], texture.shape[0])
        cols, x, sx = self._window(origin[0], step[0], size[0], self.mips[0].shape[1], texture.shape[1])
        window = texture[self._inside(rows, texture.shape[0])][:, self._inside(cols, texture.shape[1])]
        matrix = np.array([[sx, 0.0, x], [0.0, sy, y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(window, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def _inside(self, indices: np.ndarray, count: int) -> np.ndarray:
        return indices % count if self.wrap else np.clip(indices, 0, count - 1)

    def _window(
        self, origin: float, step: float, count: int, full: int, reduced: int
    ) -> tuple[np.ndarray, float, float]:
        pixel = self.scale * full / reduced
        first = int(np.floor((origin + 0.5 * step) / pixel - 0.5)) - 1
        indices = np.arange(first, first + int(np.ceil(count * step / pixel)) + 4)
        return indices, (origin + 0.5 * step) / pixel - 0.5 - first, step / pixel


def white_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """float32 [size, size], mean 0, standard deviation 1."""
    return rng.standard_normal((size, size), dtype=np.float32)


def smooth_noise(rng: np.random.Generator, size: int, sigma: float | tuple[float, float]) -> np.ndarray:
    """Periodic float32 [size, size] Gaussian noise blurred by `sigma` (x, y) texture pixels, mean 0, deviation 1."""
    sx, sy = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    pad = int(4 * max(sx, sy)) + 1
    padded = np.pad(white_noise(rng, size), pad, mode="wrap")
    noise = cv2.GaussianBlur(padded, (0, 0), sigmaX=sx, sigmaY=sy)[pad:-pad, pad:-pad]
    return (noise - noise.mean()) / noise.std()


def nuclei(rng: np.random.Generator, size: int, diameter: float, spacing: float) -> np.ndarray:
    """Periodic float32 [size, size] map of stained nuclei: 0 outside, about 1 inside, with chromatin texture.

    Args:
        diameter, spacing: mean size of a nucleus and mean distance between two, in texture pixels.
    """
    pad = int(2 * diameter) + 2
    canvas: np.ndarray = np.zeros((size + 2 * pad, size + 2 * pad), np.float32)
    cells = max(1, round(size / spacing))
    jitter = rng.uniform(-0.45, 0.45, (cells, cells, 2))
    for row in range(cells):
        for col in range(cells):
            axes = diameter / 2 * rng.uniform(0.7, 1.2) * np.array([1.0, rng.uniform(0.6, 1.0)])
            angle, depth = float(rng.uniform(0, 180)), float(rng.uniform(0.65, 1.15))
            centre = (np.array([col, row]) + 0.5 + jitter[row, col]) * size / cells + pad
            # A nucleus near a border is drawn again at the opposite border, which makes the texture periodic.
            copies = [[v, v - size] if v > size + pad - 2 * diameter else [v, v + size] for v in centre]
            for x in copies[0]:
                for y in copies[1]:
                    if x < canvas.shape[1] and y < canvas.shape[0]:
                        box = ((x, y), (2 * axes[0], 2 * axes[1]), angle)
                        cv2.ellipse(canvas, box, depth, -1, lineType=cv2.LINE_8)
    canvas = cv2.GaussianBlur(canvas, (0, 0), max(0.6, diameter / 18))
    texture = smooth_noise(rng, size, max(0.7, diameter / 12))
    return canvas[pad:-pad, pad:-pad] * (1 + 0.22 * texture)
