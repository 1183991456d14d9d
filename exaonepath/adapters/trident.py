"""Encoders in the form of TRIDENT (mahmoodlab/TRIDENT): its `BasePatchEncoder` and `BaseSlideEncoder`.

TRIDENT calls an encoder by what it has, not by its class, so that both work without being derived from its classes, and
without TRIDENT being installed. `register` makes them known to its factories under the name `exaonepath`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from exaonepath.adapters.modules import PatchEncoderModule, PatchTransform, SlideEncoderModule
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.errors import MissingDependencyError, SettingsError
from exaonepath.slides.features.preprocessing import PreprocessingConfig

NAME = "exaonepath"


class TridentPatchEncoder(PatchEncoderModule):
    """The patch encoder for TRIDENT's `extract_patch_features`.

    Args:
        weights, dtype, device: as for `PatchEncoderModule`.
        preprocessing: resize, crop, mean and std; None: those of the published model.

    Attributes:
        enc_name: "exaonepath": TRIDENT names folders by it.
        eval_transforms: from a PIL image to the input.
        precision: float32, so that TRIDENT does not add its own autocast; the module has its own dtype.
    """

    def __init__(
        self,
        weights: Any = DEFAULT_WEIGHTS,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        preprocessing: PreprocessingConfig | None = None,
    ) -> None:
        super().__init__(weights, dtype=dtype, device=device)
        self.enc_name = NAME
        self.eval_transforms = PatchTransform(preprocessing)
        self.precision = torch.float32


class TridentSlideEncoder(SlideEncoderModule):
    """The slide encoder for TRIDENT's `extract_slide_features`.

    TRIDENT stores no contours: see `fragments` of `SlideEncoderModule`. A batch may hold `contour_index` [1, N]; then
    the result is that of `encode_slide`.

    Args:
        weights, dtype, device, fragments: as for `SlideEncoderModule`.

    Attributes:
        enc_name: "exaonepath".
        precision: float32, as for `TridentPatchEncoder`.
        embedding_dim: 1536.
    """

    def __init__(self, weights: Any = DEFAULT_WEIGHTS, **options: Any) -> None:
        super().__init__(weights, **options)
        self.enc_name = NAME
        self.precision = torch.float32

    def forward(self, batch: dict[str, Any], device: str | torch.device | None = None) -> Tensor:
        """Slide embeddings float32 [B, 1536].

        Args:
            batch: "features" [B, N, 768]; "coords" [B, N, 2], level-0 pixels; "attributes", those of TRIDENT's coords,
                of which `patch_size_level0` is used; "contour_index" [B, N] if it is known.
            device: where to compute; None: where the encoder is.

        Raises:
            SettingsError: something is missing of the batch, or shapes do not match.
        """
        missing = [name for name in ("features", "coords") if name not in batch]
        if missing:
            raise SettingsError(f"the batch has no {' and no '.join(missing)}; it has {', '.join(batch)}")
        if device is not None:
            self.to(device)
        features, coords, contours = batch["features"], batch["coords"], batch.get("contour_index")
        if features.ndim != 3 or coords.ndim != 3 or len(features) != len(coords):
            raise SettingsError(
                f"features must be [B, N, C] and coords [B, N, 2], got {list(features.shape)} and {list(coords.shape)}"
            )
        size = batch.get("attributes", {}).get("patch_size_level0")
        rows = [
            self.embed(features[at], coords[at], None if contours is None else contours[at], _size(size))
            for at in range(len(features))
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.embedding_dim)


def register(weights: str = DEFAULT_WEIGHTS, **options: Any) -> None:
    """Make both encoders known to TRIDENT's factories, and so to its `Processor`, as "exaonepath".

    Args:
        weights: of both encoders.
        options: further arguments of `TridentSlideEncoder` (dtype, device, fragments); the patch encoder gets dtype and
            device.

    Raises:
        MissingDependencyError: TRIDENT is not installed, or it has no such factories.
    """
    patches, slides = (_module(f"trident.{kind}_encoder_models.load") for kind in ("patch", "slide"))
    shared = {name: value for name, value in options.items() if name in ("dtype", "device")}

    def patch_encoder(weights_path: str | None = None, **more: Any) -> TridentPatchEncoder:
        _check_unknown(more, set())
        return TridentPatchEncoder(weights_path or weights, **shared)

    def slide_encoder(weights_path: str | None = None, **more: Any) -> TridentSlideEncoder:
        _check_unknown(more, {"pretrained", "freeze"})  # the weights are those of `register`; both are frozen
        return TridentSlideEncoder(weights_path or weights, **options)

    try:
        patches.encoder_registry[NAME] = patch_encoder
        slides.encoder_registry[NAME] = slide_encoder
        slides.slide_to_patch_encoder_name[NAME] = NAME
    except AttributeError as exc:
        raise _missing(str(exc)) from exc


def _check_unknown(arguments: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise SettingsError(f"{NAME} has no argument {', '.join(unknown)} in TRIDENT")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise _missing(str(exc)) from exc


def _missing(why: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"this needs TRIDENT ({why}): pip install git+https://github.com/mahmoodlab/TRIDENT.git (the package `trident` "
        "of the package index is another program)"
    )


def _size(value: Any) -> int | None:
    return None if value is None else int(value)
