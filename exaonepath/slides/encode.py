"""All stages of a slide: patches, patch features, embeddings; finished stages are kept and not computed again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from exaonepath.device import resolve_dtype
from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.memory_plan import parse_memory
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError, SlideOpenError
from exaonepath.files.patches import read_patches
from exaonepath.slides.embed import embed_features_file, finished_embedding, remove_patch_embeddings
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.features.identity import FeatureDtype, feature_identity
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.find import find_slides
from exaonepath.slides.image import SlideImage, opened
from exaonepath.slides.keep import Keep, check_keep, remove_features, wants_patch_embeddings
from exaonepath.slides.outputs import OutputPaths, output_paths
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.slides.patches.tissue import check_source

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
S = TypeVar("S")
T = TypeVar("T")

# The arguments of `patchfy` that decide the position of the patches.
_DERIVED = {"segmentation", "source", "reader"}
_FIELDS = {f.name for kind in (PatchSettings, SegmentationSettings) for f in fields(kind)} - _DERIVED
_SOURCES = {"segmenter", "mask", "mask_class", "exclude", "exclude_class", "remove", "geojson_origin"}


@dataclass(frozen=True)
class EncodeResult:
    """The result of `encode_slide`.

    Attributes:
        name: the slide's id.
        slide: the slide file.
        patches_path, features_path, embedding_path: the files of the three stages; the features may have been removed
            (`keep`).
        n_patches: patches with an embedding.
        n_failed: patches that could not be read (listed in the features file).
        no_patch: the reason why the slide has no patch, and its embedding is zero; empty if it has patches.
        reused: stages ("features", "slide") that were finished before and were left unchanged.
    """

    name: str
    slide: Path
    patches_path: Path
    features_path: Path
    embedding_path: Path
    n_patches: int
    n_failed: int
    reused: tuple[str, ...] = field(default=())
    no_patch: str = ""


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
    arguments = _patching(patching or {})
    if max_memory is not None:
        max_memory = parse_memory(max_memory)
    if isinstance(patch_encoder, str):
        patch_encoder = load_patch_encoder(patch_encoder, device="auto")
    if isinstance(slide_encoder, str):
        slide_encoder = load_slide_encoder(slide_encoder, device="auto")
    patch_embeddings = wants_patch_embeddings(check_keep(keep))
    with opened(slide, reader, arguments.pop("mpp", None), name) as image:
        paths = output_paths(out, image.name)
        patchfy(image, out, **arguments, overwrite=overwrite)
        features = feature_identity(
            image,
            read_patches(paths.patches),
            preprocessing=preprocessing or PreprocessingConfig(),
            weights_fingerprint=patch_encoder.fingerprint,
            dtype=resolve_dtype(dtype, patch_encoder.device),
            feature_dtype=feature_dtype,
        ).made_from
        slide_dtype = resolve_dtype(dtype, slide_encoder.device)
        finished = None
        if not overwrite and (keep == "slide" or (keep is None and not paths.features.exists())):
            finished = finished_embedding(
                paths.embedding, features, slide_encoder, dtype=slide_dtype, patch_embeddings=patch_embeddings
            )
        if finished is not None:
            image.check_unchanged()
            if keep == "slide":
                remove_patch_embeddings(paths.embedding)
                remove_features(paths, features.settings_hash)
            n_patches = int(finished["n_patches"])
            no_patch = "" if n_patches else why_no_patch(paths.patches)
            return _result(image, paths, n_patches, 0, ("features", "slide"), no_patch)
        extraction = extract_features(
            image,
            paths.patches,
            paths.features,
            patch_encoder.model,
            weights=patch_encoder.weights,
            weights_fingerprint=patch_encoder.fingerprint,
            preprocessing=preprocessing,
            batch_size=batch_size,
            num_workers=num_workers,
            device=patch_encoder.device,
            dtype=resolve_dtype(dtype, patch_encoder.device),
            compile=compile,
            feature_dtype=feature_dtype,
            progress=progress,
            overwrite=overwrite,
        )
        _, slide_reused = embed_features_file(
            paths.features,
            paths.embedding,
            slide_encoder,
            dtype=slide_dtype,
            max_memory=max_memory,
            patch_embeddings=patch_embeddings,
            patient=patient,
            overwrite=overwrite,
        )
        image.check_unchanged()
        if keep == "slide" and not extraction.failures:
            remove_features(paths, features.settings_hash)
    reused = tuple(stage for stage, done in (("features", extraction.reused), ("slide", slide_reused)) if done)
    no_patch = "" if extraction.n_features or extraction.failures else why_no_patch(paths.patches)
    return _result(image, paths, extraction.n_features, len(extraction.failures), reused, no_patch)


def _result(
    image: SlideImage, paths: OutputPaths, n_patches: int, n_failed: int, reused: tuple[str, ...], no_patch: str
) -> EncodeResult:
    return EncodeResult(
        image.name, image.path, paths.patches, paths.features, paths.embedding, n_patches, n_failed, reused, no_patch
    )


def why_no_patch(patches_path: str | os.PathLike[str]) -> str:
    """The reason why a slide has no patch, from its patches file; empty if it has patches."""
    patches = read_patches(patches_path)
    if len(patches):
        return ""
    return (patches.outcome and patches.outcome.no_patch) or "the reason is not stored (made by an earlier version)"


@dataclass(frozen=True)
class EncodeFailure:
    """A slide that `encode_slides` could not encode, and the error; `slide` is None if no slide file was found."""

    slide: Path | None
    error: Exception


def encode_slides(
    slides: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    patch_encoder: LoadedEncoder[ExaonePathPatchEncoderModel] | str = DEFAULT_WEIGHTS,
    slide_encoder: LoadedEncoder[ExaonePathSlideEncoderModel] | str = DEFAULT_WEIGHTS,
    **arguments: Any,
) -> Iterator[EncodeResult | EncodeFailure]:
    """Encode several slides, one after another; if one slide fails, the others are still encoded.

    Args:
        slides: a slide file or a folder of slides, or several of them.
        out: output folder, as for `encode_slide`.
        patch_encoder, slide_encoder: as for `encode_slide`; loaded once.
        arguments: the keyword arguments of `encode_slide`.

    Yields:
        The result or the failure of each slide, as soon as it is available. Paths that do not exist are yielded first.

    Raises:
        SlideOpenError: no slide was found.
        SettingsError: `patching` is wrong, or has one mask for several slides.
        OutputCollisionError: two slides would write the same files.
        WeightsError, DeviceError: the encoders cannot be loaded.
    """
    problems: list[SlideOpenError] = []
    files = find_slides([slides] if isinstance(slides, str | os.PathLike) else slides, problems)
    if not files:
        raise problems[0] if problems else SlideOpenError("no slide was named")
    patching = _patching(arguments.get("patching") or {})
    one_mask_per_slide(files, patching.get("mask"), patching.get("exclude"))
    if isinstance(patch_encoder, str):
        patch_encoder = load_patch_encoder(patch_encoder, device="auto")
    if isinstance(slide_encoder, str):
        slide_encoder = load_slide_encoder(slide_encoder, device="auto")
    for problem in problems:
        yield EncodeFailure(None, problem)
    for file, result in each_slide(
        files, lambda file: encode_slide(file, out, patch_encoder, slide_encoder, **arguments)
    ):
        yield EncodeFailure(file, result) if isinstance(result, Exception) else result


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


def one_mask_per_slide(slides: Sequence[Path], *given: str | os.PathLike[str] | None) -> None:
    """Raise `SettingsError` if one file of regions would be used for several slides."""
    for path in given:
        if path is not None and len(slides) > 1 and not Path(path).is_dir():
            raise SettingsError(
                f"{path} is one file for {len(slides)} slides; name a folder with a file for each slide"
            )


def _patching(arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = {*_FIELDS, *_SOURCES, "save_mask", "save_contours", "line_thickness", "strict_scale"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise SettingsError(f"patching: {', '.join(unknown)} cannot be set here; known: {', '.join(sorted(known))}")
    check_source(**{name: value for name, value in arguments.items() if name in _SOURCES})
    if "patch_size" in arguments and "step_size" not in arguments:
        return {**arguments, "step_size": arguments["patch_size"]}
    return dict(arguments)
