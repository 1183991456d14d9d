"""What was computed of one slide, read from its files: patches, outlines, failures, and where the vectors lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError
from exaonepath.files import embeddings as embeddings_file
from exaonepath.files import features as features_file
from exaonepath.files.features import PatchFailure, read_failures
from exaonepath.files.hdf5 import StoredFile, open_h5
from exaonepath.files.outlines import KINDS, Outlines, parse_outlines
from exaonepath.files.patches import parse_patches
from exaonepath.slides.patches.fragments import grid_step
from exaonepath.viz.values.library import Entry

# The vectors of a patch: what the patch encoder saw in it, and what the slide encoder made of it in its surroundings.
APPEARANCE, CONTEXT = "appearance", "context"
_PUBLISHED_WIDTH, _PUBLISHED_SPLIT = 1536, 768
_MPP = ("mpp", "mpp_source")


@dataclass(frozen=True)
class VectorSource:
    """Where the vectors of a slide's patches are stored.

    Attributes:
        path, dataset: an HDF5 file and a dataset [N, W] in it.
        columns: the columns that belong to these vectors.
    """

    path: Path
    dataset: str
    columns: tuple[int, int]


@dataclass(frozen=True)
class Results:
    """The results of one slide.

    Attributes:
        version: changes whenever a file of the slide does; part of the addresses of everything computed from them.
        coords: int32 [N, 2], top left corners of the patches in level-0 pixels: those with a vector, if there are
            vectors.
        fragments: int32 [N], the tissue contour of each patch.
        patch_size: side of a patch in level-0 pixels; inferred, with a note, if no file states it.
        outlines: contours and holes; None if no file has them.
        failures: patches that could not be read.
        vectors: the kinds of vectors, in the order in which they are offered.
        made_by: for each kind of vectors, what has to be equal for vectors of two slides to be comparable.
        attrs: how the vectors were made.
        slide_fingerprint: of the slide that the results were computed from; None if no file states it.
        mpp, mpp_source: pixel size as stored with the patches; None if no file states it.
        notes: what the user should know about these files, sentences.
    """

    version: str
    coords: np.ndarray
    fragments: np.ndarray
    patch_size: int
    outlines: Outlines | None = None
    failures: tuple[PatchFailure, ...] = ()
    vectors: dict[str, VectorSource] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    slide_fingerprint: str | None = None
    mpp: float | None = None
    mpp_source: str | None = None
    notes: tuple[str, ...] = ()


def version_of(entry: Entry) -> str:
    """A short text that changes whenever a result of the slide is made again."""
    parts = []
    for kind, path in sorted(entry.files.items()):
        try:
            status = path.stat()
        except OSError:
            parts.append(f"{kind}-gone")
        else:
            parts.append(f"{kind[0]}{status.st_mtime_ns:x}.{status.st_size:x}.{status.st_ino:x}")
    return hashlib.sha256("-".join(parts).encode()).hexdigest()[:16]


def load_results(entry: Entry) -> Results:
    """Read the results of a slide, without its vectors.

    Raises:
        DataFileError: a file is damaged or incomplete, or two files of the slide do not belong together.
        FileBusyError: another process is writing a file.
    """
    version = version_of(entry)
    patches = _Patches(entry)
    notes: list[str] = []
    vectors: dict[str, VectorSource] = {}
    attrs: dict[str, Any] = {}
    coords, fragments = patches.coords, patches.fragments
    failures: tuple[PatchFailure, ...] = ()
    split: int | None = None
    if "features" in entry.files:
        path = entry.files["features"]
        with open_h5(path, ["features"]) as file:
            split = file.shape("features")[1]
            coords, fragments = _positions(file, file.shape("features")[0])
            failures = read_failures(path, file)
            attrs = file.attributes(features_file.ATTRIBUTES)
            attrs["patch_weights_fingerprint"] = attrs.get("weights_fingerprint", "")
        vectors[APPEARANCE] = VectorSource(path, "features", (0, split))
    if "embedding" in entry.files:
        path = entry.files["embedding"]
        with open_h5(path, embeddings_file.DATASETS) as file:
            attrs = {**attrs, **file.attributes(embeddings_file.ATTRIBUTES)}
            if embeddings_file.PATCHES in file:
                n, width = file.shape(embeddings_file.PATCHES)
                here, fragments_here = _positions(file, n)
                if APPEARANCE in vectors and not np.array_equal(here, coords):
                    notes.append("The features and the embeddings are of different patches; the embeddings are shown.")
                coords, fragments = here, fragments_here
                stated = attrs.get("feature_width")
                vectors = _of_embedding(path, width, stated if isinstance(stated, int) else split)
            elif not vectors:
                notes.append("The patch embeddings were not kept (--keep), so only the patches are shown.")
    size = patches.size or int(attrs.get("patch_size", 0))
    if not size and len(coords):
        size = max(1, grid_step(coords, 0))
        notes.append("No file states the size of the patches; the distance between them is shown instead.")
    return Results(
        version,
        coords,
        fragments,
        size,
        patches.outlines,
        failures,
        vectors,
        _made_by(attrs),
        attrs,
        patches.slide_fingerprint or attrs.get("slide_fingerprint"),
        patches.mpp,
        patches.mpp_source,
        tuple(notes),
    )


def packed_outlines(outlines: Outlines | None) -> np.ndarray:
    """Outlines as one int32 array: number of rings R; for each ring its contour (-1 for an excluded region), its kind
    (0 contour, 1 hole, 2 excluded, 3 pen, 4 blur), and its number of points; then all points (x, y)."""
    rows: list[tuple[int, int, np.ndarray]] = []
    outlines = Outlines([], []) if outlines is None else outlines
    for number, (contour, holes) in enumerate(zip(outlines.contours, outlines.holes, strict=True)):
        rows.append((number, 0, contour))
        rows += [(number, 1, hole) for hole in holes]
    for region in outlines.excluded:
        rows += [(-1, 1 + KINDS.index(region.reason), ring) for ring in region.rings]
    head = np.array([(number, kind, len(ring)) for number, kind, ring in rows], np.int32).reshape(-1, 3)
    points = [np.asarray(ring, np.int32).reshape(-1) for _, _, ring in rows]
    return np.concatenate([np.array([len(rows)], np.int32), head.reshape(-1), *points])


class _Patches:
    """The patches file of a slide, or nothing."""

    def __init__(self, entry: Entry) -> None:
        self.coords, self.fragments = np.empty((0, 2), np.int32), np.empty(0, np.int32)
        self.size, self.outlines = 0, None
        self.slide_fingerprint: str | None = None
        self.mpp: float | None = None
        self.mpp_source: str | None = None
        path = entry.files.get("patches")
        if path is None:
            return
        with open_h5(path, ["coords"]) as file:
            patches = parse_patches(path, file)
            self.outlines = parse_outlines(file) if patches.has_outlines else None
            mpp, source = (file.attribute(name) for name in _MPP)
        self.coords, self.fragments, self.size = patches.coords, patches.contour_index, patches.patch_size
        self.slide_fingerprint = patches.slide_fingerprint
        self.mpp = mpp if isinstance(mpp, float) else None
        self.mpp_source = source if isinstance(source, str) else None


def _positions(file: StoredFile, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners int32 [N, 2] and fragments int32 [N] of the rows of a file."""
    coords = file.dataset("coords", "iu", (n, 2)).read()
    fragments = np.zeros(n, np.int32)
    if "contour_index" in file:
        fragments = file.dataset("contour_index", "iu", (n,)).read()
    limit = np.iinfo(np.int32).max
    if n and max(np.abs(coords.astype(np.int64)).max(), np.abs(fragments.astype(np.int64)).max()) > limit:
        raise DataFileError(f"{file.path}: coordinates are beyond 32 bits")
    return coords.astype(np.int32), fragments.astype(np.int32)


def _of_embedding(path: Path, width: int, split: int | None) -> dict[str, VectorSource]:
    """A row of the embeddings is the patch feature, then the slide encoder's output. Files of earlier versions do not
    state where the one ends, but the width of the features file does, or that of the published model."""
    if split is None and width == _PUBLISHED_WIDTH:
        split = _PUBLISHED_SPLIT
    if split is None or not 0 < split < width:
        return {CONTEXT: VectorSource(path, embeddings_file.PATCHES, (0, width))}
    return {
        CONTEXT: VectorSource(path, embeddings_file.PATCHES, (split, width)),
        APPEARANCE: VectorSource(path, embeddings_file.PATCHES, (0, split)),
    }


def _made_by(attrs: dict[str, Any]) -> dict[str, str]:
    """Vectors of different weights or preprocessing have nothing to do with each other, whatever their width."""
    appearance = f"{attrs.get('patch_weights_fingerprint', '')}/{attrs.get('preprocessing', '')}"
    return {APPEARANCE: appearance, CONTEXT: f"{appearance}/{attrs.get('weights_fingerprint', '')}"}
