"""The slides of a cohort: from files, folders and patterns of a command line, or from a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from exaonepath.errors import SettingsError, SlideOpenError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.manifest import read_manifest
from exaonepath.slides.find import Skipped, find_slides
from exaonepath.slides.image import slide_id


@dataclass(frozen=True)
class CohortInputs:
    """What a cohort is to be made of.

    Attributes:
        slides: in the order of the command line or of the manifest; ids are unique.
        problems: paths of the command line at which there is no slide; the others can be encoded all the same.
        skipped: files that were found and are not used.
        note: which columns of a manifest were read as what, if their names are not the documented ones.
    """

    slides: tuple[CohortSlide, ...]
    problems: tuple[SlideOpenError, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    note: str = ""


def cohort_inputs(
    paths: Iterable[str | os.PathLike[str]] = (),
    manifest: str | os.PathLike[str] | None = None,
    *,
    recursive: bool = False,
) -> CohortInputs:
    """The slides of a cohort, and what was found besides.

    Args:
        paths: slide files, folders of slides, and patterns (see `find_slides`).
        manifest: a table of slides, in place of `paths` (see `read_manifest`).
        recursive: also take the slides in the folders of a folder, at any depth.

    Raises:
        SettingsError: both or none of `paths` and `manifest` are given.
        SlideListError: the manifest cannot be used.
        IdCollisionError: slides of `paths` would write the same files.
        MissingDependencyError: the manifest is a Parquet file, and pyarrow is not installed.
    """
    paths = list(paths)
    if bool(paths) == (manifest is not None):
        raise SettingsError("name slides, or a manifest of slides" + (", not both" if paths else ""))
    if manifest is not None:
        found = read_manifest(manifest)
        renamed = [f"{known} = column {column!r}" for known, column in found.columns.items() if known != column]
        return CohortInputs(found.slides, note=f"{manifest}: {', '.join(renamed)}" if renamed else "")
    problems: list[SlideOpenError] = []
    skipped: list[Skipped] = []
    files = find_slides(paths, problems, recursive=recursive, skipped=skipped)
    slides = tuple(CohortSlide(file, slide_id(file)) for file in files)
    return CohortInputs(slides, tuple(problems), tuple(skipped))
