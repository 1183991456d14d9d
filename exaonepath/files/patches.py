"""The HDF5 file of patch coordinates: EXAONE Path's layout, plus attributes that show whether it is still valid."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exaonepath.errors import DataFileError, UnfinishedFileError
from exaonepath.files.artifact import Kind, canonical_json, settings_hash
from exaonepath.files.hdf5 import StoredFile, open_h5
from exaonepath.files.hdf5_output import atomic_h5
from exaonepath.files.outlines import Outlines, has_outlines, parse_outlines, write_outlines
from exaonepath.version import __version__

EXAONE_PATH = "EXAONE Path"


@dataclass(frozen=True)
class Outcome:
    """How the tissue of a slide was found, as stored with its patches.

    Attributes:
        segmenter: "exaone", "otsu", "mask", or the name of a plug-in.
        level: the pyramid level that was segmented.
        shrink: factor by which that level was reduced before.
        contours: number of contours.
        tries: (level, shrink, contours found) of each segmentation that was tried.
        no_patch: the reason why there is no patch; empty if there are patches.
        notes: the warnings that were logged, phrases that follow the name of the slide.
        left_out: number of patches that were left out for each reason ("excluded", "pen", "blur").
    """

    segmenter: str
    level: int
    shrink: float
    contours: int
    tries: tuple[tuple[int, float, int], ...] = ()
    no_patch: str = ""
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """The file attributes that state it."""
        return {
            "segmenter": self.segmenter,
            "seg_level": self.level,
            "seg_shrink": float(self.shrink),
            "n_contours": self.contours,
            "seg_tries": json.dumps(self.tries),
            **({"no_patch": self.no_patch} if self.no_patch else {}),
            **({"notes": json.dumps(self.notes)} if self.notes else {}),
            **({"left_out": json.dumps(self.left_out)} if self.left_out else {}),
        }


@dataclass(frozen=True)
class PatchSet:
    """Patches of one slide.

    Attributes:
        coords: int32 [N, 2], top left corners (x, y) in level-0 pixels.
        contour_index: int32 [N], the tissue contour of each patch; all zero if the file does not state it.
        patch_size: side of a patch in level-0 pixels ("effective": after scaling by MPP).
        patch_level: the pyramid level that the grid was computed for.
        name: id of the slide (its file stem).
        slide_fingerprint: `SlideImage.fingerprint()` of the slide; None in a file made by EXAONE Path itself.
        settings_hash: hash of the settings that produced the patches; None in a file made by EXAONE Path itself.
        missing: fraction of the segmented level for which the slide file held no data.
        outcome: how the tissue was found; None in files that do not state it.
        has_outlines: whether the file holds the contours (see `read_contours`).
    """

    coords: np.ndarray
    contour_index: np.ndarray
    patch_size: int
    patch_level: int
    name: str
    slide_fingerprint: str | None
    settings_hash: str | None
    missing: float = 0.0
    has_outlines: bool = False
    outcome: Outcome | None = None

    def __len__(self) -> int:
        return len(self.coords)


class Slide(Protocol):
    """The attributes of the slide that are stored with the patches (`exaonepath.SlideImage` has them)."""

    name: str
    stored_path: str
    mpp: float
    mpp_y: float
    mpp_source: str
    reader: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]

    @property
    def mtime_ns(self) -> int | None: ...

    def fingerprint(self) -> str: ...


def write_patches(
    path: str | os.PathLike[str],
    slide: Slide,
    coords: np.ndarray,
    contour_index: np.ndarray,
    *,
    patch_size: int,
    patch_level: int,
    settings: Mapping[str, Any],
    missing: float = 0.0,
    outlines: Outlines | None = None,
    outcome: Outcome | None = None,
) -> None:
    """Write a patch file, whole or not at all.

    Args:
        path: the HDF5 file to write, in an existing folder.
        slide: the slide that the patches belong to.
        coords, contour_index: int32 [N, 2] and [N]; N may be 0.
        patch_size: effective side in level-0 pixels.
        patch_level: level that the grid was computed for.
        settings: the settings that produced the patches, plain JSON values.
        missing: fraction of the segmented level for which the slide file holds no data; stored if it is not 0.
        outlines: the contours that the patches were computed from; None: they are not stored.
        outcome: how the tissue was found.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_h5(path) as file:
        file.array("coords", np.asarray(coords, np.int32).reshape(-1, 2))
        size = slide.level_dimensions[patch_level]
        attributes = {
            "patch_size": patch_size,
            "patch_level": patch_level,
            "downsample": slide.level_downsamples[patch_level],
            "downsampled_level_dim": size,
            "level_dim": size,
            "name": slide.name,
        }
        file.attributes(attributes, of="coords")
        file.array("contour_index", np.asarray(contour_index, np.int32))
        file.attributes({"name": slide.name}, of="contour_index")
        if outlines is not None:
            write_outlines(file, outlines)
        made_by = {
            "n_coords": len(coords),
            "settings": canonical_json(settings),
            "settings_hash": settings_hash(settings),
            "slide_fingerprint": slide.fingerprint(),
            "slide_path": slide.stored_path,
            **({} if slide.mtime_ns is None else {"slide_mtime_ns": slide.mtime_ns}),
            **({"missing_share": float(missing)} if missing else {}),
            **({} if outcome is None else outcome.attributes()),
            "mpp": slide.mpp,
            "mpp_y": slide.mpp_y,
            "mpp_source": slide.mpp_source,
            "reader": slide.reader,
            "exaonepath_version": __version__,
            "complete": True,
        }
        file.attributes(made_by)


