"""Slides that another process of the run has finished meanwhile, recognised without reading their results again.

A result that lay in the folder when a process began is verified in full. What appeared since was written moments ago by
a process that takes part in claims: it is enough that it was asked for the same, and that the slide file is the same.
Otherwise each of many processes would read the whole output of the cohort.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from exaonepath.errors import DataFileError, FileBusyError
from exaonepath.files.file_identity import FileIdentity, file_identity
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import encodable
from exaonepath.slides.companions import companion_files
from exaonepath.slides.dicom import dicom_slide_in
from exaonepath.slides.outputs import OutputPaths, output_paths
from exaonepath.slides.stages import EncodeResult, why_no_patch

_NAMES = ("complete", "request", "slide_path", "slide_mtime_ns", "n_patches", "n_failed")


class FinishedSince:
    """The embeddings of a run at its start.

    Args:
        out: output folder.
        ids: the slides of the run.
    """

    def __init__(self, out: str | os.PathLike[str], ids: Iterable[str]) -> None:
        self._before: dict[Path, FileIdentity] = {}
        for name in ids:
            path = output_paths(out, name).embedding
            identity = file_identity(path)
            if identity is not None:
                self._before[path] = identity

    def result(self, slide: Path, name: str, paths: OutputPaths, request: str) -> EncodeResult | None:
        """The result of a slide, if its embedding is newer than the run, and is what this process would make.

        Args:
            slide: the slide file.
            name: its id.
            paths: its outputs.
            request: see `exaonepath.slides.stages.request_hash`.
        """
        identity = file_identity(paths.embedding)
        if identity is None or identity == self._before.get(paths.embedding):
            return None
        try:
            with open_h5(paths.embedding) as file:
                stored = file.attributes(_NAMES)
            original = dicom_slide_in(slide) or slide
            modified = max(path.stat().st_mtime_ns for path in (original, *companion_files(original)))
            expected = (True, request, encodable(str(original.resolve())), modified)
            if tuple(stored.get(key) for key in _NAMES[:4]) != expected:
                return None
            n_patches, n_failed = int(stored["n_patches"]), int(stored["n_failed"])
            no_patch = "" if n_patches or n_failed else why_no_patch(paths.patches)
        except (DataFileError, FileBusyError, OSError, KeyError, TypeError, ValueError):
            return None  # whatever it is, the stages find out
        files = paths.patches, paths.features, paths.embedding
        return EncodeResult(name, slide, *files, n_patches, n_failed, ("features", "slide"), no_patch)
