"""The stages of one slide as separate steps, so that those of several slides can overlap.

`encode_slide` runs them one after another. The engine of a cohort prepares slide t + 1 while slide t is encoded and
slide t - 1 is finished; the files are the same, bit for bit.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from exaonepath.device import resolve_dtype
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.encoders.memory_plan import parse_memory
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.patches import read_patches
from exaonepath.slides.embed import embed_features_file, finished_embedding, remove_patch_embeddings
from exaonepath.slides.features.batch_size import check_batch_size
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.extraction import (
    Extraction,
    ExtractionResult,
    ImageEncoder,
    prepare_extraction,
    remove_partial_files,
)
from exaonepath.slides.features.identity import FeatureDtype, check_feature_dtype, feature_identity
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchBatch, PatchReader
from exaonepath.slides.image import SlideImage
from exaonepath.slides.keep import Keep, check_keep, remove_features, wants_patch_embeddings
from exaonepath.slides.outputs import OutputPaths, output_paths
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.slides.patches.tissue import check_source
from exaonepath.version import __version__

Progress = Callable[[int, int], None]

# The arguments of `patchfy` that decide the position of the patches.
_DERIVED = {"segmentation", "source", "reader"}
_FIELDS = {f.name for kind in (PatchSettings, SegmentationSettings) for f in fields(kind)} - _DERIVED
_SOURCES = {"segmenter", "mask", "mask_class", "exclude", "exclude_class", "remove", "geojson_origin"}


@dataclass(frozen=True)
class EncodeSettings:
    """The arguments of `encode_slide` that are the same for every slide of a run; checked when they are made.

    Raises:
        SettingsError: a value cannot be used.
    """

    patching: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    batch_size: int | Literal["auto"] = 32
    num_workers: int | None = None
    dtype: str | torch.dtype = "auto"
    compile: bool = False
    max_memory: int | str | None = None
    reader: str = "auto"
    feature_dtype: FeatureDtype = "float32"
    keep: Keep | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "patching": checked_patching(self.patching or {}),
            "preprocessing": self.preprocessing or PreprocessingConfig(),
            "max_memory": None if self.max_memory is None else parse_memory(self.max_memory),
            "keep": check_keep(self.keep),
            "feature_dtype": check_feature_dtype(self.feature_dtype),
        }
        check_batch_size(self.batch_size)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


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


def batch_encoder(
    loaded: LoadedEncoder[ExaonePathPatchEncoderModel],
    settings: EncodeSettings,
    earlier_batch_size: int | None = None,
) -> BatchEncoder:
    """What encodes batches with a patch encoder, which has to be in evaluation mode while it is used."""
    return BatchEncoder(
        loaded.model,
        settings.preprocessing,
        loaded.device,
        resolve_dtype(settings.dtype, loaded.device),
        batch_size=settings.batch_size,
        earlier_batch_size=earlier_batch_size,
        compile=settings.compile,
    )


class SlideStages:
    """The stages of one slide. The methods are called in their order; each may run in another thread.

    Args:
        image: the open slide, which stays open.
        out: output folder.
        patch_encoder, slide_encoder: the encoders.
        settings: see `EncodeSettings`.
        patient: the patient whom the slide is of; stored.
        token: of this process's claim on the slide (see `prepare_extraction`); empty: there are no claims.
        overwrite: whether a stage computes its file again; default: as the settings say.
        unwanted: names of partial files of earlier owners that are not continued.
        check: called before anything is published; it raises an error if the claim was lost.

    Attributes:
        paths: the files of the slide.
        request: see `request_hash`.
        extraction: the extraction of the features, after `prepare`; None if not even the features are needed.
    """

    def __init__(
        self,
        image: SlideImage,
        out: str | os.PathLike[str],
        patch_encoder: LoadedEncoder[ExaonePathPatchEncoderModel],
        slide_encoder: LoadedEncoder[ExaonePathSlideEncoderModel],
        settings: EncodeSettings,
        *,
        patient: str | None = None,
        token: str = "",
        overwrite: Callable[[Path], bool] | None = None,
        unwanted: Collection[str] = (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.image, self.settings = image, settings
        self.paths: OutputPaths = output_paths(out, image.name)
        self.extraction: Extraction | None = None
        self._out, self._patient, self._token, self._unwanted = out, patient, token, unwanted
        self._patch_encoder, self._slide_encoder, self._check = patch_encoder, slide_encoder, check
        self._overwrite = (lambda path: settings.overwrite) if overwrite is None else overwrite
        self.request = request_hash(settings, patch_encoder, slide_encoder, patient)
        self._finished: EncodeResult | None = None
        self._features_key = ""
        self._extracted: ExtractionResult | None = None

    def find_patches(self) -> int:
        """Compute the patches, or take the stored ones; returns their number."""
        return find_patches(self.image, self._out, self.settings.patching, self._overwrite(self.paths.patches))

    @property
    def overwrites_patches(self) -> bool:
        """Whether `find_patches` computes them again, whatever is stored."""
        return self._overwrite(self.paths.patches)

    def prepare(self) -> bool:
        """Look up what is stored of the features and the embedding; False if no patch is to be encoded."""
        settings = self.settings
        dtype = resolve_dtype(settings.dtype, self._patch_encoder.device)
        patches = read_patches(self.paths.patches)
        features = feature_identity(
            self.image,
            patches,
            preprocessing=settings.preprocessing,
            weights_fingerprint=self._patch_encoder.fingerprint,
            dtype=dtype,
            feature_dtype=settings.feature_dtype,
        ).made_from
        self._features_key = features.settings_hash
        overwrite = self._overwrite(self.paths.features)
        without_features = settings.keep == "slide" or (settings.keep is None and not self.paths.features.exists())
        if without_features and not overwrite and not self._overwrite(self.paths.embedding):
            finished = finished_embedding(
                self.paths.embedding,
                features,
                self._slide_encoder,
                dtype=resolve_dtype(settings.dtype, self._slide_encoder.device),
                patch_embeddings=wants_patch_embeddings(settings.keep),
            )
            if finished is not None:
                self._finished = self._result(int(finished["n_patches"]), 0, ("features", "slide"))
                return False
        self.extraction = prepare_extraction(
            self.image,
            self.paths.patches,
            self.paths.features,
            weights=self._patch_encoder.weights,
            weights_fingerprint=self._patch_encoder.fingerprint,
            preprocessing=settings.preprocessing,
            dtype=dtype,
            compile=settings.compile,
            feature_dtype=settings.feature_dtype,
            overwrite=overwrite,
            token=self._token,
            unwanted=self._unwanted,
            patches=patches,
        )
        return self.extraction.result is None

    def reader(self, encoder: ImageEncoder) -> PatchReader:
        """A reader of the patches that are to be encoded."""
        assert self.extraction is not None
        return self.extraction.reader(encoder, self.settings.num_workers)

    def encode(
        self,
        batches: Iterable[PatchBatch],
        encoder: ImageEncoder,
        progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode and store the patches (see `Extraction.encode`); only if `prepare` returned True."""
        assert self.extraction is not None
        self.extraction.encode(batches, encoder, progress, check)

    def write_features(self) -> ExtractionResult | None:
        """Write the features; None if they are not needed, since the embedding is finished."""
        if self.extraction is None:
            return None
        self._check()
        self._extracted = self.extraction.finish()
        return self._extracted

    def embed(self) -> EncodeResult:
        """Compute the embedding and write it, and remove what is not to be kept."""
        settings, paths = self.settings, self.paths
        self._check()
        if self._finished is not None:
            self.image.check_unchanged()
            remove_partial_files(paths.features, self._token)  # of a run that was to compute it again, and was killed
            if settings.keep == "slide":
                remove_patch_embeddings(paths.embedding)
                remove_features(paths, self._features_key)
            return self._finished
        extraction = self._extracted
        assert extraction is not None
        _, slide_reused = embed_features_file(
            paths.features,
            paths.embedding,
            self._slide_encoder,
            dtype=resolve_dtype(settings.dtype, self._slide_encoder.device),
            max_memory=settings.max_memory,
            patch_embeddings=wants_patch_embeddings(settings.keep),
            patient=self._patient,
            request=self.request,
            overwrite=self._overwrite(paths.embedding),
        )
        self.image.check_unchanged()
        if settings.keep == "slide" and not extraction.failures:
            self._check()
            remove_features(paths, self._features_key)
        reused = tuple(stage for stage, done in (("features", extraction.reused), ("slide", slide_reused)) if done)
        return self._result(extraction.n_features, len(extraction.failures), reused)

    def close(self) -> None:
        """Close the partial file; the slide stays open."""
        if self.extraction is not None:
            self.extraction.close()

    def _result(self, n_patches: int, n_failed: int, reused: tuple[str, ...]) -> EncodeResult:
        paths = self.paths
        no_patch = "" if n_patches or n_failed else why_no_patch(paths.patches)
        return EncodeResult(
            self.image.name,
            self.image.path,
            paths.patches,
            paths.features,
            paths.embedding,
            n_patches,
            n_failed,
            reused,
            no_patch,
        )


