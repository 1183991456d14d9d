"""Cohorts of any size whose features files are complete, and have holes instead of features.

Such a file has all metadata, coordinates, fragments and checksums of a real one. Its features are zeros that the disk
does not store: 23,099 slides of 15,000 patches take 5 GB instead of a terabyte.
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np

from exaonepath.files.checksums import BlockChecksums
from exaonepath.files.hdf5_output import Hdf5Output

FRAGMENTS = 4


def coordinates(patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates int32 [N, 2] and fragments int32 [N] of a slide with `FRAGMENTS` squares of tissue."""
    each = -(-patches // FRAGMENTS)
    side = int(np.ceil(np.sqrt(each)))
    at, fragment = np.arange(patches) % each, np.arange(patches) // each
    corner = np.stack([fragment * side * 2, np.zeros_like(fragment)], 1)
    return ((np.stack([at // side, at % side], 1) + corner) * 256).astype("<i4"), fragment.astype("<i4")


def write_sparse(path: Path, patches: int, width: int) -> None:
    """A features file with holes."""
    dtype = np.dtype("<f4")
    with h5py.File(path, "w") as file:
        output = Hdf5Output(file)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # the space is reserved and never written to
        space = h5py.h5s.create_simple((patches, width))
        h5py.h5d.create(file.id, b"features", h5py.h5t.py_create(dtype), space, plan)
        check = BlockChecksums("features", (patches, width), dtype)
        check.add(np.zeros((patches, width), dtype))
        output._names["features"], output._checks["features"] = [], check.result()
        coords, fragments = coordinates(patches)
        output.array("coords", coords)
        output.array("contour_index", fragments)
        output.attributes({"feature_dtype": "float32", "n_features": patches, "n_failed": 0, "complete": True})
        output.finish()


def copy_sparse(template: Path, copies: list[Path]) -> None:
    """Copies that have the holes of the template."""
    with template.open("rb") as file:
        size, parts, end = os.fstat(file.fileno()).st_size, [], 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                break  # nothing but a hole
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            parts.append((start, os.pread(file.fileno(), end - start, start)))
    for copy in copies:
        with copy.open("wb") as file:
            for start, content in parts:
                os.pwrite(file.fileno(), content, start)
            os.truncate(file.fileno(), size)


def write_cohort(folder: Path, patients: int, patches: int, width: int, *, sparse: bool = True) -> Path:
    """A cohort with one slide and 30 genes a patient; returns the table of slides."""
    (folder / "features").mkdir(parents=True)
    files = [folder / "features" / f"{at:05}.h5" for at in range(patients)]
    rng = np.random.default_rng(0)
    if sparse:
        write_sparse(folder / "template.h5", patches, width)
        copy_sparse(folder / "template.h5", files)
    else:
        from exaonepath.files.features import write_features

        values = rng.standard_normal((patches, width), np.float32)
        for at, file in enumerate(files):
            blocks = [(np.arange(patches), values + np.float32(at))]
            write_features(file, blocks, *coordinates(patches), width, (), {})
    rows = [f"P{at:05},S{at:05},features/{file.name}" for at, file in enumerate(files)]
    (folder / "slides.csv").write_text("\n".join(["patient,slide,features", *rows]) + "\n")
    genes = rng.standard_normal((patients, 30)).round(3)
    rows = [",".join([f"P{at:05}", *map(str, row)]) for at, row in enumerate(genes.tolist())]
    (folder / "rna.csv").write_text("\n".join([",".join(["patient", *(f"GENE{k}" for k in range(30))]), *rows]) + "\n")
    return folder / "slides.csv"
