"""Finds slide files: files and folders of a command line become slides, and what is skipped is reported."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from exaonepath.errors import OutputCollisionError, SlideOpenError
from exaonepath.slides.dicom import is_dicom, series_identity
from exaonepath.slides.image import slide_id

logger = logging.getLogger(__name__)

SLIDE_SUFFIXES = frozenset(
    {
        ".svs",
        ".tif",
        ".tiff",
        ".btf",
        ".tf2",
        ".tf8",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".bif",
        ".vms",
        ".vmu",
        ".svslide",
        ".dcm",
        ".czi",
    }
)
_OTHER_FORMATS = frozenset({".qptiff", ".vsi", ".isyntax", ".lif", ".nd2", ".oir", ".zvi", ".afi", ".ndpis", ".jp2"})
_UNFINISHED = frozenset({".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download", ".aria2"})
_PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip"})
_MAX_ENTRIES = 20_000  # entries of a folder tree that are searched at most


def find_slides(paths: Iterable[str | os.PathLike[str]], problems: list[SlideOpenError] | None = None) -> list[Path]:
    """Slide files for the paths of a command line; a folder is replaced by the slides directly in it, in name order.

    Slides are recognised by their suffixes; DICOM files with no suffix, ".dicom" or a number, by their content.

    Args:
        paths: files and folders.
        problems: if given, the error for a missing path, a broken link or an empty folder is appended, not raised.

    Raises:
        SlideOpenError: a path does not exist, or a folder contains no slide.
        OutputCollisionError: two slides would write the same files.
    """
    slides: list[Path] = []
    problems_here: list[SlideOpenError] = [] if problems is None else problems
    for path in map(Path, paths):
        try:
            exists, folder = path.exists(), path.is_dir()
        except PermissionError:
            problems_here.append(SlideOpenError(f"{path} may not be read (permission denied)"))
            continue
        if folder:
            slides += _slides_in(path, problems_here)
        elif exists:
            slides.append(path)
        else:
            problems_here.append(SlideOpenError(f"{path}: no such file"))
    if problems is None and problems_here:
        raise problems_here[0]
    slides = _one_per_series(slides)
    by_stem: dict[str, Path] = {}
    for slide in slides:
        first = by_stem.setdefault(slide_id(slide), slide)
        if first is not slide and first.resolve() != slide.resolve():
            raise OutputCollisionError(
                f"{first} and {slide} have one stem and would write the same files; rename one, or encode "
                "them into different output folders"
            )
    for stem, slide in by_stem.items():
        other = by_stem.get(f"{stem}_features")
        if other is not None:
            raise OutputCollisionError(
                f"the features of {slide} and the patches of {other} would be one file; rename one, or encode "
                "them into different output folders"
            )
    return list(by_stem.values())


def _slides_in(folder: Path, problems: list[SlideOpenError]) -> list[Path]:
    """Slide files directly in a folder, in name order; a skipped file is logged or appended to `problems`."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as exc:
        problems.append(SlideOpenError(f"{folder} cannot be listed: {exc.strerror}"))
        return []
    slides: list[Path] = []
    broken: list[Path] = []
    similar: dict[str, list[Path]] = {}
    for entry in entries:
        if entry.is_dir():
            continue
        if not _looks_like_a_slide(entry):
            kind = _kind_of_similar_name(entry)
            if kind is not None:
                similar.setdefault(kind, []).append(entry)
        elif entry.name.startswith("."):
            # macOS adds "._slide.svs" on a foreign disk; it contains attributes of the file and is not a slide.
            logger.warning("%s is a hidden file and is skipped", entry)
        elif entry.is_symlink() and not entry.exists():
            broken.append(entry)
        else:
            slides.append(entry)
    problems += [SlideOpenError(f"{path} is a link to a file that does not exist") for path in broken]
    for kind, files in sorted(similar.items()):
        logger.warning("%s has %d %s, such as %s, which are skipped", folder, len(files), kind, files[0])
    deeper, more = _deeper_slides(folder)
    if deeper:
        logger.warning(
            "%s has folders with %d more slide files%s, such as %s, which are skipped: name those folders as well",
            folder,
            len(deeper),
            " or more" if more else "",
            deeper[0],
        )
    if not slides and not broken:
        problems.append(SlideOpenError(f"{folder} holds no slide file ({', '.join(sorted(SLIDE_SUFFIXES))})"))
    return slides


def _deeper_slides(folder: Path) -> tuple[list[Path], bool]:
    """Slide files in the subfolders of a folder, at any depth, without hidden ones; and whether the search was cut off.

    Links to folders are not followed, and the time is bounded for a tree of any size.
    """
    found: list[Path] = []
    entries = 0
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        entries += len(files) + len(folders)
        if Path(where) != folder:
            paths = (Path(where, name) for name in sorted(files) if not name.startswith("."))
            found += [path for path in paths if _looks_like_a_slide(path)]
        if entries > _MAX_ENTRIES:
            return found, True
    return found, False


def _looks_like_a_slide(path: Path) -> bool:
    """Whether the name is that of a slide; if the name does not show it (often so for DICOM), the content decides."""
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return not path.is_dir()
    return (suffix in ("", ".dicom") or suffix[1:].isdecimal()) and is_dicom(path, whole_slide=True)


def _kind_of_similar_name(path: Path) -> str | None:
    """The kind of a file that a user may take for a slide but that is not searched for; None for other files."""
    suffix, before = path.suffix.lower(), Path(path.stem).suffix.lower()
    if path.name.startswith("."):
        return None
    if suffix in _OTHER_FORMATS:
        return f"{suffix} files (not known as slides; name one to try it)"
    if suffix in _UNFINISHED and before in SLIDE_SUFFIXES:
        return f"{before}{suffix} files (unfinished copies, by their name)"
    if suffix in _PACKED and before in SLIDE_SUFFIXES:
        return f"{before}{suffix} files (compressed; unpack them first)"
    return None


def _one_per_series(slides: list[Path]) -> list[Path]:
    """One file of each DICOM series: the largest, which contains level 0. OpenSlide finds the others from it."""
    series: dict[tuple[Path, str], list[Path]] = {}
    keys: dict[Path, tuple[Path, str]] = {}
    for slide in slides:
        uid = series_identity(slide)
        if uid is not None:
            keys[slide] = (slide.parent.resolve(), uid)
            series.setdefault(keys[slide], []).append(slide)
    chosen = {key: max(sorted(files), key=lambda f: f.stat().st_size) for key, files in series.items()}
    for key, files in series.items():
        if len(files) > 1:
            logger.info("%s stands for a DICOM series of %d files", chosen[key], len(files))
    return [slide for slide in slides if slide not in keys or chosen[keys[slide]] == slide]
