"""The patch encoder in the form of timm: `create_model`, `forward_features`, `num_features`, `pretrained_cfg`.

The model is a plain `nn.Module` with gradients, so that it can be trained. `register` makes `timm.create_model` know
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder
from exaonepath.encoders.patch_encoder import DIM, ExaonePathPatchEncoderModel
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.errors import MissingDependencyError, SettingsError
from exaonepath.slides.features.preprocessing import PreprocessingConfig

NAME = "exaonepath_patch_encoder"
# Arguments that timm passes to every model; what they say is known here.
_OF_TIMM = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class TimmPatchEncoder(nn.Module):
    """The patch encoder with the methods of a timm model.

    Args:
        weights: see `load_patch_encoder`; or a loaded encoder.
        num_classes: of a new linear head; 0: features are returned.
        preprocessing: resize, crop, mean and std; None: those of the published model.

    Attributes:
        num_features, embed_dim: 768.
        pretrained_cfg, default_cfg: input size, crop, interpolation, mean and std, for
            `timm.data.resolve_model_data_config`.
        head: the linear head, or the identity.
    """

    def __init__(
        self,
        weights: str | LoadedEncoder[ExaonePathPatchEncoderModel] = DEFAULT_WEIGHTS,
        num_classes: int = 0,
        preprocessing: PreprocessingConfig | None = None,
    ) -> None:
        super().__init__()
        loaded = load_patch_encoder(weights) if isinstance(weights, str) else weights
        self.model = loaded.model
        self.num_features = self.embed_dim = self.head_hidden_size = DIM
        self.num_classes = 0
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        config = preprocessing or PreprocessingConfig()
        self.pretrained_cfg = {
            "architecture": NAME,
            "input_size": (3, config.crop, config.crop),
            "interpolation": "bilinear",
            "crop_pct": config.crop / config.resize,
            "crop_mode": "center",
            "mean": config.mean,
            "std": config.std,
            "num_classes": num_classes,
            "weights": loaded.weights,
        }
        self.default_cfg = self.pretrained_cfg

    def forward_features(self, x: Tensor) -> Tensor:
        """Features [B, 768] of normalised images [B, 3, H, W]: the CLS token, after the last norm.

        Raises:
            SettingsError: the shape is wrong.
        """
        features: Tensor = self.model(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The head on features [B, 768]; with `pre_logits` the features themselves."""
        result: Tensor = x if pre_logits else self.head(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 768], or with a head [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0: by the identity."""
        self.num_classes = num_classes
        device = next(self.model.parameters()).device
        self.head = nn.Linear(DIM, num_classes, device=device) if num_classes else nn.Identity()


def create_model(weights: str = DEFAULT_WEIGHTS, *, num_classes: int = 0, **options: Any) -> TimmPatchEncoder:
    """The patch encoder as a timm model, in evaluation mode.

    Args:
        weights: see `load_patch_encoder`.
        num_classes: see `TimmPatchEncoder`.
        options: further arguments of it.

    Raises:
        WeightsError: the weights have no usable files.
    """
    return TimmPatchEncoder(weights, num_classes, **options).eval()


def register(weights: str = DEFAULT_WEIGHTS) -> None:
    """Make `timm.create_model("exaonepath_patch_encoder", pretrained=True)` build the patch encoder.

    `num_classes`, `weights` and `preprocessing` are passed on; without `pretrained`, weights are random.

    Raises:
        MissingDependencyError: timm is not installed.
    """
    try:
        from timm.models import register_model
    except ImportError as exc:
        raise MissingDependencyError(f"this needs timm ({exc}): pip install timm") from exc
    chosen = weights

    def exaonepath_patch_encoder(pretrained: bool = False, **arguments: Any) -> TimmPatchEncoder:
        unknown = sorted(set(arguments) - _OF_TIMM - {"weights", "num_classes", "preprocessing"})
        if unknown:
            raise SettingsError(f"{NAME} has no argument {', '.join(unknown)}")
        wanted = arguments.get("weights", chosen if pretrained else f"random:{torch.initial_seed() % (1 << 31)}")
        known = {name: arguments[name] for name in ("num_classes", "preprocessing") if name in arguments}
        return TimmPatchEncoder(wanted, **known)

    exaonepath_patch_encoder.__module__ = __name__  # timm notes in which module a model is defined
    register_model(exaonepath_patch_encoder)
