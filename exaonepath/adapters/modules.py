"""What the adapters share: the transform of a patch, and both encoders as plain modules that return plain tensors."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from exaonepath.device import inference, resolve_dtype
from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.patch_encoder import DIM, ExaonePathPatchEncoderModel
from exaonepath.encoders.prepared import PreparedPatchEncoder, can_prepare
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError
from exaonepath.files.features import FeatureSet
from exaonepath.slides.embed import embed_slide
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise, resize_and_crop
from exaonepath.slides.patches.fragments import fragments_of_grid, grid_step

Fragments = Literal["grid", "one"]


class PatchTransform:
    """An image as the patch encoder's input: resize, centre crop, normalise. Can be sent to worker processes.

    Args:
        config: the steps; None: those of the published model.
    """

    def __init__(self, config: PreprocessingConfig | None = None) -> None:
        self.config = config or PreprocessingConfig()

    def __call__(self, image: Any) -> Tensor:
        """float32 [3, crop, crop] of a PIL image, a uint8 array [h, w, 3 or 4], or a uint8 tensor [3 or 4, h, w].

        Raises:
            SettingsError: it is none of these.
        """
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy() if image.ndim == 3 else image.cpu().numpy()
        elif not isinstance(image, np.ndarray):
            image = np.asarray(image.convert("RGB"))
        pixels = resize_and_crop(image, self.config)
        return normalise(torch.from_numpy(np.ascontiguousarray(pixels))[None], self.config)[0]

    def __repr__(self) -> str:
        return f"PatchTransform({self.config})"


class PatchEncoderModule(nn.Module):
    """The patch encoder for inference: normalised images [B, 3, H, W] to features float32 [B, 768].

    Autocast around the call is switched off: the dtype is that of this module, as in `extract_features`.

    Args:
        weights: see `load_patch_encoder`; or a loaded encoder.
        dtype: of the matrix products: "auto" is bfloat16 on CUDA and float32 elsewhere.
        device: where it is loaded; `to` moves it.

    Attributes:
        model: the encoder.
        weights, fingerprint, is_random: see `LoadedEncoder`.
        embedding_dim: 768.
    """

    def __init__(
        self,
        weights: str | LoadedEncoder[ExaonePathPatchEncoderModel] = DEFAULT_WEIGHTS,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        loaded = load_patch_encoder(weights, device=device) if isinstance(weights, str) else weights
        self.model = loaded.model
        self.weights, self.fingerprint, self.is_random = loaded.weights, loaded.fingerprint, loaded.is_random
        self.embedding_dim = DIM
        self._dtype = dtype
        self._prepared: list[tuple[object, PreparedPatchEncoder]] = []  # in a list: no part of the module's state

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [B, 768] on the device of the images; no gradients.

        Raises:
            SettingsError: the shape is wrong.
            DeviceMemoryError: the batch does not fit into the device's memory.
        """
        device = images.device
        dtype = resolve_dtype(self._dtype, device)
        with inference(device, torch.float32, f"a batch of {len(images)} patches"):
            if dtype == torch.float32 or not can_prepare(self.model):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    features: Tensor = self.model(images)
            else:
                features = self._converted(dtype, device)(images)
            return features.float()

    def _converted(self, dtype: torch.dtype, device: torch.device) -> PreparedPatchEncoder:
        state = dtype, device, *((p.data_ptr(), p._version) for p in self.model.parameters())
        if not self._prepared or self._prepared[0][0] != state:
            self._prepared[:] = [(state, PreparedPatchEncoder(self.model, dtype).to(device))]
        return self._prepared[0][1]


class SlideEncoderModule(nn.Module):
    """The slide encoder for inference, of slides whose contours may not be known.

    Args:
        weights: see `load_slide_encoder`; or a loaded encoder.
        dtype: as for `PatchEncoderModule`.
        device: where it is loaded; `to` moves it.
        fragments: what takes the place of contours where they are not given: "grid", the connected pieces of the
            patch grid (see `fragments_of_grid`); "one", a single fragment, which is how features files without
            contours are read.

    Attributes:
        model: the encoder.
        weights, fingerprint, is_random: see `LoadedEncoder`.
        embedding_dim: 1536: the mean patch feature, and the slide encoder's output.

    Raises:
        SettingsError: `fragments` is neither.
    """

    def __init__(
        self,
        weights: str | LoadedEncoder[ExaonePathSlideEncoderModel] = DEFAULT_WEIGHTS,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        fragments: Fragments = "grid",
    ) -> None:
        super().__init__()
        if fragments not in get_args(Fragments):
            raise SettingsError(f"fragments are {' or '.join(get_args(Fragments))}, not {fragments!r}")
        loaded = load_slide_encoder(weights, device=device) if isinstance(weights, str) else weights
        self.model = loaded.model
        self.weights, self.fingerprint, self.is_random = loaded.weights, loaded.fingerprint, loaded.is_random
        config = self.model.config.wsi
        self.embedding_dim = int(config["input_dim"]) + int(config["embed_dim"])
        self._dtype, self._fragments = dtype, fragments

    def embed(self, features: Any, coords: Any, contour_index: Any = None, patch_size: int | None = None) -> Tensor:
        """The embedding of one slide: float32 [1536], on the encoder's device.

        Args:
            features: float [N, 768], array or tensor.
            coords: int [N, 2], corners (x, y) in level-0 pixels.
            contour_index: int [N]; None: see `fragments`.
            patch_size: in level-0 pixels, for fragments of the grid; None: the distance between neighbours.

        Raises:
            SettingsError: shapes do not match.
            DataFileError: the features have the wrong width.
            BackendError: see `embed_slide`.
        """
        values, corners = _array(features, np.float32), _array(coords, np.int64)
        if values.ndim != 2 or corners.shape != (len(values), 2):
            raise SettingsError(
                f"features must be [N, C] and coords [N, 2], got {list(values.shape)} and {list(corners.shape)}"
            )
        limit = np.iinfo(np.int32)
        if len(corners) and (corners.min() < limit.min or corners.max() > limit.max):
            raise SettingsError("coords are level-0 pixels and must fit into 32 bits")
        if contour_index is not None:
            contours = _array(contour_index, np.int32)
            if contours.shape != (len(values),):
                raise SettingsError(f"contour_index must be [{len(values)}], got {list(contours.shape)}")
        elif self._fragments == "one":
            contours = np.zeros(len(values), np.int32)
        else:
            size = grid_step(corners, 1) if patch_size is None else patch_size
            contours = fragments_of_grid(corners, size)
        device = next(self.model.parameters()).device
        loaded = LoadedEncoder(self.model, self.weights, self.fingerprint, self.is_random)
        given = FeatureSet(values, corners.astype(np.int32), contours)
        with torch.autocast(device.type, enabled=False):
            found = embed_slide(given, loaded, resolve_dtype(self._dtype, device))
        return torch.from_numpy(found.slide_embedding).to(device)


def _array(values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.ascontiguousarray(values, dtype)
