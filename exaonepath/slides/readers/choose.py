"""Chooses the reader of a slide file.

OpenSlide opens what it can. Of such files, the fast reader takes over where it gives the same bytes, and the TIFF
reader where OpenSlide would give wrong pixels (16 bits) or does not see the pyramid (OME-TIFF). Files that OpenSlide
does not open are TIFFs of other kinds, plain images, or of a format that a plug-in reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from exaonepath.errors import SlideOpenError
from exaonepath.slides import tiff
from exaonepath.slides.formats import CONVERT, needs_a_library, why_not_readable, wrong_pixels
from exaonepath.slides.readers.base import SlideReader
from exaonepath.slides.readers.fast import VENDORS, OnlyTiffReader, fast_reader
from exaonepath.slides.readers.openslide import OpenSlideReader, UnsupportedSlideError
from exaonepath.slides.readers.plain import PlainImageReader, is_plain_image
from exaonepath.slides.readers.plugins import GROUP, plugin_reader
from exaonepath.slides.readers.tiff import TiffReader, main_image

logger = logging.getLogger(__name__)

AUTO, OPENSLIDE, TIFF, IMAGE = "auto", "openslide", "tiff", "image"


def open_reader(path: Path, check_unchanged: Callable[[], None], reader: str = AUTO) -> SlideReader:
    """Open a slide file with the reader that is right for it.

    Args:
        path: the slide file.
        check_unchanged: called after a file was opened again; raises if it is another one now.
        reader: "auto", or the reader to use: "openslide", "tiff" (without a comparison with OpenSlide), "image", or the
            name of a plug-in.

    Raises:
        SlideOpenError: the file is missing, unreadable, truncated, has no level, or is not a slide of that reader.
        MemoryLimitError: the file is a plain image, or has tiles, that do not fit into the memory.
        SettingsError: there is no such reader.
    """
    _check_path(path)
    if reader == AUTO:
        found = _automatic(path, check_unchanged)
    elif reader == OPENSLIDE:
        found = OpenSlideReader(path, check_unchanged)
        wrong = wrong_pixels(path, found.properties)
        if wrong is not None:
            found.close()
            raise SlideOpenError(f"{path} {wrong}")
    elif reader == TIFF:
        found = _tiff(path, check_unchanged)
    elif reader == IMAGE:
        found = PlainImageReader(path)
    else:
        plugin = plugin_reader(path, reader)
        if plugin is None:
            raise SlideOpenError(f"{path} is not a slide that the reader {reader} reads")
        found = plugin
    if not found.level_dimensions or min(found.level_dimensions[0]) <= 0:
        found.close()
        raise SlideOpenError(f"{path} has no image level; it cannot be used as a slide")
    if path.is_file() and found.properties.get("openslide.vendor") == "generic-tiff":
        _warn_of_planes(path, found.level_dimensions[0])
    logger.info("%s: reader %s", path, found.name)
    return found


def _automatic(path: Path, check_unchanged: Callable[[], None]) -> SlideReader:
    try:
        slide = OpenSlideReader(path, check_unchanged)
    except UnsupportedSlideError as exc:
        return _without_openslide(path, exc)
    except SlideOpenError as exc:  # a format that OpenSlide knows, and a file that it rejects
        return _plugin_or_reason(path, exc)
    if wrong_pixels(path, slide.properties) is not None:
        slide.close()
        return _tiff_or_reason(path, slide)
    hidden = _what_openslide_does_not_see(slide)
    if hidden == "level 0":
        try:
            return TiffReader(path, slide.properties)
        finally:
            slide.close()
    fast = fast_reader(slide)
    if isinstance(fast, OnlyTiffReader):
        logger.warning("%s is read without OpenSlide: %s", path, fast)
        slide.close()
        return TiffReader(path, slide.properties)
    if isinstance(fast, str):
        logger.info("%s is read through OpenSlide: %s", path, fast)
        return slide
    if hidden is not None:
        # The comparison of level 0 holds for the TIFF reader too: it decodes the same tiles.
        fast.close()
        return TiffReader(path, slide.properties)
    return fast


def _tiff(path: Path, check_unchanged: Callable[[], None]) -> SlideReader:
    try:
        slide = OpenSlideReader(path, check_unchanged)
    except SlideOpenError:
        return TiffReader(path)
    if wrong_pixels(path, slide.properties) is None and _what_openslide_does_not_see(slide) is None:
        fast = fast_reader(slide, compare=False)
        if not isinstance(fast, str):
            return fast
    slide.close()
    return TiffReader(path, slide.properties)


def _tiff_or_reason(path: Path, slide: OpenSlideReader) -> TiffReader:
    vendor = slide.properties.get("openslide.vendor")
    if vendor not in VENDORS:  # the tiles of others are put together in ways of their own
        raise SlideOpenError(f"{path} {wrong_pixels(path, slide.properties)} (vendor {vendor})")
    try:
        return TiffReader(path, slide.properties)
    except SlideOpenError as exc:
        raise SlideOpenError(f"{path} {wrong_pixels(path, slide.properties)} (without OpenSlide: {exc})") from exc


def _what_openslide_does_not_see(slide: OpenSlideReader) -> str | None:
    """What only the TIFF reader finds in an OME-TIFF; None if there is nothing.

    "level 0": OpenSlide takes an overview for it. "levels": they lie in sub-directories, where OpenSlide does not look.
    """
    if slide.properties.get("openslide.vendor") != "generic-tiff":
        return None
    wanted = {tiff.WIDTH, tiff.LENGTH, tiff.SUBFILE_TYPE, tiff.DESCRIPTION, tiff.SUB_DIRECTORIES}
    found = tiff.read_tiff(slide.path, tags=wanted)
    if found is None or not found.images:
        return None
    if main_image(found):
        return "level 0"
    return "levels" if len(slide.level_dimensions) == 1 and found.children and found.children[0] else None


def _warn_of_planes(path: Path, size: tuple[int, int]) -> None:
    """Log a warning if a TIFF has several images of the size of level 0: channels of fluorescence, or focal planes."""
    found = tiff.read_tiff(path, tags={tiff.WIDTH, tiff.LENGTH})
    sizes = [(image.number(tiff.WIDTH, 0), image.number(tiff.LENGTH, 0)) for image in (found.images if found else [])]
    if sizes.count(size) > 1:
        logger.warning(
            "%s has %d images of %d x %d pixels (focal planes, channels or times); only the first is read",
            path, sizes.count(size), *size,
        )  # fmt: skip


def _without_openslide(path: Path, refused: SlideOpenError) -> SlideReader:
    """A reader for a file that OpenSlide does not open."""
    found = tiff.read_tiff(path, tags=tiff.ALL_TAGS) if path.is_file() else None
    if found is not None and found.images:
        try:
            return TiffReader(path)
        except SlideOpenError as exc:
            plugin = plugin_reader(path)
            if plugin is not None:
                return plugin
            if found.truncated:
                raise refused from exc
            raise SlideOpenError(f"{exc}; {CONVERT}") from exc
    if found is None and path.is_file() and is_plain_image(path):
        return PlainImageReader(path)
    return _plugin_or_reason(path, refused)


def _plugin_or_reason(path: Path, refused: SlideOpenError) -> SlideReader:
    """The reader of a plug-in; if there is none, the error of OpenSlide is raised, or one that says what to install."""
    plugin = plugin_reader(path)
    if plugin is not None:
        return plugin
    library = needs_a_library(path)
    if library is not None:
        raise SlideOpenError(
            f"{path} {library}, and no installed plug-in reads it (entry points in the group {GROUP}): install one, or "
            f"convert the file to a pyramidal TIFF. OpenSlide says: {refused}"
        ) from refused
    raise refused


def _check_path(path: Path) -> None:
    reason = why_not_readable(path)
    if reason is not None:
        raise SlideOpenError(f"{path} {reason}")
    if not path.exists():
        raise SlideOpenError(f"{path}: no such file")
    if not (path.is_file() or path.is_dir()):  # opening a pipe would block forever
        raise SlideOpenError(f"{path} is neither a file nor a folder; it cannot be a slide")
