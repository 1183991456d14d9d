"""Encoders in the form of LazySlide (rendeirolab/LazySlide): its `ImageModel` and `SlideEncoderModel`.

LazySlide recognises a model by its methods. `register` puts both into its registry of models, so that they can be named
in its functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exaonepath.adapters.modules import PatchEncoderModule, PatchTransform, SlideEncoderModule
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.errors import MissingDependencyError, SettingsError
from exaonepath.slides.features.preprocessing import PreprocessingConfig

NAME, SLIDE_NAME = "exaonepath", "exaonepath-slide-encoder"


class _Model:
    """What LazySlide asks of every model."""

    task: Any = None
    name: str
    model: Any

    def get_transform(self) -> PatchTransform | None:
        """From a tile to the model's input; None: it takes no tiles."""
        return None

    def to(self, device: str | torch.device) -> Any:
        """Move the encoder to a device; returns this object."""
        self.model.to(device)
        return self

    def try_compile(self, **_: Any) -> None:
        """Do nothing: compiled code would give other numbers than `encode_slide`."""

    def estimate_param_size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @classmethod
    def check_input_tile(cls, tile_spec: Any) -> bool:
        """Whether tiles of this kind can be encoded: all can."""
        return True


class LazySlidePatchEncoder(_Model):
    """The patch encoder for `lazyslide.tl.feature_extraction(wsi, model=...)`.

    Tiles of 256 pixels at 0.5 µm are what the model was made for: `lazyslide.pp.tile_tissues(wsi, 256, mpp=0.5)`.

    Args:
        weights: see `load_patch_encoder`.
        dtype, device: as for `PatchEncoderModule`.
        preprocessing: resize, crop, mean and std; None: those of the published model.
        name: names the features in LazySlide.
    """

    def __init__(
        self,
        weights: Any = DEFAULT_WEIGHTS,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        preprocessing: PreprocessingConfig | None = None,
        name: str = NAME,
    ) -> None:
        self.model = PatchEncoderModule(weights, dtype=dtype, device=device)
        self.name = name
        self._transform = PatchTransform(preprocessing)

    def get_transform(self) -> PatchTransform:
        """From a tile uint8 [h, w, 3] to the encoder's input."""
        return self._transform

    def encode_image(self, image: Tensor, *_: Any, **__: Any) -> Tensor:
        """Features float32 [B, 768] of transformed tiles [B, 3, 224, 224]."""
        features: Tensor = self.model(image)
        return features

    def __call__(self, image: Tensor) -> Tensor:
        """See `encode_image`."""
        return self.encode_image(image)


class LazySlideSlideEncoder(_Model):
    """The slide encoder for `lazyslide.tl.feature_aggregation(wsi, encoder="exaonepath-slide-encoder")`.

    Args:
        weights, dtype, device, fragments: as for `SlideEncoderModule`.
        name: names it in LazySlide.
    """

    def __init__(self, weights: Any = DEFAULT_WEIGHTS, *, name: str = SLIDE_NAME, **options: Any) -> None:
        self.model = SlideEncoderModule(weights, **options)
        self.name = name

    def encode_slide(
        self, embeddings: Any, coords: Any = None, *, contour_index: Any = None, patch_size: int | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """{"embeddings": float32 [1, 1536]} of one slide.

        Args:
            embeddings: features [1, N, 768] or [N, 768].
            coords: [1, N, 2] or [N, 2], corners in level-0 pixels.
            contour_index: tissue fragment of each tile, such as LazySlide's `tissue_id`; None: see
                `SlideEncoderModule`.
            patch_size: side of a tile in level-0 pixels; None: the distance between neighbours.

        Raises:
            SettingsError: there are no coordinates, or shapes do not match.
        """
        if coords is None:
            raise SettingsError("the slide encoder needs the coordinates of the tiles")
        given = [_one_slide(name, values) for name, values in (("embeddings", embeddings), ("coords", coords))]
        return {"embeddings": self.model.embed(given[0], given[1], contour_index, patch_size)[None]}


def register(weights: str = DEFAULT_WEIGHTS, **options: Any) -> None:
    """Put both encoders into LazySlide's registry: "exaonepath" and "exaonepath-slide-encoder".

    They are then named like its own models: `zs.tl.feature_extraction(wsi, "exaonepath")`,
    `zs.tl.feature_aggregation(wsi, "exaonepath", encoder="exaonepath-slide-encoder")`.

    Args:
        weights: of both encoders; LazySlide's `model_path` takes its place.
        options: further arguments of `LazySlideSlideEncoder` (dtype, device, fragments); the patch encoder gets dtype
            and device.

    Raises:
        MissingDependencyError: lazyslide is not installed.
    """
    try:
        from lazyslide_models import MODEL_REGISTRY, ModelTask
    except ImportError as exc:
        raise MissingDependencyError(f"this needs LazySlide 0.13 or later ({exc}): pip install lazyslide") from exc
    shared = {name: value for name, value in options.items() if name in ("dtype", "device")}

    class Patches(LazySlidePatchEncoder):
        """The registered patch encoder."""

        task = ModelTask.vision

        def __init__(self, model_path: str | None = None, token: str | None = None, **more: Any) -> None:
            super().__init__(model_path or weights, **{**shared, **more})

    class Slides(LazySlideSlideEncoder):
        """The registered slide encoder."""

        task = ModelTask.slide_encoder

        def __init__(self, model_path: str | None = None, token: str | None = None, **more: Any) -> None:
            super().__init__(model_path or weights, **{**options, **more})

    MODEL_REGISTRY[NAME] = Patches
    MODEL_REGISTRY[SLIDE_NAME] = Slides


def _one_slide(name: str, values: Any) -> Any:
    if values.ndim == 3:
        if len(values) != 1:
            raise SettingsError(f"{name} must be of one slide, got {list(values.shape)}")
        return values[0]
    return values
