"""Where the files of a slide lie in an output folder: the only module that builds these paths.

A folder has one layout. In the layout "flat" all files of a kind lie in one folder (`embeddings/<id>.h5`). In the
layout "hashed" they lie two folders deeper, named by the first digits of a hash of the id (`embeddings/3f/a0/<id>.h5`),
because many file systems and tools become slow with more than some ten thousand files in a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from exaonepath.errors import DataFileError, OutputError, SettingsError
from exaonepath.files.atomic import ensure_folder, remove_abandoned, write_text_once
from exaonepath.files.strict_json import parse_json

logger = logging.getLogger(__name__)

Layout = Literal["flat", "hashed"]
Kind = Literal["patches", "features", "embedding", "mask", "contours", "skipped"]

LAYOUT_FILE = "layout.json"
# Folders of what processes note about a run; their files are named by slides or runs, in either layout.
CLAIMS, FAILURES, RUNS = "claims", "failures", "runs"
HASHED_ABOVE = 10_000  # slides
_FORMAT = 1
_MAX_BYTES = 1 << 12
_FOLDERS: dict[Kind, tuple[str, str]] = {
    "patches": ("patches", ".h5"),
    "features": ("patches", "_features.h5"),
    "embedding": ("embeddings", ".h5"),
    "mask": ("masks", ".jpg"),
    "contours": ("contours", ".geojson"),
    "skipped": ("skipped", ".txt"),
}
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class OutputPaths:
    """Paths of the files of one slide in one output folder.

    Attributes:
        patches, features, embedding: the results of the three stages (HDF5).
        mask: picture of the tissue contours.
        contours: the contours as GeoJSON.
        skipped: the reason why a slide above `max_seg_pixels` was not processed.
    """

    patches: Path
    features: Path
    embedding: Path
    mask: Path
    contours: Path
    skipped: Path


def output_paths(out: str | os.PathLike[str], name: str) -> OutputPaths:
    """Paths of the files of the slide with this id in the output folder `out`, by the layout of that folder.

    Raises:
        DataFileError: `layout.json` is damaged, or was written by a later version.
    """
    return paths_in_layout(out, name, read_layout(out))


def remove_leftovers(out: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove temporary files that killed processes left in the folders of these slides.

    The next writer of a file removes those of the same name; a slide that another process has finished has none. If the
    layout cannot be read, nothing is removed, with a warning: what became of the slides does not depend on it.
    """
    try:
        layout = read_layout(out)
    except DataFileError as exc:
        logger.warning("temporary files of killed processes were not looked for: %s", exc)
        return
    for folder in {path.parent for name in names for path in vars(paths_in_layout(out, name, layout)).values()}:
        remove_abandoned(folder)


def paths_in_layout(out: str | os.PathLike[str], name: str, layout: Layout) -> OutputPaths:
    """`output_paths` for a folder whose layout is known: nothing is read."""
    deeper: tuple[str, ...] = ()
    if layout == "hashed":
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        deeper = (digest[:2], digest[2:4])
    return OutputPaths(
        **{kind: Path(out, folder, *deeper, f"{name}{ending}") for kind, (folder, ending) in _FOLDERS.items()}
    )


def read_layout(out: str | os.PathLike[str]) -> Layout:
    """The layout of an output folder: "flat", unless `layout.json` states another one.

    Raises:
        DataFileError: the file is damaged, or was written by a later version.
    """
    path = Path(out, LAYOUT_FILE)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return "flat"
    except OSError as exc:
        raise DataFileError(f"{path} cannot be read ({exc.strerror}); it states where results lie") from exc
    value = parse_json(data, str(path), DataFileError)
    if isinstance(value, dict) and isinstance(value.get("format"), int) and value["format"] > _FORMAT:
        raise DataFileError(f"{path} was written by a later version of exaonepath; update this one")
    layout = value.get("layout") if isinstance(value, dict) and value.get("format") == _FORMAT else None
    for known in get_args(Layout):
        if layout == known:
            return known
    raise DataFileError(
        f'{path} does not state the layout of the folder; it must hold {{"format": {_FORMAT}, "layout": "flat"}}, or '
        '"hashed" if the results lie in folders named by hexadecimal digits'
    )


