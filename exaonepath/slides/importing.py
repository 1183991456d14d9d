"""Imports features and coordinates of other tools (`exaonepath.exchange`) as files of this package."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from exaonepath.errors import DataFileError, ExaonePathError, SettingsError, SlideListError
from exaonepath.exchange import clam, h5ad, parquet, slide2vec, trident, zarr_store
from exaonepath.exchange.slide_patches import CheckedMatrix, Given, SlidePatches, refuse_existing
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.features import write_features
from exaonepath.files.hdf5 import passing_errors
from exaonepath.files.patches import write_imported_patches
from exaonepath.log_once import warn_once
from exaonepath.slides.cohort.slide_ids import id_collisions, why_not_an_id
from exaonepath.slides.outputs import OutputPaths, choose_layout, paths_in_layout, read_layout
from exaonepath.slides.patches.fragments import fragments_of_grid
from exaonepath.text import close_to
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

ImportFormat = Literal["trident", "clam", "slide2vec", "anndata", "parquet", "zarr"]
FORMATS: tuple[str, ...] = get_args(ImportFormat)
Fragments = Literal["grid", "one"]

_LAYOUTS: Mapping[str, ModuleType] = {
    "trident": trident,
    "clam": clam,
    "slide2vec": slide2vec,
    "anndata": h5ad,
    "parquet": parquet,
    "zarr": zarr_store,
}
_HOW = {"grid": "patches that touch", "one": "one for the whole slide", None: "as stated"}


@dataclass(frozen=True)
class ImportedSlide:
    """One imported slide.

    Attributes:
        id: the slide.
        patches_path: the file of its coordinates.
        features_path: the file of its features; None if there were coordinates only.
        n_patches: number of patches.
        n_fragments: number of tissue fragments.
    """

    id: str
    patches_path: Path
    features_path: Path | None
    n_patches: int
    n_fragments: int


def import_features(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: ImportFormat,
    *,
    encoder: str | None = None,
    fragments: Fragments | None = None,
    patch_size: int | None = None,
    mpp: float | None = None,
    slide: str | None = None,
    coords: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[ImportedSlide], None] | None = None,
) -> list[ImportedSlide]:
    """Write the features of another tool as `patches/<id>_features.h5`, and their coordinates as `patches/<id>.h5`.

    The files state that they were imported, from which layout, and which encoder made the features: they are never
    taken for results of this package's encoders, and no stage replaces them. All slides are checked before the first
    file is written, apart from the values of their features, which are read once: one that is NaN or infinite ends the
    import. Each file appears whole or not at all. Features are stored as float16 if they are float16, else as float32:
    only float64 is rounded.

    Args:
        source: a folder or file of the other tool.
        out: output folder; created if needed.
        format: whose layout it is.
        encoder: what made the features, if the files do not state it; of files that do, another name.
        fragments: which patches belong to one piece of tissue, if the files do not state it, as those of other tools
            never do: "grid": patches that touch or overlap; "one": all of a slide. The slide encoder's attention
            stays inside fragments, so there is no default.
        patch_size: side of a patch in level-0 pixels, if the files do not state it.
        mpp: pixel size of level 0 in micrometres, if it is known; stored.
        slide: id of the slide, for files of one slide that do not name it.
        coords: folder of the coordinates, if they do not lie where the layout has them.
        overwrite: replace files that exist.
        progress: called with each slide that is finished.

    Raises:
        SettingsError: an argument cannot be used, or something has to be stated.
        SlideListError: some slides cannot be imported; nothing was written.
        DataFileError: a file is damaged, or has another layout.
        OutputCollisionError: a file exists.
        OutputError: a file cannot be written.
        MissingDependencyError: a library is not installed.
    """
    if format not in FORMATS:
        raise SettingsError(f"unknown format {format!r}{close_to(str(format), FORMATS)}")
    if fragments not in (None, *get_args(Fragments)):
        raise SettingsError(f"fragments are grid or one, not {fragments!r}")
    if patch_size is not None and patch_size <= 0:
        raise SettingsError(f"patch_size must be a positive number of pixels, not {patch_size}")
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise SettingsError(f"mpp must be a positive number of micrometres, not {mpp}")
    place, layout = Path(source), _LAYOUTS[format]
    if not place.exists():
        raise SettingsError(f"{place} does not exist")
    given = Given(encoder or None, patch_size, mpp, slide, None if coords is None else Path(coords))
    found = layout.find(place, given)
    if not found:
        raise DataFileError(f"{place} holds no slides in the layout of {layout.NAME}")
    _check_ids([(item.id, str(place)) for item in found])
    with_features = _checked(layout, found, given, fragments)
    ids = [item.id for item in found]
    refuse_existing(_targets(_output_paths(Path(out), ids), with_features), overwrite)
    ensure_folder(out)
    decided = choose_layout(out, len(found))
    paths = [paths_in_layout(out, name, decided) for name in ids]
    refuse_existing(_targets(paths, with_features), overwrite)  # another process may have decided otherwise
    done = []
    for item, to in zip(found, paths, strict=True):
        with passing_errors(layout.read(item, given)) as patches:
            imported = _write(patches, to, layout.NAME, fragments, place)
        done.append(imported)
        if progress is not None:
            progress(imported)
    return done


def _check_ids(named: Sequence[tuple[str, str]]) -> None:
    problems = [f"{name!r} {reason}" for name, _ in named if (reason := why_not_an_id(name))]
    problems += id_collisions(named)
    if problems:
        raise SlideListError("the names of the slides cannot be used as ids:", problems)


def _output_paths(out: Path, ids: Sequence[str]) -> list[OutputPaths]:
    """Where files of these slides may lie now, before the layout of a new folder is decided."""
    layout = read_layout(out)
    return [paths_in_layout(out, name, layout) for name in ids]


def _targets(paths: Sequence[OutputPaths], with_features: Sequence[bool]) -> list[Path]:
    patches = [to.patches for to in paths]
    return patches + [to.features for to, has in zip(paths, with_features, strict=True) if has]


def _checked(layout: ModuleType, found: Sequence[Any], given: Given, fragments: Fragments | None) -> list[bool]:
    """For each slide, whether it has features, after a look at all of them; all problems are one error."""
    with_features: list[bool] = []
    problems = []
    for item in found:
        try:
            with passing_errors(layout.read(item, given)) as patches:
                _check(patches, fragments, layout.NAME)
                with_features.append(patches.vectors is not None)
        except ExaonePathError as exc:
            if len(found) == 1:
                raise
            problems.append(f"{item.id}: {exc}")
    if problems:
        raise SlideListError(f"{len(problems)} of {len(found)} slides cannot be imported:", problems)
    return with_features


def _check(patches: SlidePatches, fragments: Fragments | None, name: str) -> None:
    if patches.vectors is not None and patches.vectors.shape[1] == 0 and len(patches):
        raise DataFileError(f"the features of {patches.id} have no columns")
    _check_positions(patches)
    if patches.fragments is not None:
        for number in (patches.fragments.min(), patches.fragments.max()) if len(patches.fragments) else ():
            if not 0 <= int(number) <= np.iinfo(np.int32).max:
                raise DataFileError(
                    f"{patches.id}: a fragment has the number {int(number)}; they count from 0 to 2^31 - 1"
                )
        if fragments is not None:
            warn_once(logger, "%s's files state the fragments of patches; --fragments %s is not used", name, fragments)
        return
    if fragments is None:
        raise SettingsError(
            f"{name}'s files do not state which patches belong to one fragment of tissue, and the slide encoder "
            "attends inside fragments only; choose --fragments grid (patches that touch) or --fragments one"
        )


def _check_positions(patches: SlidePatches) -> None:
    """Warn if patches have one position: files that a run of another tool was appended to look like that."""
    twice = len(patches) - len(np.unique(patches.coords, axis=0))
    if twice:
        logger.warning(
            "%d of %d patches of %s have the position of another one, and all are imported: were they stored twice?",
            twice,
            len(patches),
            patches.id,
        )


def _write(
    patches: SlidePatches, to: OutputPaths, name: str, fragments: Fragments | None, source: Path
) -> ImportedSlide:
    index = _fragments(patches, fragments)
    made: dict[str, Any] = {
        "imported_from": name,
        "fragments": _HOW[None if patches.fragments is not None else fragments],
        **({} if patches.mpp is None else {"mpp": float(patches.mpp)}),
    }
    ensure_folder(to.patches.parent)
    if patches.vectors is not None:
        matrix = CheckedMatrix(patches.vectors, f"{source}: features of {patches.id}")
        attrs = {
            **made,
            "weights": patches.encoder,
            # Never the fingerprint of weights: nothing shows that the features are those of these weights.
            "weights_fingerprint": f"imported:{patches.encoder}",
            "patch_size": patches.patch_size,
            "feature_dtype": matrix.dtype.name,
            "exaonepath_version": __version__,
        }
        write_features(to.features, _blocks(matrix), patches.coords, index, matrix.shape[1], (), attrs)
    write_imported_patches(
        to.patches, patches.coords, index, patch_size=patches.patch_size, name=patches.id, attrs=made
    )
    count = len(np.unique(index))
    features = None if patches.vectors is None else to.features
    return ImportedSlide(patches.id, to.patches, features, len(patches), count)


def _blocks(matrix: CheckedMatrix) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start, part in matrix.parts():
        yield np.arange(start, start + len(part), dtype=np.int64), part


def _fragments(patches: SlidePatches, fragments: Fragments | None) -> np.ndarray:
    if patches.fragments is not None:
        return np.asarray(patches.fragments, np.int32)
    if fragments == "one":
        return np.zeros(len(patches), np.int32)
    index = fragments_of_grid(patches.coords, patches.patch_size)
    alone = int((np.bincount(index) == 1).sum()) if len(index) else 0
    if len(index) > 1 and 2 * alone > len(index):
        logger.warning(
            "%d of %d patches of %s touch no other, and are fragments of their own: are they %d level-0 pixels wide?",
            alone,
            len(index),
            patches.id,
            patches.patch_size,
        )
    return index
