"""All stages of one slide: patches, patch features, embeddings; each finished stage is kept and not redone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exaonepath.errors import OutputCollisionError, SettingsError, SlideOpenError
from exaonepath.feature_extraction.extract import extract_features
from exaonepath.feature_extraction.preprocessing import PreprocessingConfig
from exaonepath.models.device import resolve_dtype
from exaonepath.models.loading import DEFAULT_WEIGHTS, LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.models.memory_plan import parse_memory
from exaonepath.models.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.models.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.patches import SlideImage, patchfy
from exaonepath.patches.slide import opened
from exaonepath.slide_embedding import SlideEmbedding, embed_features_file, read_embedding

__all__ = ["EncodeResult", "SlideEmbedding", "encode_slide", "find_slides", "output_paths", "read_embedding"]

Progress = Callable[[int, int], None]

SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi"}
)


@dataclass(frozen=True)
class OutputPaths:
    """Where the files of one slide go, under one output folder."""

    patches: Path
    features: Path
    embedding: Path


@dataclass(frozen=True)
class EncodeResult:
    """What `encode_slide` made.

    Attributes:
        name: the slide's id, its file stem.
        slide: the slide file.
        patches_path, features_path, embedding_path: the files of the three stages.
        n_patches: patches with an embedding.
        n_failed: patches that could not be read (listed in the features file).
        reused: stages that were finished before and left alone, of "features" and "slide".
    """

    name: str
    slide: Path
    patches_path: Path
    features_path: Path
    embedding_path: Path
    n_patches: int
    n_failed: int
    reused: tuple[str, ...] = field(default=())


def output_paths(out: str | os.PathLike[str], name: str) -> OutputPaths:
    """The files of the slide with this id under the output folder `out`."""
    root = Path(out)
    return OutputPaths(
        root / "patches" / f"{name}.h5", root / "patches" / f"{name}_features.h5", root / "embeddings" / f"{name}.h5"
    )


def encode_slide(
    slide: str | os.PathLike[str] | SlideImage,
    out: str | os.PathLike[str],
    patch_encoder: LoadedEncoder[ExaonePathPatchEncoderModel] | str = DEFAULT_WEIGHTS,
    slide_encoder: LoadedEncoder[ExaonePathSlideEncoderModel] | str = DEFAULT_WEIGHTS,
    *,
    patching: Mapping[str, Any] | None = None,
    preprocessing: PreprocessingConfig | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    dtype: str | torch.dtype = "auto",
    max_memory: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EncodeResult:
    """Slide file to slide embedding, resuming from whatever an earlier run finished.

    Args:
        slide: slide file, or an open slide (which stays open).
        out: output folder: `patches/<id>.h5`, `patches/<id>_features.h5`, `embeddings/<id>.h5`, `masks/<id>.jpg`.
        patch_encoder, slide_encoder: from `exaonepath.models.loading`, or what to load (a Hub id, a directory,
            "random:SEED"); load them yourself to encode many slides.
        patching: keyword arguments of `patchfy` (patch_size, step_size, ...); without step_size, patches touch.
        preprocessing: resize, crop, mean and std of the patch encoder.
        batch_size: patches in one call of the patch encoder.
        num_workers: reading threads; None: one per core.
        dtype: of both encoders; "auto": bfloat16 autocast on CUDA, float32 elsewhere.
        max_memory: what the slide encoder may use on its device (see `embed_slide`); None: what is free.
        overwrite: redo every stage.
        progress: called with (patches done, patches in all) during feature extraction.

    Raises:
        SettingsError: an unknown key in `patching`, or a `max_memory` that is no amount of memory.
        ExaonePathError: see `patchfy`, `extract_features` and `embed_features_file`. Finished stages are kept.
    """
    arguments = _patching(patching or {})
    if max_memory is not None:
        max_memory = parse_memory(max_memory)
    if isinstance(patch_encoder, str):
        patch_encoder = load_patch_encoder(patch_encoder, device="auto")
    if isinstance(slide_encoder, str):
        slide_encoder = load_slide_encoder(slide_encoder, device="auto")
    with opened(slide) as image:
        paths = output_paths(out, image.name)
        patchfy(image, out, **arguments, overwrite=overwrite)
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
            progress=progress,
            overwrite=overwrite,
        )
        _, slide_reused = embed_features_file(
            paths.features,
            paths.embedding,
            slide_encoder,
            dtype=resolve_dtype(dtype, slide_encoder.device),
            max_memory=max_memory,
            overwrite=overwrite,
        )
    reused = [name for name, done in (("features", extraction.reused), ("slide", slide_reused)) if done]
    return EncodeResult(
        image.name,
        image.path,
        paths.patches,
        paths.features,
        paths.embedding,
        extraction.n_features,
        len(extraction.failures),
        tuple(reused),
    )


def _patching(arguments: Mapping[str, Any]) -> dict[str, Any]:
    allowed = set(inspect.signature(patchfy).parameters) - {"wsi", "out", "save_h5", "auto_skip", "overwrite"}
    unknown = sorted(set(arguments) - allowed)
    if unknown:
        raise SettingsError(f"patching: {', '.join(unknown)} cannot be set here; known: {', '.join(sorted(allowed))}")
    if "patch_size" in arguments and "step_size" not in arguments:
        return {**arguments, "step_size": arguments["patch_size"]}
    return dict(arguments)


def find_slides(paths: Iterable[str | os.PathLike[str]], problems: list[SlideOpenError] | None = None) -> list[Path]:
    """Slide files named on a command line; a folder stands for the slides directly inside it, in name order.

    Args:
        paths: files and folders.
        problems: where given, a missing path or an empty folder is put here instead of being raised.

    Raises:
        SlideOpenError: a path does not exist, or a folder holds no slide.
        OutputCollisionError: two slides would write the same files.
    """
    slides: list[Path] = []
    problems_here: list[SlideOpenError] = [] if problems is None else problems
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES and p.is_file())
            if not inside:
                problems_here.append(
                    SlideOpenError(f"{path} holds no slide file ({', '.join(sorted(SLIDE_SUFFIXES))})")
                )
            slides += inside
        elif path.exists():
            slides.append(path)
        else:
            problems_here.append(SlideOpenError(f"{path}: no such file"))
    if problems is None and problems_here:
        raise problems_here[0]
    by_stem: dict[str, Path] = {}
    for slide in slides:
        first = by_stem.setdefault(slide.stem, slide)
        if first is not slide and first.resolve() != slide.resolve():
            raise OutputCollisionError(
                f"{first} and {slide} have one stem and would write the same files; rename one, or encode "
                "them into different output folders"
            )
    for stem, slide in by_stem.items():
        other = by_stem.get(f"{stem}_features")
        if other is not None:
            raise OutputCollisionError(
                f"the features of {slide} and the patches of {other} would be one file; rename one, or encode "
                "them into different output folders"
            )
    return list(by_stem.values())
