"""Feature extraction from a slide and its patch coordinates; it can be resumed, and its memory use is constant.

Rows are appended to a file next to the output as soon as they are computed; the complete output is written at the end.
A stored result, finished or not, is used again only if all inputs and settings that produced it are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import torch

from exaonepath.device import evaluating
from exaonepath.slides.features.batch_size import check_batch_size
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.extraction import ExtractionResult as ExtractionResult
from exaonepath.slides.features.extraction import prepare_extraction
from exaonepath.slides.features.identity import FeatureDtype
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage, opened


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
    check_batch_size(batch_size)
    preprocessing = preprocessing or PreprocessingConfig()
    with ExitStack() as stack:
        slide = stack.enter_context(opened(slide))
        extraction = prepare_extraction(
            slide,
            patches_h5,
            out_h5,
            weights=weights,
            weights_fingerprint=weights_fingerprint,
            preprocessing=preprocessing,
            dtype=dtype,
            compile=compile,
            feature_dtype=feature_dtype,
            overwrite=overwrite,
        )
        stack.callback(extraction.close)
        if extraction.result is not None:
            return extraction.result
        stack.enter_context(evaluating(encoder))
        encode = BatchEncoder(
            encoder,
            preprocessing,
            torch.device(device),
            dtype,
            batch_size=batch_size,
            earlier_batch_size=extraction.earlier_batch_size,
            compile=compile,
        )
        extraction.encode(extraction.reader(encode, num_workers), encode, progress)
        return extraction.finish()
