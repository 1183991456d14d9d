"""The root model of a repository that holds both encoders, and the `component=` form of loading one of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exaonepath.encoders.base import ExaonePathPreTrainedModel
from exaonepath.encoders.configuration import ExaonePathConfig
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.repository import HUB_ARGUMENTS
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel, SlideEncoderOutput
from exaonepath.errors import SettingsError


class ExaonePathModel(ExaonePathPreTrainedModel):
    """Both encoders in one model. `from_pretrained(..., component="patch" | "slide")` returns one of them alone."""

    config_class = ExaonePathConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ExaonePathConfig) -> None:
        super().__init__(config)
        self.patch_encoder = ExaonePathPatchEncoderModel(config.patch_encoder())
        self.slide_encoder = ExaonePathSlideEncoderModel(config.slide_encoder())
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        component: str | None = None,
        encoder_type: str | None = None,
        component_subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load from a root `config.json` of `model_type` "exaonepath".

        Args:
            pretrained_model_name_or_path: Hub id or directory.
            component: "patch" or "slide" (or patch-encoder, patch_encoder, slide-encoder, slide_encoder, wsi): load
                that encoder alone. None: both.
            encoder_type: older spelling of `component`.
            component_subfolder: overrides the subfolder in the root config; needs `component`.
            **kwargs: as for any `from_pretrained`.

        Raises:
            SettingsError: the component is unknown.
            WeightsError: the weights are missing or do not match the model.
        """
        config = kwargs.pop("config", None)
        if not isinstance(config, ExaonePathConfig):
            where: Any = pretrained_model_name_or_path if config is None else config
            config = ExaonePathConfig.from_pretrained(where, **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs})
        # AutoModel has already moved this argument into the root config.
        if getattr(config, "_attn_implementation", None) is not None:
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        wanted = _component(component, encoder_type)
        if wanted is None:
            if component_subfolder is not None:
                raise SettingsError('component_subfolder needs component="patch" or "slide"')
            if kwargs.get("output_loading_info"):
                raise SettingsError("output_loading_info is available for one component at a time; add component=")
            model = cls._both(config, pretrained_model_name_or_path, args, kwargs)
            model.name_or_path = str(pretrained_model_name_or_path)
            return model
        subfolder = component_subfolder or getattr(config, f"{wanted}_encoder_subfolder")
        return _CLASSES[wanted].from_pretrained(
            pretrained_model_name_or_path, *args, **{**kwargs, "subfolder": subfolder}
        )

    @classmethod
    def _both(cls, config: ExaonePathConfig, where: Any, args: Any, kwargs: dict[str, Any]) -> ExaonePathModel:
        parts = {
            name: part.from_pretrained(
                where, *args, **{**kwargs, "subfolder": getattr(config, f"{name}_encoder_subfolder")}
            )
            for name, part in _CLASSES.items()
        }
        config.patch_encoder_config = parts["patch"].config.to_diff_dict()
        config.slide_encoder_config = parts["slide"].config.to_diff_dict()
        with torch.device("meta"):  # the parts are already loaded: build the outer module without memory
            model = cls(config)
        model.patch_encoder, model.slide_encoder = parts["patch"], parts["slide"]
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the root config and each encoder into its subfolder, as `from_pretrained` expects them."""
        root = Path(save_directory)
        self.config.architectures = [type(self).__name__]
        self.config.patch_encoder_config = self.patch_encoder.config.to_diff_dict()
        self.config.slide_encoder_config = self.slide_encoder.config.to_diff_dict()
        self.config.save_pretrained(root)
        for name in _CLASSES:
            folder = root / getattr(self.config, f"{name}_encoder_subfolder")
            getattr(self, f"{name}_encoder").save_pretrained(folder, *args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        patch_coords: Tensor | None = None,
        patch_contour_index: Tensor | None = None,
    ) -> SlideEncoderOutput:
        """Embed one slide from its preprocessed patches.

        Args:
            pixel_values: [N, 3, 224, 224]. patch_coords: [N, 2] or None. patch_contour_index: [N] or None.

        Returns:
            `SlideEncoderOutput` with a batch dimension of 1.
        """
        features = self.patch_encoder(pixel_values)[None]
        coords = None if patch_coords is None else patch_coords[None]
        contour = None if patch_contour_index is None else patch_contour_index[None]
        output: SlideEncoderOutput = self.slide_encoder(features, None, coords, contour)
        return output


_CLASSES: dict[str, Any] = {"patch": ExaonePathPatchEncoderModel, "slide": ExaonePathSlideEncoderModel}
_COMPONENTS = {name: part for part, cls in _CLASSES.items() for name in cls.component_names}


def _component(component: str | None, encoder_type: str | None) -> str | None:
    if component is not None and encoder_type is not None and component != encoder_type:
        raise SettingsError(f"component={component!r} and encoder_type={encoder_type!r} disagree; give one of them")
    name = component if component is not None else encoder_type
    if name is None:
        return None
    if name not in _COMPONENTS:
        raise SettingsError(f"unknown component {name!r}; choose one of {', '.join(_COMPONENTS)}")
    return _COMPONENTS[name]
