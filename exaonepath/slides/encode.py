"""All stages of one slide: patches, patch features, embeddings; finished stages are kept and not computed again."""

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
from exaonepath.errors import OutputCollisionError, SettingsError, SlideOpenError
from exaonepath.files.patches import read_patches
from exaonepath.slides.dicom import is_dicom, series_identity
from exaonepath.slides.embed import embed_features_file
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage, opened, slide_id
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.slides.patches.tissue import check_source

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
T = TypeVar("T")

# The arguments of `patchfy` that decide the position of the patches.
_DERIVED = {"segmentation", "source", "reader"}
_FIELDS = {f.name for kind in (PatchSettings, SegmentationSettings) for f in fields(kind)} - _DERIVED
_SOURCES = {"segmenter", "mask", "mask_class", "exclude", "exclude_class", "remove", "geojson_origin"}

SLIDE_SUFFIXES = frozenset(
    {
        ".svs",
        ".tif",
        ".tiff",
        ".btf",
        ".tf2",
        ".tf8",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".bif",
        ".vms",
        ".vmu",
        ".svslide",
        ".dcm",
        ".czi",
    }
)
_OTHER_FORMATS = frozenset({".qptiff", ".vsi", ".isyntax", ".lif", ".nd2", ".oir", ".zvi", ".afi", ".ndpis", ".jp2"})
_UNFINISHED = frozenset({".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download", ".aria2"})
_PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip"})
_MAX_ENTRIES = 20_000  # entries of a folder tree that are searched at most


@dataclass(frozen=True)
class OutputPaths:
    """Paths of the files of one slide in one output folder."""

    patches: Path
    features: Path
    embedding: Path


@dataclass(frozen=True)
class EncodeResult:
    """The result of `encode_slide`.

    Attributes:
        name: the slide's id, its file stem.
        slide: the slide file.
        patches_path, features_path, embedding_path: the files of the three stages.
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


def output_paths(out: str | os.PathLike[str], name: str) -> OutputPaths:
    """Paths of the files of the slide with this id in the output folder `out`."""
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
    batch_size: int | Literal["auto"] = 32,
    num_workers: int | None = None,
    dtype: str | torch.dtype = "auto",
    compile: bool = False,
    max_memory: int | str | None = None,
    reader: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EncodeResult:
    """Encode a slide file to a slide embedding; stages that an earlier run finished are not computed again.

    Args:
        slide: slide file, or an open slide (which stays open).
        out: output folder: `patches/<id>.h5`, `patches/<id>_features.h5`, `embeddings/<id>.h5`, `masks/<id>.jpg`,
            `contours/<id>.geojson`.
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
    with opened(slide, reader, arguments.pop("mpp", None)) as image:
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
            compile=compile,
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
        image.check_unchanged()
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
        "" if extraction.n_features or extraction.failures else why_no_patch(paths.patches),
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


def each_slide(files: Iterable[Path], work: Callable[[Path], T]) -> Iterator[tuple[Path, T | Exception]]:
    """Apply `work` to one slide after another; yields its result or the error that it raised.

    Any error of one slide, `MemoryError` included, affects only this slide, because a damaged file can make a library
    raise any error. Only exceptions that end the program (`KeyboardInterrupt`, `SystemExit`) are passed on.
    """
    for file in files:
        try:
            result: T | Exception = work(file)
        except Exception as exc:  # noqa: BLE001
            result = exc
        yield file, result
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


def find_slides(paths: Iterable[str | os.PathLike[str]], problems: list[SlideOpenError] | None = None) -> list[Path]:
    """Slide files for the paths of a command line; a folder is replaced by the slides directly in it, in name order.

    Slides are recognised by their suffixes; DICOM files with no suffix, ".dicom" or a number, by their content.

    Args:
        paths: files and folders.
        problems: if given, the error for a missing path, a broken link or an empty folder is appended, not raised.

    Raises:
        SlideOpenError: a path does not exist, or a folder contains no slide.
        OutputCollisionError: two slides would write the same files.
    """
    slides: list[Path] = []
    problems_here: list[SlideOpenError] = [] if problems is None else problems
    for path in map(Path, paths):
        try:
            exists, folder = path.exists(), path.is_dir()
        except PermissionError:
            problems_here.append(SlideOpenError(f"{path} may not be read (permission denied)"))
            continue
        if folder:
            slides += _slides_in(path, problems_here)
        elif exists:
            slides.append(path)
        else:
            problems_here.append(SlideOpenError(f"{path}: no such file"))
    if problems is None and problems_here:
        raise problems_here[0]
    slides = _one_per_series(slides)
    by_stem: dict[str, Path] = {}
    for slide in slides:
        first = by_stem.setdefault(slide_id(slide), slide)
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


