"""Finds slide files: files and folders of a command line become slides, and what is skipped is reported."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from exaonepath.errors import IdCollisionError, SlideOpenError
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
_HIDDEN_ONE_BY_ONE = 3  # hidden files that are named in a warning each; more of them are counted
_MAX_ENTRIES = 20_000  # entries of a folder tree that are searched at most


class Skipped(NamedTuple):
    """A file that was found and is not used, and why."""

    path: Path
    reason: str


def find_slides(
    paths: Iterable[str | os.PathLike[str]],
    problems: list[SlideOpenError] | None = None,
    *,
    recursive: bool = False,
    skipped: list[Skipped] | None = None,
) -> list[Path]:
    """Slide files for the paths of a command line; a folder is replaced by the slides directly in it, in name order.

    Slides are recognised by their suffixes; DICOM files with no suffix, ".dicom" or a number, by their content.

    Args:
        paths: files, folders, and patterns with `*`, `?`, `[...]` or `**` (the shell replaces patterns that are not
            quoted).
        problems: if given, the error for a missing path, a broken link or an empty folder is appended, not raised.
        recursive: also take the slides in the folders of a folder, at any depth.
        skipped: if given, the files that were not used are appended. They are logged in any case.

    Raises:
        SlideOpenError: a path does not exist, or a folder contains no slide.
        IdCollisionError: slides would write the same files.
    """
    problems_here: list[SlideOpenError] = [] if problems is None else problems
    search = _Search(recursive, problems_here, [] if skipped is None else skipped)
    for path in map(Path, paths):
        search.add(path)
    if problems is None and problems_here:
        raise problems_here[0]
    unique: dict[tuple[str, Path], Path] = {}
    for slide in _one_per_series(search.slides):
        unique.setdefault((slide_id(slide), slide.resolve()), slide)
    slides = list(unique.values())
    collisions = _collisions(slides)
    if collisions:
        raise IdCollisionError(
            "slides would write the same files, since the id of a slide is its file stem; rename files, use different "
            "output folders, or give ids in a manifest (--manifest FILE, with the columns slide and id):",
            collisions,
        )
    return slides


def _collisions(slides: Iterable[Path]) -> list[str]:
    """A line for every group of slides whose files would have the same names."""
    by_id: dict[str, list[Path]] = {}
    for slide in slides:
        by_id.setdefault(slide_id(slide), []).append(slide)
    found = [
        f"{' and '.join(map(str, slides))} have one stem, {name}, and would write the same files"
        for name, slides in by_id.items()
        if len(slides) > 1
    ]
    return found + [
        f"the features of {slides[0]} and the patches of {by_id[f'{name}_features'][0]} would be one file"
        for name, slides in by_id.items()
        if f"{name}_features" in by_id
    ]


class _Search:
    """Collects the slides of several paths."""

    def __init__(self, recursive: bool, problems: list[SlideOpenError], skipped: list[Skipped]) -> None:
        self._recursive, self._problems, self._skipped = recursive, problems, skipped
        self.slides: list[Path] = []

    def add(self, path: Path) -> None:
        """Add a file, the slides of a folder, or what a pattern matches."""
        try:
            exists, folder = path.exists(), path.is_dir()
        except PermissionError:
            self._problems.append(SlideOpenError(f"{path} may not be read (permission denied)"))
            return
        if folder:
            self._add_folder(path)
        elif exists:
            self.slides.append(path)
        elif glob.has_magic(str(path)):
            self._add_matches(path)
        else:
            self._problems.append(SlideOpenError(f"{path}: no such file"))

    def _add_matches(self, pattern: Path) -> None:
        names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
        matches = [Path(name) for name in sorted(names)]
        files = [match for match in matches if not match.is_dir()]
        # With "**" a folder is matched as well as the files in it, which have been matched by themselves.
        folders = [] if "**" in pattern.parts else [match for match in matches if match.is_dir()]
        before = len(self.slides)
        self._sort_out(pattern, files)
        for folder in folders:
            self._add_folder(folder, may_be_empty=True)
        if len(self.slides) == before:
            what = f"matches {len(matches)} paths, and no slide file" if matches else "no such file, and no match"
            self._problems.append(SlideOpenError(f"{pattern}: {what}"))

    def _add_folder(self, folder: Path, *, may_be_empty: bool = False) -> None:
        try:
            entries = _below(folder, self._skipped) if self._recursive else _directly_in(folder)
        except OSError as exc:
            self._problems.append(SlideOpenError(f"{folder} cannot be listed: {exc.strerror}"))
            return
        before, problems = len(self.slides), len(self._problems)
        self._sort_out(folder, entries)
        deeper, more = ([], False) if self._recursive else _deeper_slides(folder)
        if deeper:
            logger.warning(
                "%s has folders with %d more slide files%s, such as %s, which are skipped: take them as well with "
                "--recursive, or name those folders",
                folder,
                len(deeper),
                " or more" if more else "",
                deeper[0],
            )
            self._skipped += [Skipped(path, "in a deeper folder (--recursive takes it)") for path in deeper]
        if not may_be_empty and len(self.slides) == before and len(self._problems) == problems:
            self._problems.append(SlideOpenError(f"{folder} holds no slide file ({', '.join(sorted(SLIDE_SUFFIXES))})"))

    def _sort_out(self, where: Path, entries: Iterable[Path]) -> None:
        """Add the slides among the files; a skipped one is logged."""
        similar: dict[str, list[Path]] = {}
        hidden: list[Path] = []
        for entry in entries:
            if not _looks_like_a_slide(entry):
                kind = _kind_of_similar_name(entry)
                if kind is not None:
                    similar.setdefault(kind, []).append(entry)
            elif entry.name.startswith("."):
                # macOS adds "._slide.svs" on a foreign disk; it contains attributes of the file and is not a slide.
                hidden.append(entry)
            elif entry.is_symlink() and not entry.exists():
                self._problems.append(SlideOpenError(f"{entry} is a link to a file that does not exist"))
            else:
                self.slides.append(entry)
        self._skipped += [Skipped(entry, "a hidden file") for entry in hidden]
        if len(hidden) > _HIDDEN_ONE_BY_ONE:
            logger.warning("%s has %d hidden files, such as %s, which are skipped", where, len(hidden), hidden[0])
        else:
            for entry in hidden:
                logger.warning("%s is a hidden file and is skipped", entry)
        for kind, files in sorted(similar.items()):
            logger.warning("%s has %d %s, such as %s, which are skipped", where, len(files), kind, files[0])
            self._skipped += [Skipped(file, kind) for file in files]


def _directly_in(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if not entry.is_dir()]


def _below(folder: Path, skipped: list[Skipped]) -> list[Path]:
    """The files in a folder and its folders, without hidden folders; each folder once, also if links form a circle."""
    found: list[Path] = []
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        place = current.resolve()
        if place in seen:
            continue
        seen.add(place)
        try:
            entries = sorted(current.iterdir())
        except OSError as exc:
            if current == folder:
                raise
            logger.warning("%s cannot be listed (%s) and is skipped", current, exc.strerror)
            skipped.append(Skipped(current, f"a folder that cannot be listed: {exc.strerror}"))
            continue
        folders = [entry for entry in entries if entry.is_dir()]
        found += [entry for entry in entries if not entry.is_dir()]
        waiting += [entry for entry in reversed(folders) if not entry.name.startswith(".")]
    return found


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