def find_patches(
    image: SlideImage, out: str | os.PathLike[str], patching: Mapping[str, Any], overwrite: bool = False
) -> int:
    """Compute the patches of a slide, or take the stored ones; returns their number.

    Args:
        image: the open slide.
        out: output folder.
        patching: see `EncodeSettings`.
        overwrite: compute them again.
    """
    arguments = {name: value for name, value in patching.items() if name != "mpp"}
    _, coords, _ = patchfy(image, out, **arguments, overwrite=overwrite)
    return len(coords)


def request_hash(
    settings: EncodeSettings, patch_encoder: LoadedEncoder[Any], slide_encoder: LoadedEncoder[Any], patient: str | None
) -> str:
    """Hash of what is asked for of a slide, without looking at the slide: equal hashes and slides give equal results.

    Files of regions count by their names, so that it shows only that a result was made by the same run, in effect.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(patchfy).parameters.items()
        if parameter.default is not parameter.empty
    }
    patching = {**defaults, **settings.patching}
    if patching["save_contours"] is None:
        patching["save_contours"] = True
    values = {
        "patching": {name: _plain(value) for name, value in sorted(patching.items())},
        "preprocessing": settings.preprocessing.to_dict(),
        "dtypes": [str(resolve_dtype(settings.dtype, encoder.device)) for encoder in (patch_encoder, slide_encoder)],
        "weights": [patch_encoder.fingerprint, slide_encoder.fingerprint],
        "reader": settings.reader,
        "feature_dtype": settings.feature_dtype,
        "keep": settings.keep,
        "patient": patient,
        "version": __version__,
    }
    return settings_hash(values)


def _plain(value: Any) -> Any:
    """A setting as plain JSON; an empty one and its absence are the same."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value) or None
    if isinstance(value, Iterable):
        return [str(item) for item in value] or None
    return value if value is None or isinstance(value, bool) else float(value)


def why_no_patch(patches_path: str | os.PathLike[str]) -> str:
    """The reason why a slide has no patch, from its patches file; empty if it has patches."""
    patches = read_patches(patches_path)
    if len(patches):
        return ""
    return (patches.outcome and patches.outcome.no_patch) or "the reason is not stored (made by an earlier version)"


def check_tissue_source(patching: Mapping[str, Any]) -> None:
    """Check those arguments of `patchfy` that say where the tissue of a slide comes from.

    Raises:
        SettingsError, MaskError: see `check_source`.
    """
    check_source(**{name: value for name, value in patching.items() if name in _SOURCES})


def checked_patching(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `patchfy`, checked; without step_size, patches are adjacent.

    Raises:
        SettingsError: an argument is not known, or decides something else than the patches.
    """
    known = {*_FIELDS, *_SOURCES, "save_mask", "save_contours", "line_thickness", "strict_scale"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise SettingsError(f"patching: {', '.join(unknown)} cannot be set here; known: {', '.join(sorted(known))}")
    if "patch_size" in arguments and "step_size" not in arguments:
        return {**arguments, "step_size": arguments["patch_size"]}
    return dict(arguments)
