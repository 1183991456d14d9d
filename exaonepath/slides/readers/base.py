"""The interface of a reader: what `SlideImage` needs to know about a slide file, and how it gets its pixels.

A reader is opened for one slide file and used by many threads at the same time. Locations, levels and sizes have
OpenSlide's meaning. A reader outside this package derives from `SlideReader` too (see docs/slides.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from exaonepath.errors import SlideReadError

DEFAULT_CACHE = 32 << 20  # OpenSlide's own default, in bytes

# OpenSlide's names of the formats whose scanners do not store tiles without tissue (Leica .scn, Zeiss .czi, ...).
_SPARSE_FORMATS = {"mirax", "dicom", "philips", "ventana", "leica", "zeiss"}


class SlideReader(ABC):
    """Access to one slide file. All methods may be called by several threads at the same time.

    Attributes:
        name: the reader's name, which is stored with the results.
        path: the slide file.
        properties: what the file states about itself, under the names that OpenSlide gives it. The pixel size is taken
            from these (`openslide.mpp-x`, ...), and the size of tiles (`openslide.level[0].tile-width`, ...).
        level_dimensions: (width, height) of each level in pixels, largest first.
        scalar_downsamples: the factor by which a level-0 location is divided to find the pixel of a level.
        as_openslide: whether levels and pixels are those of OpenSlide: it reads them, or a comparison showed it.
            Results of such readers stand for each other.
    """

    name: str
    as_openslide: bool = False
    path: Path
    properties: dict[str, str]
    level_dimensions: tuple[tuple[int, int], ...]
    scalar_downsamples: tuple[float, ...]
    cache_bytes: int = DEFAULT_CACHE

    @abstractmethod
    def read_image(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Pixels of one region.

        Args:
            location: (x, y) of the top left corner at level 0, in pixels; may lie outside the slide.
            level: pyramid level to read.
            size: (width, height) at that level, in pixels.

        Returns:
            An RGBA image; pixels outside the slide, or without data, are (0, 0, 0, 0).

        Raises:
            SlideReadError: the region cannot be read.
        """

    def read_rgb(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
        """Pixels of one region as RGB, and the fraction of its pixels inside the slide that have no data.

        Args:
            location, level, size: as for `read_image`.

        Returns:
            uint8 [height, width, 3], black outside the slide and where there is no data; and the fraction, 0 to 1.

        Raises:
            SlideReadError: the region cannot be read.
        """
        image = self.read_image(location, level, size)
        return np.asarray(image.convert("RGB")), self.missing_share(image, location, level)

    def missing_share(self, image: Image.Image, location: tuple[int, int], level: int = 0) -> float:
        """Fraction of the pixels of an RGBA region inside the slide that have no data; always 0 in sparse formats."""
        if leaves_out_background(self.properties):
            return 0.0
        alpha = np.asarray(image.getchannel("A"))
        if not alpha.size or alpha.min() > 0:
            return 0.0
        (x, y), (width, height) = self.at_level(location, level), self.level_dimensions[level]
        left, top = max(0, -x), max(0, -y)
        inside = alpha[top : max(top, height - y), left : max(left, width - x)]
        return float(np.count_nonzero(inside == 0)) / inside.size if inside.size else 0.0

    def at_level(self, location: tuple[int, int], level: int) -> tuple[int, int]:
        """The first pixel of a level that begins at or after a level-0 location, per axis.

        This undoes the rounding of a caller that asks for pixel x of a level at `int(x * downsample)`.
        """
        scale = self.scalar_downsamples[level]
        if scale == 1:
            return location
        x, y = (int(value // scale) for value in location)
        return x + (int(x * scale) < location[0]), y + (int(y * scale) < location[1])

    def best_level(self, downsample: float) -> int:
        """The coarsest level that is not coarser than a downsample factor."""
        fitting = [level for level, scale in enumerate(self.scalar_downsamples) if scale <= downsample]
        return fitting[-1] if fitting else 0

    def tile_size(self, level: int) -> tuple[int, int] | None:
        """(width, height) of the tiles of a level in pixels; None if the level is not stored in tiles."""
        sides = [self.properties.get(f"openslide.level[{level}].tile-{side}", "") for side in ("width", "height")]
        return (int(sides[0]), int(sides[1])) if all(side.isdecimal() for side in sides) else None

    def encoded_tile(self, level: int, column: int, row: int) -> bytes | None:
        """The stored bytes of a tile, empty if it has no data; None if this reader does not give access to them.

        Raises:
            SlideReadError: the level has no such tile, or its bytes cannot be read.
        """
        return None

    def set_cache_bytes(self, capacity: int) -> None:
        """Keep up to `capacity` bytes of decoded tiles."""
        self.cache_bytes = capacity

    @contextmanager
    def tile_cache(self, capacity: int) -> Iterator[None]:
        """Apply `set_cache_bytes` for the duration of a `with` block."""
        before = self.cache_bytes
        self.set_cache_bytes(capacity)
        try:
            yield
        finally:
            self.set_cache_bytes(before)

    @abstractmethod
    def close(self) -> None:
        """Close the file as soon as no other thread reads it. A later read raises `SlideReadError`."""

    def _closed_error(self) -> SlideReadError:
        return SlideReadError(f"{self.path} was closed")


def leaves_out_background(properties: Mapping[str, str]) -> bool:
    """Whether tiles without data are normal in the slide's format; in all other formats they are a fault."""
    return properties.get("openslide.vendor") in _SPARSE_FORMATS
