"""A slide file that is open for reading, with the properties that the rest of the package needs."""

from __future__ import annotations

import hashlib
import logging
import operator
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from exaonepath.errors import MemoryLimitError, SettingsError, SlideChangedError, SlideOpenError, SlideReadError
from exaonepath.memory import available_host_memory
from exaonepath.slides.companions import companion_files
from exaonepath.slides.dicom import dicom_slide_in, lacks_full_resolution
from exaonepath.slides.readers.base import leaves_out_background as leaves_out_background
from exaonepath.slides.readers.choose import open_reader
from exaonepath.slides.scale import GIVEN, check_given, slide_pixel_size

logger = logging.getLogger(__name__)

_BLOCK = 1024  # side of the blocks that a thumbnail is read in, in pixels
_SAMPLE_BLOCKS, _SAMPLE_BYTES = 64, 1 << 16
_COMPANION_SAMPLE_BYTES = 1 << 14
_UNREADABLE = 200  # grey of blocks of a thumbnail that cannot be read
_FARTHEST = 1 << 62  # readers compute with 64 bits
_LARGE_REGION = 1 << 30  # bytes of a region from which on the memory is looked at

FileIdentity = tuple[int, int, int, int]  # device, inode, size, modification time in nanoseconds


class SlideImage:
    """An opened whole-slide image. Safe to share between threads; usable as a context manager.

    Attributes:
        path: the slide file.
        name: the id used in every output file name: the given one, or that of the file (see `slide_id`).
        stored_path: the absolute path that is stored with results: that of `original`, if it was given.
        level_dimensions: (width, height) of each level, in pixels.
        level_downsamples: (W0 / Wl, H0 / Hl) of each level: the exact pair, not OpenSlide's rounded scalar.
        scalar_downsamples: OpenSlide's own factor of each level, by which OpenSlide divides the locations of a read.
        mpp: micrometres per pixel at level 0.
        mpp_y: the same for the vertical axis; only a warning depends on it.
        mpp_source: the property that `mpp` was read from, "given" or "assumed".
        reader: name of the reader in use: "openslide", "tiff", "image", or that of a plug-in.
        scale_doubts: the reasons to doubt `mpp`, a phrase each; each was logged as a warning.

    Args:
        path: the slide file; or a folder that holds the DICOM files of one slide.
        reader: "auto": whatever reads the file best (see docs/slides.md); or the reader to use.
        mpp: micrometres per pixel at level 0, if the file does not state it or states a wrong one; None: as the file
            states.
        name: the id of the slide, if it is not to be that of the file.
        original: the slide file that this one is a temporary copy of.

    Raises:
        SlideOpenError: the file is missing, unreadable, truncated, has no level, or is not a slide.
        MemoryLimitError: the file has to be decoded whole (a plain image), and does not fit into the memory.
        SettingsError: there is no such reader, `mpp` is not a positive number, or `name` cannot be a file name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reader: str = "auto",
        mpp: float | None = None,
        name: str | None = None,
        original: str | os.PathLike[str] | None = None,
    ) -> None:
        check_given(mpp)  # before anything is opened
        if name is not None and (not name or name in (".", "..") or set(name) & set("/\\\0")):
            raise SettingsError(f"the id of a slide is a part of file names and cannot be {name!r}")
        self.path = dicom_slide_in(Path(path)) or Path(path)
        self._wanted_reader = reader
        self._given_mpp = mpp
        self._original = None if original is None else Path(original)
        self.name = slide_id(self._original or self.path) if name is None else name
        self.stored_path = str((self._original or self.path).resolve())
        self._companions = companion_files(self.path)
        self._identity = self._current_identity()
        self._reader = open_reader(self.path, self.check_unchanged, reader)
        self.reader = self._reader.name
        self.properties = self._reader.properties
        self.level_dimensions = self._reader.level_dimensions
        w0, h0 = self.level_dimensions[0]
        self.level_downsamples = tuple((w0 / w, h0 / h) for w, h in self.level_dimensions)
        self.scalar_downsamples = self._reader.scalar_downsamples
        scale = slide_pixel_size(self.properties, mpp)
        self.mpp, self.mpp_y, self.mpp_source, self.scale_doubts = scale.x, scale.y, scale.source, scale.doubts
        stated = f"; the file states {scale.overridden}" if scale.overridden else ""
        logger.info("%s: pixels of %g x %g um (%s)%s", self.path, self.mpp, self.mpp_y, self.mpp_source, stated)
        for doubt in self.scale_doubts:
            logger.warning("%s %s", self.path, doubt)
        if lacks_full_resolution(self.properties):
            logger.warning(
                "%s: the largest level is marked as resampled (ImageType); the file of full resolution seems to be "
                "missing from its folder",
                self.path,
            )
        self._fingerprint: str | None = None
        self.check_unchanged()

    def reader_settings(self) -> dict[str, str]:
        """What the reader adds to the settings of a result: nothing if its pixels are those of OpenSlide."""
        return {} if self._reader.as_openslide else {"reader": self.reader}

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of level 0 in pixels."""
        return self.level_dimensions[0]

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """The level that OpenSlide chooses for a downsample factor."""
        return self._reader.best_level(downsample)

    @property
    def cache_bytes(self) -> int:
        """Bytes of decoded tiles that are kept at most."""
        return self._reader.cache_bytes

    def set_cache_bytes(self, capacity: int) -> None:
        """Keep up to `capacity` bytes of decoded tiles (default: 32 MiB)."""
        self._reader.set_cache_bytes(capacity)

    def tile_cache(self, capacity: int) -> AbstractContextManager[None]:
        """Apply `set_cache_bytes` for the duration of a `with` block; the previous cache is restored afterwards."""
        return self._reader.tile_cache(capacity)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        """Pixels of one region as RGBA.

        Args:
            location: (x, y) of the top left corner at level 0, in pixels; may lie outside the slide.
            level: pyramid level to read.
            size: (width, height) at that level, in pixels.

        Returns:
            uint8 [height, width, 4]; areas outside the slide are (0, 0, 0, 0).

        Raises:
            SlideReadError: the region cannot be read, not even through a new handle.
            SettingsError: there is no such level, a number is not whole, or a size is negative.
            MemoryLimitError: the region does not fit into the memory.
        """
        return np.asarray(self.read_image(location, level, size))

    def read_strips(
        self, location: tuple[int, int], level: int, size: tuple[int, int], rows: int
    ) -> Iterator[np.ndarray]:
        """The region that `read_region` returns, read in one call and yielded as strips of at most `rows` rows.

        Use it for large regions: the conversion of an image to an array makes a copy, here of one strip at a time.
        """
        image = self.read_image(location, level, size)
        for top in range(0, image.height, rows):
            yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))

    def read_image(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """`read_region` as a Pillow image (RGBA); saves two copies of the pixels if the caller works with Pillow."""
        return self._reader.read_image(*self._checked(location, level, size))

    def read_rgb(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
        """Pixels of one region as RGB, by the fastest way, and how much of it has no data.

        Args:
            location, level, size: as for `read_region`.

        Returns:
            uint8 [height, width, 3], byte for byte the first three channels of `read_region`; and the fraction of the
            pixels inside the slide that have no data (they are black).

        Raises:
            SlideReadError, SettingsError, MemoryLimitError: as of `read_region`.
        """
        return self._reader.read_rgb(*self._checked(location, level, size))

    def encoded_tile(self, level: int, column: int, row: int) -> bytes | None:
        """The stored bytes of a tile, empty if it has no data; None if the reader does not give access to them.

        Raises:
            SlideReadError: the level has no such tile, or its bytes cannot be read.
            SettingsError: there is no such level.
        """
        return self._reader.encoded_tile(self._checked_level(level), column, row)

    def missing_share(self, image: Image.Image, location: tuple[int, int]) -> float:
        """Fraction of the pixels of a level-0 region inside the slide that have no data; they are read as black.

        Tiles of zero length are a fault in most formats. In formats that do not store empty glass they are background.

        Args:
            image: the image that `read_image` returned, RGBA.
            location: (x, y) of its top left corner.
        """
        return self._reader.missing_share(image, location)

    def thumbnail(self, longest_side: int, *, unreadable: list[SlideReadError] | None = None) -> np.ndarray:
        """The whole slide as RGB uint8 [h, w, 3], at most `longest_side` pixels long; transparent pixels become white.

        The slide is read in blocks: memory does not grow with the slide, even if its only level is the full image.

        Args:
            longest_side: in pixels.
            unreadable: filled with the errors of blocks that cannot be read, which become grey; None: such an error is
                raised.

        Raises:
            SlideReadError: a region cannot be read.
        """
        full = max(self.dimensions)
        shrink = max(1.0, full / max(1, longest_side))
        # Level factors are rarely exact integers. A level slightly smaller than requested is accepted, because the next
        # larger one would have 16 times as many pixels.
        level = self.get_best_level_for_downsample(1.01 * shrink)
        (w, h), scale = self.level_dimensions[level], self.scalar_downsamples[level]
        width, height = (max(1, round(side / shrink)) for side in self.dimensions)
        width, height = min(width, w), min(height, h)
        picture = np.empty((height, width, 3), np.uint8)
        step_x, step_y = (max(1, int(_BLOCK * small / side)) for small, side in ((width, w), (height, h)))
        for y in range(0, height, step_y):
            y1 = min(y + step_y, height)
            top, bottom = y * h // height, -(-y1 * h // height)
            for x in range(0, width, step_x):
                x1 = min(x + step_x, width)
                left, right = x * w // width, -(-x1 * w // width)
                try:
                    block = self.read_region((int(left * scale), int(top * scale)), level, (right - left, bottom - top))
                except SlideReadError as exc:
                    if unreadable is None:
                        raise
                    unreadable.append(exc)
                    picture[y:y1, x:x1] = _UNREADABLE
                    continue
                picture[y:y1, x:x1] = cv2.resize(_on_white(block), (x1 - x, y1 - y), interpolation=cv2.INTER_AREA)
        return picture

    @property
    def mtime_ns(self) -> int | None:
        """Latest modification time of the slide's files, in nanoseconds, as it was when the slide was opened."""
        times = [identity[3] for identity in self._identity if identity is not None]
        return max(times) if times else None

    def fingerprint(self) -> str:
        """Hash that identifies the slide's content: file size, 64 blocks spread over the file, OpenSlide's quickhash.

        At most 4 MiB are read, so the cost does not depend on the file size. Copying and renaming do not change the
        fingerprint. For a slide of several files (DICOM, MIRAX, VMS), the names, the sizes and a few blocks of the
        other files are included.

        Raises:
            SlideOpenError: the file no longer exists or cannot be read.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            try:
                size = self.path.stat().st_size
                digest.update(f"{size}:{self.properties.get('openslide.quickhash-1', '')}".encode())
                with self.path.open("rb") as file:
                    for i in range(_SAMPLE_BLOCKS):
                        file.seek((size - 1) * i // _SAMPLE_BLOCKS)
                        digest.update(file.read(_SAMPLE_BYTES))
                blocks = max(2, _SAMPLE_BLOCKS // max(1, len(self._companions)))
                for path in self._companions:
                    _sample(path, blocks, digest)
            except OSError as exc:
                raise SlideOpenError(f"{self.path} cannot be read any more: {exc}") from exc
            self.check_unchanged()
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def check_unchanged(self) -> None:
        """Check that the slide's files are the ones that were opened, and that they are unchanged.

        If a file were replaced during a run, the rows would come from two files, and no other check would detect it.

        Raises:
            SlideChangedError: a path names another file, or the file was modified.
            SlideOpenError: a file no longer exists.
        """
        now = self._current_identity()
        if now == self._identity and None not in now:
            return
        for path, identity in zip((self.path, *self._companions), now, strict=True):
            if identity is None:
                raise SlideOpenError(f"{path} cannot be read any more: it is gone")
        changed = self.path
        if len(now) == len(self._identity):
            changed = next(
                path
                for path, new, old in zip((self.path, *self._companions), now, self._identity, strict=True)
                if new != old
            )
        about = f"{changed}, of which {self.path} is a part," if changed != self.path else f"{self.path}"
        raise SlideChangedError(
            f"{about} was replaced or changed while it was read; what was read since is not used: run again"
        )

    def _checked(
        self, location: tuple[int, int], level: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], int, tuple[int, int]]:
        """The region as plain integers: what readers do with anything else differs."""
        x, y = _whole("location", location)
        width, height = _whole("size", size)
        number = self._checked_level(level)
        if width < 0 or height < 0:
            raise SettingsError(f"size must not be negative, not {size!r}")
        if max(abs(x), abs(y)) >= _FARTHEST:
            raise SettingsError(f"location {location!r} is outside what can be addressed")
        needed = 4 * width * height
        if needed > _LARGE_REGION:
            free = available_host_memory()
            if max(width, height) >= _FARTHEST or (free is not None and needed > free):
                left = "" if free is None else f", and {free / 1e9:.1f} GB are free"
                raise MemoryLimitError(
                    f"{self.path}: a region of {width} x {height} pixels takes {needed / 1e9:.1f} GB{left}"
                )
        return (x, y), number, (width, height)

    def _checked_level(self, level: int) -> int:
        try:
            number = operator.index(level)
        except TypeError:
            raise SettingsError(f"level must be a whole number, not {level!r}") from None
        count = len(self.level_dimensions)
        if not 0 <= number < count:
            raise SettingsError(f"{self.path} has no level {number} ({count} level{'s' if count > 1 else ''})")
        return number

    def _current_identity(self) -> tuple[FileIdentity | None, ...]:
        return tuple(_identity(path) for path in (self.path, *self._companions))

    def __reduce__(self) -> tuple[object, ...]:
        # Only the path is sent to another process or a copy: handles and locks belong to one process.
        given = self.path, self._wanted_reader, self._given_mpp, self.name, self._original
        return _reopened, (*given, self._identity)

    def close(self) -> None:
        """Close the file as soon as no other thread reads it. A later read raises `SlideReadError`."""
        self._reader.close()

    def __enter__(self) -> SlideImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        w, h = self.dimensions
        return f"SlideImage({str(self.path)!r}, {w} x {h}, {len(self.level_dimensions)} levels, mpp={self.mpp:g})"


@contextmanager
def opened(
    slide: str | os.PathLike[str] | SlideImage,
    reader: str = "auto",
    mpp: float | None = None,
    name: str | None = None,
) -> Iterator[SlideImage]:
    """The slide itself if it is open already (it stays open), otherwise the file, opened for the `with` block."""
    if isinstance(slide, SlideImage):
        if mpp is not None and (mpp != slide.mpp or slide.mpp_source != GIVEN):
            raise SettingsError(
                f"{slide.path} is already open with pixels of {slide.mpp:g} um ({slide.mpp_source}); open it with "
                f"SlideImage(path, mpp={mpp!r})"
            )
        if name not in (None, slide.name):
            raise SettingsError(
                f"{slide.path} is already open as {slide.name!r}; open it with SlideImage(path, name={name!r})"
            )
        yield slide
        return
    if not isinstance(slide, str | os.PathLike):
        raise SettingsError(f"a slide is given by its path or as a SlideImage, not as {type(slide).__name__}")
    with SlideImage(slide, reader, mpp, name) as image:
        yield image


def slide_id(path: Path) -> str:
    """The id of a slide: its file stem, or the whole name if the part after the last dot is a number.

    DICOM files are often named by a UID (1.2.840.1, 1.2.840.2), and many of them share a stem.
    """
    return path.name if path.suffix[1:].isdecimal() else path.stem


def _whole(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    try:
        first, second = pair
        return operator.index(first), operator.index(second)
    except (TypeError, ValueError):
        raise SettingsError(f"{name} must be two whole numbers, not {pair!r}") from None


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """RGB [h, w, 3]: RGBA pixels [h, w, 4] drawn on a white background."""
    alpha = pixels[..., 3:]
    if alpha.min() == 255:
        return pixels[..., :3]
    weight = alpha.astype(np.uint16)
    return ((pixels[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _sample(path: Path, blocks: int, digest: hashlib._Hash) -> None:
    """Add the name, the size and some blocks of a file to a hash."""
    size = path.stat().st_size
    digest.update(f"\0{path.name}:{size}".encode("utf-8", "surrogateescape"))
    with path.open("rb") as file:
        for i in range(blocks):
            file.seek(max(0, size - 1) * i // blocks)
            digest.update(file.read(_COMPANION_SAMPLE_BYTES))


def _identity(path: Path) -> FileIdentity | None:
    """Device, inode, size and modification time; None if the file does not exist (opening it raises the error)."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reopened(
    path: Path,
    reader: str,
    mpp: float | None,
    name: str,
    original: Path | None,
    identity: tuple[FileIdentity | None, ...],
) -> SlideImage:
    slide = SlideImage(path, reader, mpp, name, original)
    slide._identity = identity
    slide.check_unchanged()
    return slide