def choose_layout(out: str | os.PathLike[str], n_slides: int, wanted: Layout | None = None) -> Layout:
    """Decide the layout of an output folder, once: the first run records it, and later runs follow it.

    Args:
        out: the output folder; created if needed.
        n_slides: slides of the cohort; above `HASHED_ABOVE` a new folder is hashed.
        wanted: the layout that the user asks for; None: by the number of slides.

    Raises:
        SettingsError: the folder has another layout than `wanted`.
        DataFileError: see `read_layout`.
        OutputError: the folder cannot be written.
    """
    root = Path(out)
    if not (root / LAYOUT_FILE).exists():
        # Results without a layout were made before layouts were recorded, or by a function for one slide.
        by_size: Layout = "hashed" if n_slides > HASHED_ABOVE else "flat"
        _record(root, "flat" if _has_results(root) else wanted or by_size)
    else:
        remove_abandoned(root, LAYOUT_FILE)  # of a process that was killed just after it had recorded the layout
    found = read_layout(root)  # another process may have been first
    if wanted not in (None, found):
        raise SettingsError(
            f"{root} has the layout {found!r}, as its first run decided, and a folder has one layout; leave the option "
            f"out, or name another output folder for the layout {wanted!r}"
        )
    return found


def stored_ids(out: str | os.PathLike[str], kind: Kind, layout: Layout | None = None) -> Iterator[tuple[str, Path]]:
    """(id, path) of every file of a kind in an output folder, in no certain order; unfinished files are left out.

    Raises:
        DataFileError: see `read_layout`.
        OutputError: a folder cannot be listed.
    """
    folder, ending = _FOLDERS[kind]
    depth = 2 if (layout or read_layout(out)) == "hashed" else 0
    for entry in _entries(Path(out, folder), depth):
        name = entry.name
        if not name.endswith(ending) or name.startswith("."):
            continue
        if kind == "patches" and name.endswith(_FOLDERS["features"][1]):
            continue
        yield name[: -len(ending)], Path(entry.path)


def partial_ids(out: str | os.PathLike[str], layout: Layout | None = None) -> set[str]:
    """Ids of the slides of which an unfinished features stage has left a file.

    Raises:
        DataFileError, OutputError: see `stored_ids`.
    """
    folder, ending = _FOLDERS["features"]
    pattern = re.compile(rf"\.(.+){re.escape(ending)}\.(?:[0-9a-f]{{16}}\.)?part", re.DOTALL)
    depth = 2 if (layout or read_layout(out)) == "hashed" else 0
    matches = (pattern.fullmatch(entry.name) for entry in _entries(Path(out, folder), depth))
    return {match[1] for match in matches if match is not None}


def _entries(folder: Path, depth: int) -> Iterator[os.DirEntry[str]]:
    """The files in a folder, or in the folders of two digits `depth` levels below it."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if depth and len(entry.name) == 2 and entry.is_dir():
                    yield from _entries(Path(entry.path), depth - 1)
                elif not depth and not entry.is_dir():
                    yield entry
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        raise OutputError(f"{folder} cannot be listed: {exc.strerror}") from exc


def _has_results(root: Path) -> bool:
    folders = {folder for folder, _ in _FOLDERS.values()}
    return any(next(_entries(root / folder, 0), None) is not None for folder in folders)


def _record(root: Path, layout: Layout) -> None:
    """Write `layout.json` unless it exists; of several processes, one wins."""
    try:
        ensure_folder(root)
        write_text_once(root / LAYOUT_FILE, json.dumps({"format": _FORMAT, "layout": layout}) + "\n")
    except OutputError as exc:
        # A folder of finished results may be read-only. Without the file it is flat.
        cause = exc.__cause__.errno if isinstance(exc.__cause__, OSError) else None
        if layout != "flat" or cause not in _READ_ONLY or not root.is_dir():
            raise
        logger.debug("%s", exc)
