"""Write a synthetic slide, tile by tile, as a tiled JPEG TIFF that OpenSlide can open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from exaonepath.errors import BackendError, MissingDependencyError, SettingsError
from exaonepath.files.atomic import atomic_path
from exaonepath.synthetic.tissue import BACKGROUND, Tissue

_SMALLEST_LEVEL = 512
_UNIQUE_TILES = 8000  # a level with more tiles repeats interior tiles, because drawing all would take minutes
_REPEATS = 96
_BIG_PIXELS = 1 << 31  # a classic TIFF is limited to 4 GiB; JPEG needs much less than 2 bytes per pixel


def make_slide(
    path: str | os.PathLike[str],
    width: int = 4000,
    height: int = 3000,
    *,
    fragments: int = 3,
    holes: bool = True,
    mpp: float | None = 0.5,
    levels: str | Sequence[float] = "pyramid",
    seed: int = 0,
    tile: int = 256,
    vendor: str = "aperio",
    quality: int = 85,
) -> Path:
    """Write a synthetic H&E-like slide; it needs tens of MB of memory for any size.

    Args:
        path: file to write (`.svs` or `.tif`), completely or not at all.
        width, height: level-0 size in pixels.
        fragments: number of separate pieces of tissue (0: an empty slide).
        holes: whether the pieces have holes.
        mpp: micrometres per pixel to state in the file; None states none (and no objective power).
        levels: "pyramid" (1, 4, 16, ... until the longest side is at most 512), "flat" (one level), or the downsample
            factors themselves, starting with 1; they need not be integers.
        seed: the same arguments give the same image.
        tile: tile side in pixels, a multiple of 16.
        vendor: "aperio" (SVS) or "generic" (generic tiled TIFF), as reported by OpenSlide.
        quality: JPEG quality, 1 to 100.

    Returns:
        The path.

    Raises:
        SettingsError: an argument cannot be used.
        OutputError: the file cannot be written.
        MissingDependencyError: tifffile (extra `synthetic`) is not installed.
    """
    factors = _factors(width, height, levels)
    _check(width, height, fragments, mpp, tile, vendor, quality)
    sizes = [(max(1, int(width / factor)), max(1, int(height / factor))) for factor in factors]
    tissue = Tissue(width, height, fragments, holes, mpp or 0.5, seed)
    tifffile = _tifffile()
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=width * height > _BIG_PIXELS) as writer:
        for index, size in enumerate(sizes):
            step = (width / size[0], height / size[1])
            writer.write(
                _tiles(tissue, size, step, tile, quality),
                shape=(size[1], size[0], 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                metadata=None,
                software=False,
                **_tags(vendor, (width, height), size, tile, mpp, index, quality),
            )
    return Path(path)


def _tifffile() -> ModuleType:
    try:
        import imagecodecs  # noqa: F401  tifffile needs it, also for tiles that are already JPEG
        import tifffile
    except ImportError as exc:
        raise MissingDependencyError(
            f"synthetic slides need tifffile ({exc}): pip install 'exaonepath[synthetic]'"
        ) from exc
    return tifffile


def _tiles(
    tissue: Tissue, size: tuple[int, int], step: tuple[float, float], tile: int, quality: int
) -> Iterator[bytes]:
    """JPEG tiles of one level, row by row. Tiles of background, and interior tiles of a huge level, are cached."""
    columns, rows = -(-size[0] // tile), -(-size[1] // tile)
    repeat = columns * rows > _UNIQUE_TILES
    empty = _encode(np.broadcast_to(np.round(BACKGROUND).astype(np.uint8), (tile, tile, 3)), quality)
    cache: dict[tuple[int, int], bytes] = {}
    for row in range(rows):
        for column in range(columns):
            x, y = column * tile * step[0], row * tile * step[1]
            box = (x, y, x + tile * step[0], y + tile * step[1])
            kind = tissue.coverage(box, margin=80.0 + 2 * max(step))
            if kind == "empty":
                yield empty
            elif kind == "full" and repeat:
                key = tissue.look(box, _REPEATS)
                if key not in cache:
                    cache[key] = _encode(tissue.render((x, y), step, (tile, tile)), quality)
                yield cache[key]
            else:
                yield _encode(tissue.render((x, y), step, (tile, tile)), quality)


def _encode(rgb: np.ndarray, quality: int) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), flags)
    if not ok:
        raise BackendError("OpenCV cannot encode JPEG; install a build of opencv-python-headless with JPEG support")
    return data.tobytes()


def _tags(
    vendor: str,
    slide: tuple[int, int],
    size: tuple[int, int],
    tile: int,
    mpp: float | None,
    index: int,
    quality: int,
) -> dict[str, Any]:
    """The tags in which OpenSlide finds vendor, level and resolution, as arguments of tifffile."""
    if vendor == "aperio":
        shape = f"{slide[0]}x{slide[1]}" + (f" -> {size[0]}x{size[1]}" if index else "")
        text = f"Aperio Image Library v12.0.0\n{shape} [0,0 {slide[0]}x{slide[1]}] ({tile}x{tile}) JPEG/RGB Q={quality}"
        if mpp is not None:
            text += f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
        return {"description": text}
    tags: dict[str, Any] = {"subfiletype": 1 if index else 0}
    if mpp is not None:
        tags["resolution"] = (1e4 * size[0] / (mpp * slide[0]), 1e4 * size[1] / (mpp * slide[1]))
        tags["resolutionunit"] = "CENTIMETER"
    return tags


def _factors(width: int, height: int, levels: str | Sequence[float]) -> list[float]:
    if isinstance(levels, str):
        if levels not in ("pyramid", "flat"):
            raise SettingsError(f'levels must be "pyramid", "flat" or a list of factors, not {levels!r}')
        factors = [1.0]
        while levels == "pyramid" and max(width, height) / factors[-1] > _SMALLEST_LEVEL:
            factors.append(factors[-1] * 4)
        return factors
    factors = [float(factor) for factor in levels]
    if not factors or factors[0] != 1 or any(b <= a for a, b in pairwise(factors)):
        raise SettingsError(f"level factors must begin with 1 and grow, not {list(levels)}")
    return factors


def _check(width: int, height: int, fragments: int, mpp: float | None, tile: int, vendor: str, quality: int) -> None:
    if width <= 0 or height <= 0:
        raise SettingsError(f"a slide of {width} x {height} pixels cannot be made; both sides must be positive")
    if fragments < 0:
        raise SettingsError(f"fragments must be 0 or more, not {fragments}")
    if mpp is not None and not 0 < mpp < 100:
        raise SettingsError(f"mpp must be a positive number of micrometres per pixel or None, not {mpp}")
    if tile <= 0 or tile % 16:
        raise SettingsError(f"tile must be a positive multiple of 16, not {tile}")
    if vendor not in ("aperio", "generic"):
        raise SettingsError(f'vendor must be "aperio" or "generic", not {vendor!r}')
    if not 1 <= quality <= 100:
        raise SettingsError(f"quality must be 1 to 100, not {quality}")
