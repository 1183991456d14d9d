"""Slides in, embeddings out, by one call: an object in the manner of `transformers.pipeline`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, overload

import torch

from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError
from exaonepath.files.embeddings import read_embedding
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage

TASKS = ("slide-embedding", "image-feature-extraction")
Slide = str | os.PathLike[str] | SlideImage


class SlideEmbeddingPipeline:
    """Encodes slides with `encode_slide`; both encoders are loaded once.

    Args:
        weights: of both encoders: a Hub id, a directory, or "random:SEED".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        out: output folder of `encode_slide`, where finished slides are not computed again; None: a temporary folder for
            each slide, and nothing remains.
        return_patches: whether results hold the embedding of each patch.
        options: further arguments of `encode_slide` (patching, batch_size, dtype, ...).

    Raises:
        SettingsError, WeightsError, DeviceError: see `load_patch_encoder`.
    """

    task = "slide-embedding"

    def __init__(
        self,
        weights: str = DEFAULT_WEIGHTS,
        *,
        device: str | torch.device = "auto",
        out: str | os.PathLike[str] | None = None,
        return_patches: bool = False,
        **options: Any,
    ) -> None:
        self.weights = weights
        self.patch_encoder: LoadedEncoder[ExaonePathPatchEncoderModel] = load_patch_encoder(weights, device=device)
        self.slide_encoder: LoadedEncoder[ExaonePathSlideEncoderModel] = load_slide_encoder(weights, device=device)
        self.device = self.slide_encoder.device
        self._out, self._return_patches, self._options = out, return_patches, options

    @overload
    def __call__(self, slides: Slide, **options: Any) -> dict[str, Any]: ...

    @overload
    def __call__(self, slides: list[Any] | tuple[Any, ...], **options: Any) -> list[dict[str, Any]]: ...

    @overload
    def __call__(self, slides: Iterable[Any], **options: Any) -> Iterator[dict[str, Any]]: ...

    def __call__(self, slides: Any, **options: Any) -> Any:
        """The embeddings of slides.

        Args:
            slides: a slide file or open slide; a list of them; or any other iterable, whose results are computed when
                they are asked for.
            options: arguments of `encode_slide` for this call, in place of those of the pipeline.

        Returns:
            For each slide a dict: `slide_embedding` float32 [1536] (zeros without tissue), `name`, `n_patches`,
            `n_failed`, `no_patch` (why there is none); with `return_patches` also `patch_embedding` float32 [N, 1536],
            `coords` int32 [N, 2], `contour_index` int32 [N]; with `out` also `path`, the embeddings file. A dict, a
            list or an iterator, as the input is.

        Raises:
            ExaonePathError: see `encode_slide`. With `out`, what is finished is kept.
        """
        if isinstance(slides, str | os.PathLike | SlideImage):
            return self._one(slides, options)
        if isinstance(slides, list | tuple):
            return [self._one(slide, options) for slide in slides]
        if isinstance(slides, Iterable):
            return (self._one(slide, options) for slide in slides)
        raise SettingsError(f"slides are paths, open slides, or a list of them, not {type(slides).__name__}")

    def _one(self, slide: Slide, options: dict[str, Any]) -> dict[str, Any]:
        if self._out is not None:
            return self._encoded(slide, self._out, options)
        with tempfile.TemporaryDirectory(prefix="exaonepath-", ignore_cleanup_errors=True) as folder:
            return self._encoded(slide, folder, options)

    def _encoded(self, slide: Slide, out: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
        arguments = {"keep": "all" if self._return_patches else None, **self._options, **options}
        done = encode_slide(slide, out, self.patch_encoder, self.slide_encoder, **arguments)
        stored = read_embedding(done.embedding_path, require_patches=self._return_patches)
        result: dict[str, Any] = {
            "slide_embedding": stored.slide_embedding,
            "name": done.name,
            "n_patches": done.n_patches,
            "n_failed": done.n_failed,
            "no_patch": done.no_patch,
        }
        if self._return_patches:
            result |= {name: getattr(stored, name) for name in ("patch_embedding", "coords", "contour_index")}
        if self._out is not None:
            result["path"] = Path(done.embedding_path)
        return result


def pipeline(task: str = "slide-embedding", model: str = DEFAULT_WEIGHTS, **options: Any) -> Any:
    """A callable for a task, in the manner of `transformers.pipeline`.

    Args:
        task: "slide-embedding": slide files to embeddings, see `SlideEmbeddingPipeline`. "image-feature-extraction":
            transformers' own pipeline for images of patches, with the patch encoder and its preprocessing.
        model: weights: a Hub id, a directory, or "random:SEED".
        options: further arguments of `SlideEmbeddingPipeline` or of `transformers.pipeline`.

    Raises:
        SettingsError: there is no such task.
        WeightsError: the weights have no usable files.
    """
    if task == "slide-embedding":
        return SlideEmbeddingPipeline(model, **options)
    if task == "image-feature-extraction":
        import transformers

        encoder = load_patch_encoder(model).model
        options.setdefault("image_processor", image_processor())
        return transformers.pipeline(task, model=encoder, **options)
    raise SettingsError(f"the tasks are {', '.join(TASKS)}, not {task!r}")


def image_processor(config: PreprocessingConfig | None = None) -> Any:
    """The preprocessing of the patch encoder as a transformers image processor.

    Images are resized by Pillow, as in this package: transformers' default, torchvision on tensors, gives other pixels.

    Args:
        config: resize, crop, mean and std; None: those of the published model.
    """
    import transformers

    # Before transformers 5, the processor of this name resizes by Pillow.
    name = "BitImageProcessorPil" if hasattr(transformers, "BitImageProcessorPil") else "BitImageProcessor"
    config = config or PreprocessingConfig()
    return getattr(transformers, name)(
        do_resize=True,
        size={"shortest_edge": config.resize},
        resample=2,  # bilinear
        do_center_crop=True,
        crop_size={"height": config.crop, "width": config.crop},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(config.mean),
        image_std=list(config.std),
        do_convert_rgb=True,
    )
