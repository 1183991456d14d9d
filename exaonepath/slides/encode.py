"""All stages of a slide: patches, patch features, embeddings; finished stages are kept and not computed again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Literal, TypeVar

import torch

from exaonepath.device import evaluating
from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.slides.features.identity import FeatureDtype
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage, opened
from exaonepath.slides.keep import Keep
from exaonepath.slides.stages import EncodeResult as EncodeResult
from exaonepath.slides.stages import EncodeSettings, Progress, SlideStages, batch_encoder, check_tissue_source

S = TypeVar("S")
T = TypeVar("T")


def encode_slide(
    slide: str | os.PathLike[str] | SlideImage,
    out: str | os.PathLike[str],
    patch_encoder: LoadedEncoder[ExaonePathPatchEncoderModel] | str = DEFAULT_WEIGHTS,
    slide_encoder: LoadedEncoder[ExaonePathSlideEncoderModel] | str = DEFAULT_WEIGHTS,
    *,
    patching: Mapping[str, Any] | None = None,
    preprocessing: PreprocessingConfig | None = None,
    batch_size: int | Literal["auto"] = 32,
    num_workers: int | None = None,
    dtype: str | torch.dtype = "auto",
    compile: bool = False,
    max_memory: int | str | None = None,
    reader: str = "auto",
    name: str | None = None,
    patient: str | None = None,
    feature_dtype: FeatureDtype = "float32",
    keep: Keep | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EncodeResult:
    """Encode a slide file to a slide embedding; stages that an earlier run finished are not computed again.

    Args:
        slide: slide file, or an open slide (which stays open).
        out: output folder: `patches/<id>.h5`, `patches/<id>_features.h5`, `embeddings/<id>.h5`, `masks/<id>.jpg`,
            `contours/<id>.geojson`; or in deeper folders (see `exaonepath.slides.outputs`).
        patch_encoder, slide_encoder: from `exaonepath.encoders.loading`, or the weights to load (a Hub id, a directory,
            "random:SEED"); to encode many slides, load the encoders once and pass them.
        patching: keyword arguments of `patchfy` (patch_size, step_size, ...); without step_size, patches are adjacent.
        preprocessing: resize, crop, mean and std of the patch encoder.
        batch_size: patches in one call of the patch encoder, or "auto" (see `extract_features`).
        num_workers: reading threads; None: one per core.
        dtype: of both encoders; "auto": bfloat16 on CUDA, float32 elsewhere.
        compile: run the patch encoder through `torch.compile` (once per loaded encoder).
        max_memory: memory that the slide encoder may use on its device (see `embed_slide`); None: the free memory.
        reader: how the slide file is read (see `SlideImage`); an open slide keeps its reader.
        name: the id of the slide; None: its file stem. An open slide has one already.
        patient: the patient whom the slide is of; stored with the embedding.
        feature_dtype: how features are stored (see `extract_features`); embeddings are computed from the stored values.
        keep: what remains when the slide is finished, apart from the small files: "slide", the slide embedding;
            "features", also the features; "all", also the patch embeddings. What is missing of it is computed. None: as
            "all" for what is computed now; a finished slide is left as it is. Features of a slide with unreadable
            patches always remain, since those patches are tried again.
        overwrite: compute every stage again.
        progress: called with (patches done, total patches) during feature extraction.

    Raises:
        SettingsError: `patching` has an unknown key, or `max_memory` is not an amount of memory.
        ExaonePathError: see `patchfy`, `extract_features` and `embed_features_file`. Finished stages are kept.
    """
    settings = EncodeSettings(
        patching=patching or {},
        preprocessing=preprocessing or PreprocessingConfig(),
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        compile=compile,
        max_memory=max_memory,
        reader=reader,
        feature_dtype=feature_dtype,
        keep=keep,
        overwrite=overwrite,
    )
    check_tissue_source(settings.patching)
    if isinstance(patch_encoder, str):
        patch_encoder = load_patch_encoder(patch_encoder, device="auto")
    if isinstance(slide_encoder, str):
        slide_encoder = load_slide_encoder(slide_encoder, device="auto")
    with (
        opened(slide, reader, settings.patching.get("mpp"), name) as image,
        closing(SlideStages(image, out, patch_encoder, slide_encoder, settings, patient=patient)) as stages,
    ):
        stages.find_patches()
        if stages.prepare():
            assert stages.extraction is not None
            with evaluating(patch_encoder.model):
                encoder = batch_encoder(patch_encoder, settings, stages.extraction.earlier_batch_size)
                stages.encode(stages.reader(encoder), encoder, progress)
        stages.write_features()
        return stages.embed()


def each_slide(slides: Iterable[S], work: Callable[[S], T]) -> Iterator[tuple[S, T | Exception]]:
    """Apply `work` to one slide after another; yields its result or the error that it raised.

    Any error of one slide, `MemoryError` included, affects only this slide, because a damaged file can make a library
    raise any error. Only exceptions that end the program (`KeyboardInterrupt`, `SystemExit`) are passed on.
    """
    for slide in slides:
        try:
            result: T | Exception = work(slide)
        except Exception as exc:  # noqa: BLE001
            result = exc
        yield slide, result
        if isinstance(result, Exception):
            # The traceback refers to the frames of the failed call and so keeps their arrays in memory.
            result.__traceback__ = None
