"""Which slides an output folder holds, what was computed of each, and where its slide file is."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from exaonepath.errors import DataFileError, FileBusyError, SettingsError, SlideOpenError
from exaonepath.files.hdf5 import open_h5
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.outputs import Kind, read_layout, stored_ids

_STAGES: tuple[Kind, ...] = ("patches", "features", "embedding", "skipped")
_RESCAN_SECONDS = 5.0


@dataclass(frozen=True)
class Entry:
    """One slide of the viewer.

    Attributes:
        key: names the slide in addresses: 16 hexadecimal digits, whatever characters the id has.
        id: the id of the slide.
        files: the files that were found, by kind ("patches", "features", "embedding", "skipped").
        given: the slide file, if the user named it.
        given_mpp: its pixel size, if the user stated one.
    """

    key: str
    id: str
    files: dict[Kind, Path] = field(default_factory=dict)
    given: Path | None = None
    given_mpp: float | None = None

    @property
    def state(self) -> str:
        """The last stage that is finished: "embedded", "features", "patches", "skipped" or "slide"."""
        if "embedding" in self.files:
            return "embedded"
        return next((kind for kind in ("features", "patches", "skipped") if kind in self.files), "slide")

    def slide_file(self) -> Path:
        """Where the slide is: as the user named it, otherwise as the results state it.

        Raises:
            SlideOpenError: neither names a file.
        """
        if self.given is not None:
            return self.given
        for kind in _STAGES[:3]:
            path = self.files.get(kind)
            stated = None if path is None else _attribute(path, "slide_path")
            if isinstance(stated, str) and stated:
                return Path(stated)
        raise SlideOpenError(
            f"the results of {self.id} do not state where its slide is; name the slide after the output folder"
        )

    def mpp(self) -> float | None:
        """The pixel size that the user gave when the patches were made, or gives now; None: as the slide states it."""
        path = self.files.get("patches")
        if self.given_mpp is not None or path is None or _attribute(path, "mpp_source") != "given":
            return self.given_mpp
        value = _attribute(path, "mpp")
        return value if isinstance(value, float) else None


class Library:
    """The slides of an output folder, together with slides that the user named. Safe to share between threads.

    Args:
        out: the output folder.
        slides: slide files; those without results are shown as plain slides.

    Raises:
        SettingsError: there is no such folder, or it holds no results and no slide is named.
        DataFileError, OutputError: the folder cannot be read.
    """

    def __init__(self, out: str | os.PathLike[str], slides: Iterable[CohortSlide] = ()) -> None:
        self.out = Path(out)
        self._given = {slide.id: slide for slide in slides}
        if not self.out.is_dir():
            raise SettingsError(f"{self.out} is not a folder; name the output folder of exaonepath encode")
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._scanned = float("-inf")
        if not self.entries():
            raise SettingsError(
                f"{self.out} holds no results of exaonepath (patches, features or embeddings); name the output folder "
                "of exaonepath encode, or slides after it"
            )

    def entries(self) -> list[Entry]:
        """All slides, by id. The folder is listed again if that is some seconds ago: a run may still write to it."""
        with self._lock:
            if time.monotonic() - self._scanned > _RESCAN_SECONDS:
                self._entries = {entry.key: entry for entry in self._scan()}
                self._scanned = time.monotonic()
            return list(self._entries.values())

    def get(self, key: str) -> Entry | None:
        """The slide with this key; None if there is none."""
        if key not in self._entries:
            self.entries()
        return self._entries.get(key)

    def _scan(self) -> list[Entry]:
        layout = read_layout(self.out)
        found: dict[str, dict[Kind, Path]] = {name: {} for name in self._given}
        for kind in _STAGES:
            for name, path in stored_ids(self.out, kind, layout):
                found.setdefault(name, {})[kind] = path
        entries = []
        for name in sorted(found):
            given = self._given.get(name)
            stated = (None, None) if given is None else (given.path, given.mpp)
            entries.append(Entry(key_of(name), name, found[name], *stated))
        return entries


def key_of(name: str) -> str:
    """The key of a slide id."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _attribute(path: Path, name: str) -> object:
    try:
        with open_h5(path) as file:
            return file.attribute(name)
    except (DataFileError, FileBusyError):
        return None  # whoever reads the file itself reports it
