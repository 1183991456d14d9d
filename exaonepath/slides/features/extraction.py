"""One extraction in three steps: what is stored is looked up, the other patches are encoded, the output is written.

The steps may run in different threads, so that the device is busy with one slide while another one is prepared and a
third one is written; and the images may come from anywhere: a `PatchReader` here, or readers on other machines.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.artifact import refuse_input_as_output, reuse
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.features import (
    KIND,
    PatchFailure,
    Rows,
    merge_by_index,
    read_failures,
    read_partly_missing,
    write_features,
)
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.patches import PatchSet, read_patches
from exaonepath.slides.features.identity import FeatureDtype, digest, feature_identity
from exaonepath.slides.features.partial import (
    PartialFile,
    has_token,
    partial_files,
    partial_path,
    remove_finished,
)
from exaonepath.slides.features.pipeline import Encoder, Progress, encode_batches
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchBatch, PatchReader
from exaonepath.slides.image import SlideImage
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExtractionResult:
    """The result of an extraction.

    Attributes:
        path: the finished features file.
        n_patches: patches in the coordinates file.
        n_features: rows in the features file: `n_patches` minus the failures.
        failures: the patches that could not be read.
        reused: True if a finished file existed already and was left unchanged.
        resumed_from: number of patches that an interrupted run had already processed.
        n_partly_missing: patches with pixels for which the slide file holds no data; those pixels are black.
    """

    path: Path
    n_patches: int
    n_features: int
    failures: tuple[PatchFailure, ...]
    reused: bool
    resumed_from: int
    n_partly_missing: int = 0


class ImageEncoder(Encoder, Protocol):
    """An encoder with what a slide needs to know of it (see `encoding.BatchEncoder`)."""

    @property
    def batch_size(self) -> int:
        """Most images in a batch."""

    @property
    def page_locked(self) -> bool:
        """Whether images should be in page-locked memory."""

    def width(self) -> int:
        """Width of the features, for a slide without patches."""


class Extraction:
    """An extraction that was prepared by `prepare_extraction`.

    Attributes:
        result: the result, if nothing is to be done; then the other steps are left out. None otherwise.
        patches: all patches of the slide.
        rows: int64 [M], the patches that are to be read, encoded and stored by this extraction.
        done, total: patches of `total` that were stored before, by a run that was interrupted.
        earlier_batch_size: batch size of that run, or None; with it, the result is that of an undisturbed run.
    """

    def __init__(
        self,
        slide: SlideImage,
        out: Path,
        patches: PatchSet,
        preprocessing: PreprocessingConfig,
        attrs: dict[str, Any],
        result: ExtractionResult | None,
    ) -> None:
        self._slide, self._out, self._preprocessing, self._attrs = slide, out, preprocessing, attrs
        self.patches, self.result = patches, result
        self.rows = np.empty(0, np.int64)
        self.done = self.total = 0
        self.earlier_batch_size: int | None = None
        self._partial: PartialFile | None = None
        self._retry: tuple[PatchFailure, ...] | None = None
        self._partly_missing = 0
        self._width: int | None = None

    def reader(self, encoder: ImageEncoder, num_workers: int | None = None) -> PatchReader:
        """A reader of the patches that are to be encoded, in batches of the size of `encoder`."""
        return PatchReader(
            self._slide,
            self.patches.coords,
            self.patches.patch_size,
            self._preprocessing,
            batch_size=encoder.batch_size,
            num_workers=num_workers,
            indices=self.rows,
            page_locked=encoder.page_locked,
        )

    def encode(
        self,
        batches: Iterable[PatchBatch],
        encoder: ImageEncoder,
        progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode and store all batches; called from the thread that drives the device.

        Args:
            batches: all of `rows`, in order (see `encode_batches`).
            encoder: called with the batches in order.
            progress: called with (patches done, total) after every batch.
            check: called before a batch is stored, in addition to the check that the slide is unchanged.

        Raises:
            ExaonePathError: see `extract_features`; and the errors of `check`. What was stored is kept.
        """
        assert self._partial is not None

        def checks() -> None:
            check()
            self._slide.check_unchanged()

        encode_batches(batches, encoder, self._partial, self.done, self.total, progress, checks)
        self._width = self._partial.dim or (None if self._retry else encoder.width())
        self._attrs["batch_size"] = encoder.batch_size

    def finish(self) -> ExtractionResult:
        """Write the output, and remove the partial file.

        Raises:
            SlideChangedError, SlideOpenError: the slide was replaced or removed.
            DataFileError, OutputError: see `write_features`.
        """
        if self.result is not None:
            return self.result
        assert self._partial is not None
        self._slide.check_unchanged()
        partial, retry, n = self._partial, self._retry, len(self.patches.coords)
        failures = tuple(partial.failures)
        if retry and len(failures) == len(retry):
            partial.remove()
            self.result = _reused(self._slide, self._out, n, retry, self._partly_missing, self.done)
            return self.result
        assert self._width is not None
        partly_missing = self._partly_missing + partial.n_partly_missing
        _warn_of_missing(self._slide, partly_missing, n)
        written = write_features(
            self._out,
            _merged(partial, self._out if retry else None, n, retry or ()),
            self.patches.coords,
            self.patches.contour_index,
            self._width,
            failures,
            {**self._attrs, "n_partly_missing": partly_missing},
        )
        partial.remove()
        self.result = ExtractionResult(
            self._out, n, written, failures, reused=False, resumed_from=self.done, n_partly_missing=partly_missing
        )
        return self.result

    def close(self) -> None:
        """Close the partial file; it is kept, unless the extraction has ended."""
        if self._partial is not None:
            self._partial.close()


