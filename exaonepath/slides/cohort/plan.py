"""What a run on a cohort would do: every slide is opened, its tissue is found, and nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from exaonepath.errors import DataFileError, ExaonePathError, FileBusyError
from exaonepath.files.artifact import canonical_json, settings_hash
from exaonepath.files.patches import read_patches
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.slide_settings import patching_of
from exaonepath.slides.cohort.state import Expected, SlideState, slide_state
from exaonepath.slides.features.identity import FeatureDtype
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage
from exaonepath.slides.keep import Keep
from exaonepath.slides.outputs import OutputPaths, output_paths
from exaonepath.slides.patches.picture import LONGEST_SIDE
from exaonepath.slides.patches.pipeline import PatchSettings, plan_grid, planned_settings
from exaonepath.slides.patches.shrinking import WANTED_DOWNSAMPLE
from exaonepath.slides.patches.tissue import find_tissue

FORMAT = 1  # of `as_json`

# Estimates in bytes, measured on the slides of docs/cohorts.md; HDF5's own structures are included.
_WIDTH, _SLIDE_WIDTH = 768, 1536
_PER_PATCH, _PATCHES_FILE, _FEATURES_FILE, _EMBEDDING_FILE = 12, 20_000, 25_000, 20_000
_PICTURE_PER_PIXEL = 0.2
_MOST_SEGMENTED = 1 << 24  # pixels; a larger level (of a flat slide) is not segmented only to count patches

PatchesFrom = Literal["file", "segmentation", "area", ""]


@dataclass(frozen=True)
class PlanSettings:
    """The settings of the run, as far as they decide what is planned.

    Attributes:
        patching: keyword arguments of `patchfy`.
        reader: how slides are read.
        weights: of slides without weights of their own.
        preprocessing: of the patch encoder.
        dtype: of both encoders.
        feature_dtype, keep: see `encode_slide`.
        overwrite: finished slides are computed again.
    """

    patching: Mapping[str, Any] = field(default_factory=dict)
    reader: str = "auto"
    weights: str = ""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    dtype: torch.dtype = torch.float32
    feature_dtype: FeatureDtype = "float32"
    keep: Keep | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class PlannedSlide:
    """What is known of a slide before it is encoded.

    Attributes:
        slide: the slide.
        error: why it cannot be encoded; the other values are then not known.
        format: what kind of file it is, as its reader states it.
        reader: name of the reader.
        size: (width, height) of level 0 in pixels.
        mpp, mpp_source: micrometres per pixel, and what states them.
        doubts: reasons to doubt the pixel size.
        n_patches: patches to be encoded, or encoded already.
        patches_from: "file" (counted), "segmentation" (counted by finding the tissue), or "area" (the whole slide, an
            upper limit, for slides whose tissue takes long to find).
        state: see `exaonepath.slides.cohort.state`.
        disk_bytes: bytes of its files when it is finished; those on disk, or an estimate.
        stored_bytes: bytes of its files now.
        peak_bytes: estimated bytes that its files take at most while it is worked on.
    """

    slide: CohortSlide
    error: str = ""
    format: str = ""
    reader: str = ""
    size: tuple[int, int] | None = None
    mpp: float | None = None
    mpp_source: str = ""
    doubts: tuple[str, ...] = ()
    n_patches: int | None = None
    patches_from: PatchesFrom = ""
    state: SlideState | None = None
    disk_bytes: int = 0
    stored_bytes: int = 0
    peak_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "id": self.slide.id,
            "path": str(self.slide.path),
            "patient": self.slide.patient,
            "error": self.error,
            "format": self.format,
            "reader": self.reader,
            "width": self.size and self.size[0],
            "height": self.size and self.size[1],
            "mpp": self.mpp,
            "mpp_source": self.mpp_source,
            "doubts": list(self.doubts),
            "patches": self.n_patches,
            "patches_from": self.patches_from,
            "state": self.state and self.state.state,
            "reason": self.state.reason if self.state else "",
            "disk_bytes": self.disk_bytes,
            "stored_bytes": self.stored_bytes,
        }


def plan_cohort(
    slides: Sequence[CohortSlide], out: str | os.PathLike[str], settings: PlanSettings, threads: int | None = None
) -> Iterator[PlannedSlide]:
    """Plan every slide, in order; a slide that cannot be opened is a row with its error.

    Args:
        slides: the slides.
        out: the output folder, which need not exist.
        settings: of the run.
        threads: slides that are looked at together; None: one per core.
    """
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="exaonepath-plan") as pool:
        futures = [pool.submit(plan_slide, slide, out, settings) for slide in slides]
        try:
            for at in range(len(futures)):
                yield futures[at].result()
        finally:
            pool.shutdown(cancel_futures=True)


def plan_slide(slide: CohortSlide, out: str | os.PathLike[str], settings: PlanSettings) -> PlannedSlide:
    """Look at one slide."""
    try:
        return _planned(slide, Path(out), settings)
    except ExaonePathError as exc:
        return PlannedSlide(slide, error="; ".join(exc.lines))
    except (OSError, MemoryError, ValueError, RuntimeError) as exc:  # damaged files make libraries raise these
        return PlannedSlide(slide, error=f"{slide.path}: unexpected {type(exc).__name__}: {' '.join(str(exc).split())}")


def needed_bytes(planned: Sequence[PlannedSlide]) -> int:
    """Bytes that the run will add to the disk at most, with the files of the largest slide while it is worked on."""
    final = sum(max(0, one.disk_bytes - one.stored_bytes) for one in planned)
    return final + max((max(0, one.peak_bytes - one.disk_bytes) for one in planned), default=0)


def free_bytes(out: str | os.PathLike[str]) -> int | None:
    """Free bytes of the disk on which the output folder is, or will be; None if that is not known."""
    path = Path(out).absolute()
    while not path.exists() and path.parent != path:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _planned(slide: CohortSlide, out: Path, settings: PlanSettings) -> PlannedSlide:
    patching = patching_of(slide, settings.patching)
    with SlideImage(slide.path, settings.reader, patching.get("mpp"), slide.id) as image:
        patch_settings = planned_settings(image, patching)
        dtype = str(settings.dtype).removeprefix("torch.")
        expected = Expected(
            image.fingerprint(),
            str(image.path.resolve()),
            settings_hash(patch_settings.as_json()),
            {
                "weights": slide.weights or settings.weights,
                "dtype": dtype,
                "features_computed_in": dtype,
                "preprocessing": canonical_json(settings.preprocessing.to_dict()),
                "feature_dtype": settings.feature_dtype,
            },
            features_wanted=settings.keep in ("features", "all"),
            patch_embeddings_wanted=settings.keep == "all",
        )
        state = slide_state(out, slide.id, expected)
        if settings.overwrite and state.state in ("finished", "empty"):
            state = SlideState(slide.id, "stale", "it is to be computed again (--overwrite)", state.slide)
        paths = output_paths(out, slide.id)
        count, counted = _count(image, patch_settings, paths, expected)
        picture = _picture_pixels(image)
        final, peak = _estimate(count, picture, settings)
        now = sum(_size(path) for path in vars(paths).values())
        if state.state in ("finished", "empty"):  # at most something is removed
            final, peak = now if settings.keep is None else min(final, now), now
        return PlannedSlide(
            slide,
            format=image.properties.get("openslide.vendor") or image.reader,
            reader=image.reader,
            size=image.dimensions,
            mpp=image.mpp,
            mpp_source=image.mpp_source,
            doubts=image.scale_doubts,
            n_patches=count,
            patches_from=counted,
            state=state,
            disk_bytes=final,
            stored_bytes=now,
            peak_bytes=peak,
        )


def _count(
    image: SlideImage, settings: PatchSettings, paths: OutputPaths, expected: Expected
) -> tuple[int, PatchesFrom]:
    """The number of patches, and where it is from."""
    if paths.patches.exists():
        with suppress(DataFileError, FileBusyError):  # otherwise they are counted as if there were no file
            stored = read_patches(paths.patches)
            if (stored.slide_fingerprint, stored.settings_hash) == (expected.slide_fingerprint, expected.patches_hash):
                return len(stored), "file"
    level = image.get_best_level_for_downsample(WANTED_DOWNSAMPLE)
    width, height = image.level_dimensions[level]
    if width * height <= _MOST_SEGMENTED or settings.source.mask is not None:
        tissue = find_tissue(image, settings.segmentation, settings.source)
        return len(plan_grid(image, tissue, settings).coords), "segmentation"
    _, step = settings.effective(image)
    width, height = image.dimensions
    return -(-width // step) * -(-height // step), "area"


def _estimate(n_patches: int, picture: int, settings: PlanSettings) -> tuple[int, int]:
    """(bytes of the files that remain, bytes that the files take at most meanwhile)."""
    small = _PATCHES_FILE + _PER_PATCH * n_patches + int(_PICTURE_PER_PIXEL * picture)
    width = _WIDTH * (2 if settings.feature_dtype == "float16" else 4)
    features = _FEATURES_FILE + n_patches * (width + _PER_PATCH)
    embedding = _EMBEDDING_FILE + n_patches * _PER_PATCH
    if settings.keep in (None, "all"):
        embedding += n_patches * _SLIDE_WIDTH * 4
    kept = small + embedding + (0 if settings.keep == "slide" else features)
    # The features are in the unfinished file and in the finished one for a moment.
    return kept, max(small + 2 * features, small + features + embedding)


def _picture_pixels(image: SlideImage) -> int:
    width, height = image.level_dimensions[image.get_best_level_for_downsample(WANTED_DOWNSAMPLE)]
    shrink = max(1.0, max(width, height) / LONGEST_SIDE)
    return int(width / shrink * height / shrink)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