def _slides_in(folder: Path, problems: list[SlideOpenError]) -> list[Path]:
    """Slide files directly in a folder, in name order; a skipped file is logged or appended to `problems`."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as exc:
        problems.append(SlideOpenError(f"{folder} cannot be listed: {exc.strerror}"))
        return []
    slides: list[Path] = []
    broken: list[Path] = []
    similar: dict[str, list[Path]] = {}
    for entry in entries:
        if entry.is_dir():
            continue
        if not _looks_like_a_slide(entry):
            kind = _kind_of_similar_name(entry)
            if kind is not None:
                similar.setdefault(kind, []).append(entry)
        elif entry.name.startswith("."):
            # macOS adds "._slide.svs" on a foreign disk; it contains attributes of the file and is not a slide.
            logger.warning("%s is a hidden file and is skipped", entry)
        elif entry.is_symlink() and not entry.exists():
            broken.append(entry)
        else:
            slides.append(entry)
    problems += [SlideOpenError(f"{path} is a link to a file that does not exist") for path in broken]
    for kind, files in sorted(similar.items()):
        logger.warning("%s has %d %s, such as %s, which are skipped", folder, len(files), kind, files[0])
    deeper, more = _deeper_slides(folder)
    if deeper:
        logger.warning(
            "%s has folders with %d more slide files%s, such as %s, which are skipped: name those folders as well",
            folder,
            len(deeper),
            " or more" if more else "",
            deeper[0],
        )
    if not slides and not broken:
        problems.append(SlideOpenError(f"{folder} holds no slide file ({', '.join(sorted(SLIDE_SUFFIXES))})"))
    return slides


def _deeper_slides(folder: Path) -> tuple[list[Path], bool]:
    """Slide files in the subfolders of a folder, at any depth, without hidden ones; and whether the search was cut off.

    Links to folders are not followed, and the time is bounded for a tree of any size.
    """
    found: list[Path] = []
    entries = 0
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        entries += len(files) + len(folders)
        if Path(where) != folder:
            paths = (Path(where, name) for name in sorted(files) if not name.startswith("."))
            found += [path for path in paths if _looks_like_a_slide(path)]
        if entries > _MAX_ENTRIES:
            return found, True
    return found, False


def _looks_like_a_slide(path: Path) -> bool:
    """Whether the name is that of a slide; if the name does not show it (often so for DICOM), the content decides."""
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return not path.is_dir()
    return (suffix in ("", ".dicom") or suffix[1:].isdecimal()) and is_dicom(path, whole_slide=True)


def _kind_of_similar_name(path: Path) -> str | None:
    """The kind of a file that a user may take for a slide but that is not searched for; None for other files."""
    suffix, before = path.suffix.lower(), Path(path.stem).suffix.lower()
    if path.name.startswith("."):
        return None
    if suffix in _OTHER_FORMATS:
        return f"{suffix} files (not known as slides; name one to try it)"
    if suffix in _UNFINISHED and before in SLIDE_SUFFIXES:
        return f"{before}{suffix} files (unfinished copies, by their name)"
    if suffix in _PACKED and before in SLIDE_SUFFIXES:
        return f"{before}{suffix} files (compressed; unpack them first)"
    return None


def _one_per_series(slides: list[Path]) -> list[Path]:
    """One file of each DICOM series: the largest, which contains level 0. OpenSlide finds the others from it."""
    series: dict[tuple[Path, str], list[Path]] = {}
    keys: dict[Path, tuple[Path, str]] = {}
    for slide in slides:
        uid = series_identity(slide)
        if uid is not None:
            keys[slide] = (slide.parent.resolve(), uid)
            series.setdefault(keys[slide], []).append(slide)
    chosen = {key: max(sorted(files), key=lambda f: f.stat().st_size) for key, files in series.items()}
    for key, files in series.items():
        if len(files) > 1:
            logger.info("%s stands for a DICOM series of %d files", chosen[key], len(files))
    return [slide for slide in slides if slide not in keys or chosen[keys[slide]] == slide]