def prepare_extraction(
    slide: SlideImage,
    patches_h5: str | os.PathLike[str],
    out_h5: str | os.PathLike[str],
    *,
    weights: str,
    weights_fingerprint: str,
    preprocessing: PreprocessingConfig,
    dtype: torch.dtype,
    compile: bool = False,
    feature_dtype: FeatureDtype = "float32",
    overwrite: bool = False,
    token: str = "",
    unwanted: Collection[str] = (),
) -> Extraction:
    """Look up what is stored of a slide's features, and open the partial file; the first step of `extract_features`.

    Args:
        slide: an open slide.
        patches_h5, out_h5, weights, weights_fingerprint, preprocessing, dtype, compile, feature_dtype, overwrite: as
            for `extract_features`.
        token: of this process's claim on the slide, whose owner writes into a partial file of its own and continues
            those of earlier owners; empty: there are no claims, and a process that holds the partial file is an error.
        unwanted: names of partial files of earlier owners that are not continued, only removed.

    Raises:
        SlideBusyError: (with a token) a process that makes no claims writes the output.
        ExaonePathError: see `extract_features`.
    """
    if dtype not in _DTYPES:
        raise SettingsError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    out = Path(out_h5)
    refuse_input_as_output(out, (slide.path, Path(patches_h5)))
    patches = read_patches(patches_h5)
    _check_same_slide(slide, patches, patches_h5)
    identity = feature_identity(
        slide,
        patches,
        preprocessing=preprocessing,
        weights_fingerprint=weights_fingerprint,
        dtype=dtype,
        feature_dtype=feature_dtype,
    )
    made_from, key = identity.made_from, identity.made_from.settings_hash
    attrs = {
        **identity.attrs,
        "weights": weights,
        "reader": slide.reader,
        "exaonepath_version": __version__,
        "compiled": compile,
    }

    def finished(overwrite: bool) -> tuple[tuple[PatchFailure, ...] | None, int]:
        """Failures and number of partly missing patches of the finished file; (None, 0) if it is missing."""
        found = reuse(
            out,
            KIND,
            made_from,
            lambda file: (read_failures(out, file), read_partly_missing(file)),
            overwrite=overwrite,
        )
        return found or (None, 0)

    n = len(patches.coords)
    extraction = Extraction(slide, out, patches, preprocessing, attrs, None)
    retry, partly_missing = finished(overwrite)
    if retry == ():
        remove_partial_files(out, token)
        logger.info("%s is up to date", out)
        extraction.result = _reused(slide, out, n, (), partly_missing)
        return extraction
    ensure_folder(out.parent)
    rows = np.arange(n, dtype=np.int64)
    if retry:
        logger.info("%s lacks %d patches that could not be read; trying them again", out, len(retry))
        rows = np.array([failure.index for failure in retry], np.int64)
    partial = PartialFile(
        partial_path(out, token), {"settings": key, "rows": digest(rows)}, fresh=overwrite, dtype=feature_dtype
    )
    try:
        if token:
            partial.take_over((path for path in partial_files(out) if path != partial.path), unwanted)
        if retry is None and not overwrite:
            failures_now, partly_missing_now = finished(overwrite=False)
            if failures_now == ():
                # Another process held the partial file until now, and has finished the work.
                partial.remove()
                extraction.result = _reused(slide, out, n, (), partly_missing_now)
                return extraction
    except BaseException:
        partial.close()
        raise
    extraction.done, extraction.total = int(np.searchsorted(rows, partial.stop)), len(rows)
    if extraction.done:
        logger.info("%s: resuming after %d of %d patches", out, extraction.done, len(rows))
    extraction.rows = rows[extraction.done :]
    extraction.earlier_batch_size = partial.batch_size
    extraction._partial, extraction._retry, extraction._partly_missing = partial, retry, partly_missing
    return extraction


