"""The content of a synthetic slide: tissue fragments with holes, stroma, epithelium, nuclei, lumens, in H&E colours.

Every pixel is a function of its level-0 position, the level's downsample and the seed, so any tile of any level can be
drawn alone. Colours are computed from optical densities of haematoxylin and eosin, as in a real stain: intensity =
background * exp(-(h * H + e * E)).
"""

from __future__ import annotations

import cv2
import numpy as np

from exaonepath.synthetic.noise import Plate, nuclei, smooth_noise, white_noise

BACKGROUND = np.array([243.0, 242.0, 245.0], np.float32)
_HAEMATOXYLIN = np.array([0.86, 1.00, 0.42], np.float32)
_EOSIN = np.array([0.08, 0.62, 0.24], np.float32)
_MAP_PIXELS = 1400  # longest side of the map that holds the outlines
_GRAIN_SCALES = (1, 2, 8, 32, 128)


class Tissue:
    """The content of a synthetic slide.

    Args:
        width, height: level-0 size in pixels.
        fragments: number of separate pieces of tissue, laid out on a grid.
        holes: whether each piece has one or two holes in it.
        mpp: micrometres per pixel, which sets the size of nuclei and glands.
        seed: the same seed gives the same slide.
    """

    def __init__(self, width: int, height: int, fragments: int, holes: bool, mpp: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._map_scale = max(1.0, max(width, height) / _MAP_PIXELS)
        map_size = (int(np.ceil(width / self._map_scale)), int(np.ceil(height / self._map_scale)))
        self._outline_map = _outlines(rng, (width, height), map_size, self._map_scale, fragments, holes)
        self._outline = Plate(self._outline_map, self._map_scale, wrap=False)
        um = 1.0 / mpp
        cell = 9.0 * um
        # Regions of epithelium and stroma: one blotchy field over the whole slide plus a finer one.
        self._region = Plate(_blotches(rng, map_size), self._map_scale, wrap=False)
        self._glands = Plate(smooth_noise(rng, 512, 5.0), 10 * um)
        self._lumens = Plate(smooth_noise(rng, 512, 4.0), 6 * um)
        self._dense = Plate(nuclei(rng, 1024, cell, 1.35 * cell), 1.0)
        self._sparse = Plate(nuclei(rng, 1024, 0.75 * cell, 3.1 * cell), 1.0)
        fibres = smooth_noise(rng, 1024, (1.2 * um * 6, 1.2 * um)) + smooth_noise(rng, 1024, (2.2 * um, 2.2 * um * 4))
        self._fibres = Plate(fibres, 1.0)
        # Grain at every scale: real tissue is rough at every magnification, and segmentation detects roughness.
        self._grain = [Plate(white_noise(rng, 512), float(scale)) for scale in _GRAIN_SCALES]

    def coverage(self, box: tuple[float, float, float, float], margin: float) -> str:
        """ "empty", "full" or "edge" for a box (x0, y0, x1, y1) of level-0 pixels, with a safety margin in pixels."""
        scale = self._map_scale
        x0, y0 = (max(0, int((v - margin) / scale) - 2) for v in box[:2])
        x1, y1 = (max(1, int((v + margin) / scale) + 3) for v in box[2:])
        part = self._outline_map[
            min(y0, self._outline_map.shape[0] - 1) : y1, min(x0, self._outline_map.shape[1] - 1) : x1
        ]
        if part.max() < -margin:
            return "empty"
        return "full" if part.min() > margin else "edge"

    def look(self, box: tuple[float, float, float, float], variants: int) -> tuple[int, int]:
        """Key of a box inside the tissue: boxes with the same key look similar (epithelium or stroma, to a few per
        cent)."""
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        level = float(self._region.sample(middle, (1.0, 1.0), (1, 1))[0, 0])
        shade = int(np.clip(level * 12, -12, 20))
        place = int(box[0] * 7 + box[1] * 13) % 1_000_003
        return shade, place * 2_654_435_761 % (1 << 32) * (variants // 32) >> 32

    def render(self, origin: tuple[float, float], step: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """uint8 RGB [h, w, 3] of (w, h) pixels, each `step` level-0 pixels wide, from level-0 position `origin`."""
        grid = (origin, step, size)
        zoom = min(step)
        rough, grain = self._roughness(*grid)
        glands = self._glands.sample(*grid)
        outline = self._outline.sample(*grid) + (6.0 * rough + 14.0 * glands) * min(1.0, self._map_scale)
        body = np.clip(outline / max(3.0, zoom) + 0.5, 0, 1)
        if not body.any():
            return np.broadcast_to(np.round(BACKGROUND).astype(np.uint8), (*body.shape, 3))
        region = self._region.sample(*grid)
        epithelium = _step(region + 0.35 * glands, 0.15, 0.55)
        gap = _step(self._lumens.sample(*grid) + 0.5 * region, 1.75, 1.75 + max(0.15, zoom / 160))
        gap *= _step(outline, 60, 160)
        stroma = 1 - epithelium
        fibres = self._fibres.sample(*grid)
        haematoxylin = epithelium * (0.20 + 0.62 * self._dense.sample(*grid))
        haematoxylin += stroma * (0.05 + 0.62 * self._sparse.sample(*grid))
        eosin = 0.42 + 0.16 * stroma * (1 + 0.55 * fibres) - 0.10 * epithelium + 0.05 * glands
        body *= 1 - 0.97 * gap
        # The rim of a section stains a little darker, and thickness varies: both follow the outline and the grain.
        thickness = body * np.maximum(0.1, 1 + 0.11 * grain + 0.25 * np.exp(-np.maximum(outline, 0) / 90))
        h, e = haematoxylin * thickness, eosin * thickness
        density = h[..., None] * _HAEMATOXYLIN + e[..., None] * _EOSIN
        return np.clip(BACKGROUND * cv2.exp(-density) + 0.5, 0, 255).astype(np.uint8)

    def _roughness(
        self, origin: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(noise of 8 pixels and more, noise at every scale visible at this magnification), float32 [h, w] each."""
        rough = np.zeros((size[1], size[0]), np.float32)
        fine = np.zeros_like(rough)
        for plate in self._grain:
            if plate.scale >= min(step) / 2:
                target = rough if plate.scale >= 8 else fine
                target += plate.sample(origin, step, size)
        if min(step) < 2:
            # added twice, because JPEG removes half of the finest noise
            fine += self._grain[0].sample(origin, step, size)
        return rough, rough + fine


def _step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _blotches(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """float32 [h, w] smooth field, mean 0.25, with features at three sizes."""
    w, h = size
    field = np.zeros((h, w), np.float32)
    for cells, weight in ((5, 0.8), (14, 0.5), (45, 0.35)):
        nx, ny = max(2, round(cells * w / max(w, h))), max(2, round(cells * h / max(w, h)))
        noise = rng.standard_normal((ny, nx)).astype(np.float32)
        field += weight * cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)
    return field + 0.25


def _outlines(
    rng: np.random.Generator,
    slide: tuple[int, int],
    size: tuple[int, int],
    scale: float,
    fragments: int,
    holes: bool,
) -> np.ndarray:
    """float32 [h, w]: approximate signed distance, in level-0 pixels, to the tissue's edge; positive inside."""
    width, height = slide
    w, h = size
    x = ((np.arange(w, dtype=np.float32) + 0.5) * scale)[None, :]
    y = ((np.arange(h, dtype=np.float32) + 0.5) * scale)[:, None]
    field = np.full((h, w), -float(max(width, height)), np.float32)
    columns = max(1, min(fragments, round(np.sqrt(fragments * width / height))))
    rows = -(-fragments // columns) if fragments else 1
    for index in range(fragments):
        row = index // columns
        in_row = min(columns, fragments - row * columns)
        cell_w, cell_h = width / in_row, height / rows
        cx = (index % columns + 0.5 + rng.uniform(-0.03, 0.03)) * cell_w
        cy = (row + 0.5 + rng.uniform(-0.03, 0.03)) * cell_h
        rx, ry = 0.40 * cell_w * rng.uniform(0.85, 1.0), 0.40 * cell_h * rng.uniform(0.85, 1.0)
        body = _blob(rng, x, y, (cx, cy), (rx, ry), roughness=0.10)
        if holes:
            start = rng.uniform(0, 2 * np.pi)
            for k in range(int(rng.integers(1, 3))):
                angle = start + k * np.pi * rng.uniform(0.8, 1.2)
                centre = (cx + 0.42 * rx * np.cos(angle), cy + 0.42 * ry * np.sin(angle))
                radius = min(rx, ry) * rng.uniform(0.22, 0.31)
                hole = _blob(rng, x, y, centre, (radius * rng.uniform(1.0, 1.2), radius), roughness=0.10)
                body = np.minimum(body, -hole)
        field = np.maximum(field, body)
    return field


def _blob(
    rng: np.random.Generator,
    x: np.ndarray,
    y: np.ndarray,
    centre: tuple[float, float],
    radii: tuple[float, float],
    roughness: float,
) -> np.ndarray:
    angles = np.linspace(-np.pi, np.pi, 2048, dtype=np.float32)
    edge = np.ones_like(angles)
    for k in range(2, 14):
        amplitude, phase = rng.normal(0, roughness / k**0.75), rng.uniform(0, 2 * np.pi)
        edge += np.float32(amplitude) * np.cos(k * angles + np.float32(phase))
    # The outline is limited, so that it does not reach into the cell of the neighbouring fragment.
    edge = np.minimum(edge, 1.15)
    u, v = np.broadcast_arrays((x - centre[0]) / np.float32(radii[0]), (y - centre[1]) / np.float32(radii[1]))
    distance, angle = cv2.cartToPolar(np.ascontiguousarray(u), np.ascontiguousarray(v))
    revolutions = (angle * np.float32(0.5 / np.pi) + 0.5) % 1.0
    edge = edge[(revolutions * (len(angles) - 1)).astype(np.int32)]
    return ((edge - distance) * min(radii)).astype(np.float32)
