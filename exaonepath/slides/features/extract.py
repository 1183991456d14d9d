"""Feature extraction from a slide and its patch coordinates; it can be resumed, and its memory use is constant.

Rows are appended to a file next to the output as soon as they are computed; the complete output is written at the end.
A stored result, finished or not, is used again only if all inputs and settings that produced it are the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from exaonepath.device import evaluating
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
from exaonepath.slides.features.batch_size import check_batch_size
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.identity import FeatureDtype, digest, feature_identity
from exaonepath.slides.features.partial import PartialFile, remove_finished
from exaonepath.slides.features.pipeline import encode_batches
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchReader
from exaonepath.slides.image import SlideImage, opened
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


def extract_features(
    slide: SlideImage | str | os.PathLike[str],
    patches_h5: str | os.PathLike[str],
    out_h5: str | os.PathLike[str],
    encoder: torch.nn.Module,
    *,
    weights: str,
    weights_fingerprint: str,
    preprocessing: PreprocessingConfig | None = None,
    batch_size: int | Literal["auto"] = 32,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    feature_dtype: FeatureDtype = "float32",
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> ExtractionResult:
    """Run the patch encoder over every patch of a slide and store the features.

    A finished file made with the same slide, coordinates, preprocessing, weights and dtype is left unchanged; if it
    lists patches that could not be read, only those are tried again. An interrupted run is resumed from `.<name>.part`
    next to the output; with the same batch size the result is bit for bit that of an uninterrupted run.

    Args:
        slide: the slide file, or an open slide (which stays open).
        patches_h5: coordinates, as written by `patchfy`.
        out_h5: the features file to write.
        encoder: maps normalised float [B, 3, crop, crop] to [B, D].
        weights: the weights that the user named ("random:0", a folder, a Hub id); stored.
        weights_fingerprint: hash that identifies the encoder's weights; stored.
        preprocessing: resize, crop, mean and std; stored.
        batch_size: patches in one call of the encoder. "auto": on a CUDA device the largest power of two up to 256 that
            fits into the free memory, elsewhere 32; a run that is resumed keeps the size that it began with.
        num_workers: reading threads; None: one per core; 0: patches are read in the calling thread, between batches.
        device: where the encoder runs; the encoder is moved to it.
        dtype: of matrix products. In bfloat16 and float16 an unmodified patch encoder runs with weights that are
            converted once, any other module under autocast.
        compile: run the encoder through `torch.compile`: the first batch takes a minute longer. Results differ by
            rounding, and are used again by runs without it.
        feature_dtype: how features are stored: "float32", or "float16", which halves the file and rounds each number
            to 11 significant bits.
        progress: called with (patches done, total patches) after every batch.
        overwrite: start again, whatever is stored.

    Raises:
        SettingsError: an argument is invalid, or the encoder does not return [B, D].
        SlideOpenError: the slide cannot be opened, or was removed during the run (finished rows are kept).
        SlideChangedError: the slide file was replaced during the run (finished rows are not used).
        DataFileError: the coordinates file is damaged, or belongs to another slide.
        OutputCollisionError: the output is one of the inputs, or holds the features of another slide.
        OutputError: the output cannot be written (finished rows are kept).
        BackendError: the encoder returned NaN, infinity or a number that float16 cannot hold, a batch does not fit into
            the device's memory, or the encoder cannot be compiled.
        DeviceError: the device does not exist.
    """
    if dtype not in _DTYPES:
        raise SettingsError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    check_batch_size(batch_size)
    preprocessing = preprocessing or PreprocessingConfig()
    out = Path(out_h5)
    with ExitStack() as stack:
        slide = stack.enter_context(opened(slide))
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

        def reused(failures: tuple[PatchFailure, ...], partly_missing: int, resumed_from: int = 0) -> ExtractionResult:
            _warn_of_missing(slide, partly_missing, n)
            return ExtractionResult(
                out, n, n - len(failures), failures, reused=True, resumed_from=resumed_from,
                n_partly_missing=partly_missing,
            )  # fmt: skip

        retry, partly_missing = finished(overwrite)
        part = out.with_name(f".{out.name}.part")
        if retry == ():
            remove_finished(part)
            logger.info("%s is up to date", out)
            return reused((), partly_missing)
        ensure_folder(out.parent)
        rows = np.arange(n, dtype=np.int64)
        if retry:
            logger.info("%s lacks %d patches that could not be read; trying them again", out, len(retry))
            rows = np.array([failure.index for failure in retry], np.int64)
        partial = PartialFile(part, {"settings": key, "rows": digest(rows)}, fresh=overwrite, dtype=feature_dtype)
        stack.callback(partial.close)
        if retry is None and not overwrite:
            failures_now, partly_missing_now = finished(overwrite=False)
            if failures_now == ():
                # Another process held the partial file until now, and has finished the work.
                partial.remove()
                return reused((), partly_missing_now)
        resumed_from = int(np.searchsorted(rows, partial.stop))
        if resumed_from:
            logger.info("%s: resuming after %d of %d patches", out, resumed_from, len(rows))
        stack.enter_context(evaluating(encoder))
        encode = BatchEncoder(
            encoder,
            preprocessing,
            torch.device(device),
            dtype,
            batch_size=batch_size,
            earlier_batch_size=partial.batch_size,
            compile=compile,
        )
        reader = PatchReader(
            slide,
            patches.coords,
            patches.patch_size,
            preprocessing,
            batch_size=encode.batch_size,
            num_workers=num_workers,
            indices=rows[resumed_from:],
            page_locked=encode.page_locked,
        )
        encode_batches(reader, encode, partial, resumed_from, len(rows), progress)
        slide.check_unchanged()
        failures = tuple(partial.failures)
        if retry and len(failures) == len(retry):
            partial.remove()
            return reused(retry, partly_missing, resumed_from)
        partly_missing += partial.n_partly_missing
        _warn_of_missing(slide, partly_missing, n)
        written = write_features(
            out,
            _merged(partial, out if retry else None, n, retry or ()),
            patches.coords,
            patches.contour_index,
            partial.dim or encode.width(),
            failures,
            {**attrs, "n_partly_missing": partly_missing, "batch_size": encode.batch_size, "compiled": compile},
        )
        partial.remove()
        return ExtractionResult(
            out, n, written, failures, reused=False, resumed_from=resumed_from, n_partly_missing=partly_missing
        )


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
