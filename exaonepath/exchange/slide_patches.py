"""The patches of one slide as they pass between this package and the layouts of other tools."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, ExaonePathError, OutputCollisionError, SettingsError
from exaonepath.files.signals import raise_if_interrupted
from exaonepath.text import few

Vectors = Literal["features", "embeddings"]
_UNSAFE = re.compile(r"[/\\\0]|^\.{0,2}$")
_PART_BYTES = 1 << 23
_LARGEST_FLOAT16 = 65504.0


class Matrix(Protocol):
    """Floating-point numbers [N, D] that are read in parts of bounded size, in memory or in a file that is open."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows), in order; at least once."""
        ...


class ArrayMatrix:
    """A `Matrix` in memory, or memory-mapped.

    Args:
        values: [N, D].
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape: tuple[int, ...] = values.shape
        self.dtype: np.dtype = values.dtype

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `Matrix.parts`."""
        step = part_rows(self.shape, self.dtype)
        for start in range(0, max(1, len(self.values)), step):
            yield start, np.asarray(self.values[start : start + step])


def part_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows of a matrix that are read at a time: some MB."""
    return max(1, _PART_BYTES // max(1, shape[1] * dtype.itemsize))


class CheckedMatrix:
    """Some columns of a matrix in another type; values that the type cannot hold are errors.

    Args:
        source: the numbers.
        where: names them in messages.
        columns: (first, behind the last); None: all.
        dtype: "float32", "float16", or None: as stored, which is one of these two.

    Raises:
        SettingsError: the type is none of these.
    """

    def __init__(
        self, source: Matrix, where: str, columns: tuple[int, int] | None = None, dtype: str | None = None
    ) -> None:
        if dtype not in (None, "float32", "float16"):
            raise SettingsError(f"vectors are written as float32 or float16, not as {dtype!r}")
        self._source, self._where = source, where
        self._columns = columns or (0, source.shape[1])
        self.shape: tuple[int, ...] = (source.shape[0], self._columns[1] - self._columns[0])
        self.dtype = np.dtype(dtype or ("float16" if source.dtype == np.float16 else "float32"))

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `Matrix.parts`.

        Raises:
            DataFileError: a number is NaN or infinite, or cannot be held by float16; the file is damaged.
        """
        for start, values in self._stored():
            part = values[:, self._columns[0] : self._columns[1]]
            bad = ~np.isfinite(part).all(axis=1)
            if bad.any():
                rows = few((start + np.flatnonzero(bad)).tolist())
                raise DataFileError(f"{self._where}: NaN or infinity in {int(bad.sum())} patches (number {rows})")
            if self.dtype == np.float16 and part.size and np.abs(part).max() > _LARGEST_FLOAT16:
                raise DataFileError(
                    f"{self._where} holds {np.abs(part).max():.4g}, which float16 cannot; write it as float32"
                )
            if part.dtype.itemsize > 4 and part.size and np.abs(part).max() > np.finfo(np.float32).max:
                raise DataFileError(f"{self._where} holds {np.abs(part).max():.4g}, which float32 cannot")
            yield start, np.ascontiguousarray(part, self.dtype)

    def _stored(self) -> Iterator[tuple[int, np.ndarray]]:
        """The parts of the source; what a library raises while it reads them is damage of the file."""
        parts = self._source.parts()
        while True:
            try:
                item = next(parts, None)
            except ExaonePathError:
                raise
            except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError) as exc:
                reason = " ".join(str(exc).split())[:200]
                raise DamagedFileError(f"{self._where} cannot be read: {type(exc).__name__}: {reason}") from exc
            raise_if_interrupted()
            if item is None:
                return
            yield item