def _reused(
    slide: SlideImage,
    out: Path,
    n: int,
    failures: tuple[PatchFailure, ...],
    partly_missing: int,
    resumed_from: int = 0,
) -> ExtractionResult:
    _warn_of_missing(slide, partly_missing, n)
    return ExtractionResult(
        out, n, n - len(failures), failures, reused=True, resumed_from=resumed_from, n_partly_missing=partly_missing
    )


def remove_partial_files(out: Path, token: str) -> None:
    """Remove what killed processes left next to a finished output; with a claim on the slide, those of all owners."""
    for path in partial_files(out) if token else [partial_path(out)]:
        if has_token(path):
            path.unlink(missing_ok=True)
        else:
            remove_finished(path)


def _warn_of_missing(slide: SlideImage, partly_missing: int, total: int) -> None:
    if partly_missing:
        logger.warning(
            "%s: %d of %d patches lie partly on tiles without data, which read as black: the file is incomplete",
            slide.path,
            partly_missing,
            total,
        )


def _merged(partial: PartialFile, finished: Path | None, n: int, retried: tuple[PatchFailure, ...]) -> Iterator[Rows]:
    """Rows of the partial file merged by index with those of the finished file that is being completed."""
    recovered = ((block.indices, block.features) for block in partial.blocks())
    if finished is None:
        yield from recovered
        return
    with open_h5(finished) as file:
        features = file.dataset("features", "f", (n - len(retried), None))
        indices = np.setdiff1d(np.arange(n, dtype=np.int64), [failure.index for failure in retried])
        kept = ((indices[start : start + len(rows)], rows) for start, rows in features.parts())
        yield from merge_by_index(kept, recovered)


def _check_same_slide(slide: SlideImage, patches: PatchSet, path: str | os.PathLike[str]) -> None:
    if patches.slide_fingerprint is not None and patches.slide_fingerprint != slide.fingerprint():
        raise DataFileError(
            f"{path}: the coordinates belong to another slide than {slide.path}; run the patch stage on it"
        )
    # Files of the original have no fingerprint; if a patch has no pixel inside the slide, the file is of another slide.
    corner = patches.coords.astype(np.int64)
    outside = ((corner >= slide.dimensions) | (corner + patches.patch_size <= 0)).any(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        width, height = slide.dimensions
        raise DataFileError(
            f"{path}: {int(outside.sum())} patches lie outside {slide.path}, which is {width} x {height} "
            f"(patch {first} at {tuple(corner[first].tolist())}); the coordinates belong to another slide"
        )
