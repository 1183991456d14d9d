"""Build the model of the settings for the features of a cohort."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from exaonepath.alignment.data.standardizer import Scaling
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig
from exaonepath.alignment.training.closed_form_start import zero_ffn
from exaonepath.alignment.training.data import TrainingData
from exaonepath.alignment.training.settings import ModelSettings, TrainSettings
from exaonepath.encoders.loading import load_slide_encoder
from exaonepath.errors import ConfigError, SettingsError


def build_model(settings: TrainSettings, data: TrainingData) -> ExaonePathAlignmentModel:
    """A new model for the cohort, with initial weights from torch's generator and the statistics of the cohort.

    Raises:
        ConfigError: no model can be built from the settings. SettingsError: modalities are unknown, or widths do not
            match. WeightsError: `model.slide_weights` cannot be used.
    """
    model_settings = settings.model
    names = data.modalities
    if len(names) < 2:
        raise SettingsError(f"at least two modalities are needed to align; the cohort has {', '.join(names) or 'none'}")
    shared, single = _omics_settings(model_settings.omics, names)
    omics = {
        name: {
            **shared,
            **single.get(name, {}),
            "feature_names": list(scaling.features),
            "scale": scaling.scale,
            "transform": scaling.transform,
            "clip": data.standardizer.clip,
            "counted_features": _counted_only(scaling),
            "n_patients": scaling.n_patients,
        }
        for name, scaling in data.standardizer.scalings.items()
    }
    slide_encoder = None
    wsi_cfg: dict[str, Any] | None = None
    if WSI in names:
        wsi_cfg = {**model_settings.wsi, "input_dim": data.cohort.slides.dim}
        if model_settings.slide_weights is not None:
            if model_settings.wsi:
                raise ConfigError("model.slide_weights defines the architecture: remove model.wsi")
            slide_encoder = load_slide_encoder(model_settings.slide_weights).model
            wsi_cfg = dict(slide_encoder.config.wsi_cfg)
            if slide_encoder.config.wsi["input_dim"] != data.cohort.slides.dim:
                raise SettingsError(
                    f"slide features are {data.cohort.slides.dim} wide, the encoder of {model_settings.slide_weights} "
                    f"needs {slide_encoder.config.wsi['input_dim']}"
                )
    config = ExaonePathAlignmentConfig(
        wsi_cfg=wsi_cfg, omics=omics, projection_dim=model_settings.projection_dim, **_objective(settings)
    )
    attention = {} if model_settings.attention is None else {"attn_implementation": model_settings.attention}
    model: ExaonePathAlignmentModel = ExaonePathAlignmentModel._from_config(config, **attention)
    for name, scaling in data.standardizer.scalings.items():
        model.omics_encoder(name).set_statistics(torch.from_numpy(scaling.mean), torch.from_numpy(scaling.std))
    if slide_encoder is not None:
        model.slide_encoder.load_state_dict(slide_encoder.state_dict())
    nn.init.constant_(model.loss.log_t, settings.loss.t_init)
    nn.init.constant_(model.loss.bias, settings.loss.b_init)
    if model_settings.ffn_start == "zero" or model_settings.start == "cca":
        zero_ffn(model)
    prepare_model(model, model_settings)
    return model


def _counted_only(scaling: Scaling) -> list[str] | None:
    """Features that are part of a patient's total but are no inputs. They are stored to check the totals of a
    cohort."""
    if scaling.transform != "cpm_log1p" or not scaling.measured:
        return None
    read = set(scaling.features)
    return [name for name in scaling.measured if name not in read]


def load_initial_model(
    settings: TrainSettings, foundation: Mapping[str, nn.Module] | None = None
) -> ExaonePathAlignmentModel:
    """The model of `model.init`, with the objective of the settings."""
    attention = {} if settings.model.attention is None else {"attn_implementation": settings.model.attention}
    model: ExaonePathAlignmentModel = ExaonePathAlignmentModel.from_pretrained(
        settings.model.init, foundation=foundation, **_objective(settings), **attention
    )
    prepare_model(model, settings.model)
    return model


def prepare_model(model: ExaonePathAlignmentModel, settings: ModelSettings) -> None:
    """Freeze the encoders of `settings.frozen`, and switch on gradient checkpointing if it is set.

    Raises:
        SettingsError: the model has no such modality, or no slide encoder.
    """
    for name in settings.frozen:
        if name not in model.modalities:
            raise SettingsError(f"model.frozen: no modality {name!r}; the model has {', '.join(model.modalities)}")
        model.encoder(name).requires_grad_(False)
    if settings.gradient_checkpointing:
        if WSI not in model.modalities:
            raise SettingsError("model.gradient_checkpointing is for the slide encoder, and the model has none")
        encoder = model.slide_encoder
        # transformers renamed it in version 5.
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable()


def _objective(settings: TrainSettings) -> dict[str, Any]:
    return {
        "rope_mode": settings.model.rope_mode,
        "loss": settings.loss.kind,
        "pairs": settings.loss.pairs,
        "pos_weight": settings.loss.pos_weight,
        "pair_weights": dict(settings.loss.pair_weights),
    }


def _omics_settings(
    tables: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of every encoder, and those in a table named like a modality."""
    own = ("feature_names", "scale", "transform", "clip", "counted_features", "n_patients", "foundation")
    single = {name: dict(value) for name, value in tables.items() if isinstance(value, Mapping)}
    shared = {key: value for key, value in tables.items() if not isinstance(value, Mapping)}
    if strange := sorted(set(single) - set(names)):
        raise ConfigError(f"model.omics.{strange[0]}: no such modality; the cohort has {', '.join(names)}")
    for table in (shared, *single.values()):
        if taken := sorted(set(table) & set(own)):
            raise ConfigError(f"model.omics: {', '.join(taken)} follow from the cohort and cannot be set")
    return shared, single