@dataclass(frozen=True)
class Values:
    """One value for each patch.

    Attributes:
        values: float32 [N]; NaN where there is none. Of a column of text, the number of the category.
        categories: the texts of a column of text; empty for numbers.
    """

    values: np.ndarray
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A small picture of the whole slide.

    Attributes:
        pixels: uint8 [h, w, 3].
        scale: pixels of the picture for each level-0 pixel, along x and y.
    """

    pixels: np.ndarray
    scale: tuple[float, float]


@dataclass(frozen=True, eq=False)
class SlidePatches:
    """The patches of one slide.

    Attributes:
        id: names the slide.
        coords: int32 [N, 2], top left corners (x, y) in level-0 pixels.
        patch_size: side of a patch in level-0 pixels.
        vectors: [N, D]; None if nobody asked for them.
        kind: what the vectors are: "features" of the patch encoder, or patch "embeddings" (features next to the slide
            encoder's output).
        encoder: what made the vectors: the weights as they were named, or the encoder's name; empty if not known.
        fragments: int32 [N], the tissue fragment (contour) of each patch; None if not known.
        values: more values of the patches, by name.
        slide_vector: float32 [W], the slide embedding; None if there is none.
        patient: None if not known.
        mpp: pixel size of level 0 in micrometres; None if not known.
        target_size, target_step: side of a patch and distance between patches in pixels of `target_mpp`, as they were
            asked for; None if not known.
        target_mpp: pixel size, in micrometres, at which these count.
        level0_size: (width, height) of the slide; None if not known.
        origin: level-0 position from which QuPath counts on this slide.
        attrs: how the vectors were made; plain values.
        picture: a picture of the slide; None if the slide is not at hand.
    """

    id: str
    coords: np.ndarray
    patch_size: int
    vectors: Matrix | None
    kind: Vectors = "features"
    encoder: str = ""
    fragments: np.ndarray | None = None
    values: Mapping[str, Values] = field(default_factory=dict)
    slide_vector: np.ndarray | None = None
    patient: str | None = None
    mpp: float | None = None
    target_size: int | None = None
    target_step: int | None = None
    target_mpp: float | None = None
    level0_size: tuple[int, int] | None = None
    origin: tuple[int, int] = (0, 0)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    picture: Picture | None = None

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def matrix(self) -> Matrix:
        """The vectors; `DataFileError` is raised if there are none."""
        if self.vectors is None:
            raise DataFileError(f"the vectors of {self.id} were not kept; encode the slide again with --keep all")
        return self.vectors


@dataclass(frozen=True)
class FoundRows:
    """The rows of one slide in a file that may hold several.

    Attributes:
        id: the slide.
        path: the file.
        rows: int64 [N], numbers of its rows.
        coords: int32 [N, 2], corners in level-0 pixels.
        fragments: of the patches, as stated; None: the file does not say.
        about: what the metadata say of it.
    """

    id: str
    path: Path
    rows: np.ndarray
    coords: np.ndarray
    fragments: np.ndarray | None
    about: dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What the user states about files that do not state it themselves.

    Attributes:
        encoder: name of what made the vectors.
        patch_size: side of a patch in level-0 pixels.
        mpp: pixel size of level 0 in micrometres.
        slide: id of the slide, for files of one slide that do not name it.
        coords: folder of the coordinates, if they do not lie next to the features.
    """

    encoder: str | None = None
    patch_size: int | None = None
    mpp: float | None = None
    slide: str | None = None
    coords: Path | None = None

    def checked_encoder(self, stated: str | None, where: str) -> str:
        """The encoder, given or stated; `SettingsError` is raised if neither is."""
        found = self.encoder or stated
        if not found:
            raise SettingsError(f"{where} does not state which encoder made the features; name it (--encoder)")
        return found

    def checked_patch_size(self, stated: float | None, where: str) -> int:
        """The side of a patch in level-0 pixels.

        Raises:
            SettingsError: it is neither given nor stated, or both, and they differ.
            DataFileError: it is no positive whole number.
        """
        if stated is None:
            if self.patch_size is None:
                raise SettingsError(
                    f"{where} does not state the size of a patch at level 0; state it in level-0 pixels (--patch-size)"
                )
            return self.patch_size
        if not np.isfinite(stated) or stated != int(stated) or stated <= 0:
            raise DataFileError(f"{where}: the size of a patch is {stated}, not a positive whole number of pixels")
        if self.patch_size not in (None, int(stated)):
            raise SettingsError(f"{where} states patches of {int(stated)} pixels, and {self.patch_size} were given")
        return int(stated)


# A slide whose files are opened for the `with` block: many of them are handed on without being open.
Source = Callable[[], AbstractContextManager[SlidePatches]]


def file_name(sample: str) -> str:
    """The id itself; `SettingsError` is raised if it cannot be a file name, or would lead to another folder."""
    if _UNSAFE.search(sample):
        raise SettingsError(f"sample id {sample!r} cannot be a file name")
    return sample


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files and folders that match, sorted, without hidden ones: macOS writes `._<name>` next to each file of a
    disk that has no place for its attributes, and unfinished files of this package are hidden too."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def encoder_name(slide: SlidePatches) -> str:
    """The encoder as a part of a folder's name: "LGAI-EXAONE/EXAONE-Path-2.5" becomes "exaone-path-2.5"."""
    last = slide.encoder.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-.") or "unknown"


def refuse_existing(targets: list[Path], overwrite: bool) -> None:
    """Raise `OutputCollisionError` if one of the files that are to be written exists, unless it may be replaced, or if
    two outputs would be one file."""
    twice = [str(path) for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise OutputCollisionError(f"several outputs would be one file: {few(twice)}")
    existing = [path for path in targets if path.exists() or path.is_symlink()]
    if existing and not overwrite:
        raise OutputCollisionError(
            f"{few(map(str, existing), 3)} exist{'s' if len(existing) == 1 else ''} already; name another output, or "
            "ask to overwrite"
        )