def write_imported_patches(
    path: str | os.PathLike[str],
    coords: np.ndarray,
    contour_index: np.ndarray,
    *,
    patch_size: int,
    name: str,
    attrs: Mapping[str, Any],
) -> None:
    """Write a patch file from another program's coordinates, whole or not at all.

    It does not state a slide or settings, so no stage takes it for its own result, and none replaces it.

    Args:
        path: the HDF5 file to write, in an existing folder.
        coords, contour_index: int32 [N, 2] and [N]; N may be 0.
        patch_size: side of a patch in level-0 pixels.
        name: id of the slide.
        attrs: file attributes that state where they come from.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_h5(path) as file:
        file.array("coords", np.asarray(coords, np.int32).reshape(-1, 2))
        file.attributes({"patch_size": patch_size, "patch_level": 0, "name": name}, of="coords")
        file.array("contour_index", np.asarray(contour_index, np.int32))
        file.attributes({"name": name}, of="contour_index")
        file.attributes({**attrs, "n_coords": len(coords), "exaonepath_version": __version__, "complete": True})


def read_patches(path: str | os.PathLike[str]) -> PatchSet:
    """Read and check a patch file, made by this package, by EXAONE Path, or by TRIDENT or CLAM.

    Raises:
        DataFileError: the file is missing, damaged or incomplete, or has no coords or no patch_size; shapes or types
            cannot be those of coordinates; coords and contour_index differ in length.
    """
    path = Path(path)
    with open_h5(path, required=["coords"]) as file:
        return parse_patches(path, file)


def read_contours(path: str | os.PathLike[str]) -> Outlines:
    """The contours, holes and excluded regions that the patches in a file were computed from, in level-0 pixels.

    Raises:
        DataFileError: the file is missing, damaged or incomplete; it holds no contours, as files of EXAONE Path and of
            versions that did not store them; or its outlines contradict each other.
    """
    path = Path(path)
    with open_h5(path, required=["coords"]) as file:
        return parse_outlines(file)


def parse_patches(path: Path, file: StoredFile) -> PatchSet:
    """The patches of an opened file; raises the errors of `read_patches`."""
    coords = _int32(path, "coords", file.dataset("coords", "iu", (None, 2)).read())
    patch_size = _foreign_patch_size(file)
    if patch_size is None:
        if not file.attribute("complete", False):
            raise UnfinishedFileError(
                f'{path} is half written: it has no "complete" mark, which comes last; make it again'
            )
        patch_size = file.attribute("patch_size", of="coords")
    index = np.zeros(len(coords), np.int32)
    if "contour_index" in file:
        index = _int32(path, "contour_index", file.dataset("contour_index", "iu", (len(coords),)).read())
    stated = file.attribute("n_coords")
    if stated is not None and stated != len(coords):
        raise DataFileError(f"{path} states n_coords = {stated} and holds {len(coords)}")
    if patch_size is None:
        raise DataFileError(f"{path}: coords has no patch_size attribute")
    if not isinstance(patch_size, int | float) or int(patch_size) <= 0:
        raise DataFileError(f"{path}: patch_size is {patch_size}")
    return PatchSet(
        coords=coords,
        contour_index=index,
        patch_size=int(patch_size),
        patch_level=int(file.attribute("patch_level", 0, of="coords")),
        name=file.attribute("name", of="coords") or path.stem,
        slide_fingerprint=file.attribute("slide_fingerprint"),
        settings_hash=file.attribute("settings_hash"),
        missing=_share(file.attribute("missing_share", 0.0)),
        has_outlines=has_outlines(file),
        outcome=_outcome(file),
    )


def _outcome(file: StoredFile) -> Outcome | None:
    segmenter = file.attribute("segmenter")
    if not isinstance(segmenter, str) or file.attribute("exaonepath_version") is None:
        return None
    try:
        return Outcome(
            segmenter,
            int(file.attribute("seg_level", 0)),
            float(file.attribute("seg_shrink", 1.0)),
            int(file.attribute("n_contours", 0)),
            tuple((int(a), float(b), int(c)) for a, b, c in json.loads(file.attribute("seg_tries", "[]"))),
            str(file.attribute("no_patch", "")),
            tuple(str(note) for note in json.loads(file.attribute("notes", "[]"))),
            {str(reason): int(count) for reason, count in json.loads(file.attribute("left_out", "{}")).items()},
        )
    except (ValueError, TypeError, AttributeError) as exc:
        raise DataFileError(f"{file.path}: its attributes do not say how the tissue was found ({exc})") from exc


def _share(value: object) -> float:
    return float(value) if isinstance(value, float) and 0 <= value <= 1 else 0.0


def foreign_writer(file: StoredFile) -> str | None:
    """The other program whose layout a coordinates file has; None for EXAONE Path's layout, which this package uses."""
    if file.attribute("complete") is not None or "contour_index" in file:
        return None
    if file.attribute("patch_size_level0", of="coords") is not None:
        return "TRIDENT"
    # The attributes that CLAM stores and EXAONE Path adopted, without the mark and the contours.
    clam = ("patch_size", "patch_level", "downsample", "save_path")
    return "CLAM" if all(file.attribute(name, of="coords") is not None for name in clam) else None


def _foreign_patch_size(file: StoredFile) -> int | None:
    """Side of a patch in level-0 pixels, in files of the programs that store it in a format of their own."""
    writer = foreign_writer(file)
    if writer == "TRIDENT":  # its patch_size is in pixels of the target magnification
        return int(file.attribute("patch_size_level0", of="coords"))
    if writer == "CLAM":  # its patch_size is in pixels of patch_level
        downsample = float(np.ravel(file.attribute("downsample", of="coords"))[0])
        return int(file.attribute("patch_size", of="coords") * downsample)
    return None


def _int32(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    limits = np.iinfo(np.int32)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise DataFileError(f"{path}: {name} holds values beyond 32 bits")
    return values.astype(np.int32, copy=False)


def _writer(file: StoredFile) -> str | None:
    known = [file.attribute(name, of="coords") is not None for name in ("downsampled_level_dim", "level_dim", "name")]
    exaone_path = all(known) and "contour_index" in file and file.attribute("complete", False)
    return EXAONE_PATH if exaone_path else foreign_writer(file)


# EXAONE Path's coordinates are reproduced bit for bit, so computing them again loses nothing.
KIND = Kind(("coords",), ("features", "slide_embedding"), _writer, made_again=(EXAONE_PATH,))
