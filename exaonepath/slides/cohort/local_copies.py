"""Copies of slides on a local disk, made before they are read and removed afterwards.

Slides often lie on a network file system on which many small reads are slow. A copy is one long sequential read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path

from exaonepath.files.atomic import ensure_folder, remove_abandoned, temporary_name
from exaonepath.slides.companions import companion_files
from exaonepath.slides.dicom import dicom_slide_in

logger = logging.getLogger(__name__)

_NAME = "exaonepath"
_RESERVE = 1 << 30  # bytes of the disk that are left free


class LocalCopies:
    """Copies slides to a folder of this process in `folder`; it is removed at the end.

    At most one slide is copied ahead of the one that is encoded, so a few slides lie there at a time. A slide for which
    there is not enough space is read where it is.

    Raises:
        OutputError: the folder cannot be created or written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        parent = ensure_folder(folder)
        remove_abandoned(parent, _NAME)
        self._folder = temporary_name(parent / _NAME)
        ensure_folder(self._folder)

    def copy(self, slide: Path, name: str) -> Path | None:
        """Copy a slide with its other files; returns the copy, or None if it is to be read where it is."""
        original = dicom_slide_in(slide) or slide
        files = (original, *companion_files(original))
        try:
            needed = sum(path.stat().st_size for path in files)
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return None  # opening the slide raises the error that explains it
        if needed + min(_RESERVE, needed) > free:
            logger.warning(
                "%s is read where it is: %s has %.1f GB free, and it takes %.1f GB",
                original, self._folder.parent, free / 1e9, needed / 1e9,
            )  # fmt: skip
            return None
        target = self._place(name)
        try:
            for path in files:
                to = target / path.relative_to(original.parent)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to)  # with its time of modification, which is stored with results
        except (OSError, ValueError) as exc:
            logger.warning("%s cannot be copied to %s (%s); it is read where it is", original, target, exc)
            self.remove(name)
            return None
        return target / original.name

    def remove(self, name: str) -> None:
        """Remove the copy of a slide."""
        shutil.rmtree(self._place(name), ignore_errors=True)

    def _place(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def close(self) -> None:
        """Remove all copies."""
        shutil.rmtree(self._folder, ignore_errors=True)
