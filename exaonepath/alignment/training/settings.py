"""Settings of a training run, with checks of every value; `settings_file` reads them from files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from exaonepath.alignment.modalities import ROPE_MODES, WSI, check_further
from exaonepath.alignment.training.typed_tables import build_typed
from exaonepath.errors import ConfigError, SettingsError

PRESETS = ("small", "published")
LR_SHARES = ("ffn_lr_share", "omics_lr_share", "projection_lr_share", "slide_projection_lr_share")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DataSettings:
    """Training data; paths in a settings file are relative to its folder.

    Attributes:
        mudata, slides, labels, id_column, patient_ids, scales, missing, min_modalities, check_features: see
            `CohortConfig`.
        tables: modality to the keys of `ModalitySource`, for modalities in separate files.
        modalities: modalities to train with; empty: all of the cohort.
        further_modalities: names of molecular modalities in addition to rna, snp, cnv and methylation, for example
            ["mirna", "protein"]: a modality of `mudata`, or a table in `tables`.
        stratify: label column for a stratified split; None: not stratified.
        split: file of a split (parts "train", "val", "test"); None: a random split from `split_seed`.
        validation_share, test_share: shares of the held-out patients.
        split_seed: seed of the random split.
        site: what tells the site of a patient: a column of the labels, or "tcga" for barcodes; none: a column with a
            usual name, or barcodes (see `data.sites`).
        split_sites: keep all patients of a site in one part of the random split.
        top_variance: modality to the number of features to keep: those with the largest variance in training patients.
        clip: standardised values are clipped to +-clip; 0: no clipping.
        slides_per_step: "one" (a random slide of each patient in each epoch) or "all" (averaged).
        max_patches: largest number of patches of a slide in a training step, whole fragments; 0: all.
        cache_mb: memory for the cache of patch features, per training process, shared with its workers.
    """

    mudata: str | None = None
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    slides: str | None = None
    labels: str | None = None
    id_column: str | None = None
    patient_ids: str = "as_is"
    scales: dict[str, str] = field(default_factory=dict)
    missing: str = "error"
    min_modalities: int = 2
    check_features: str = "full"
    modalities: tuple[str, ...] = ()
    stratify: str | None = None
    split: str | None = None
    validation_share: float = 0.15
    test_share: float = 0.15
    split_seed: int = 0
    site: str | None = None
    split_sites: bool = False
    top_variance: dict[str, int] = field(default_factory=dict)
    clip: float = 10.0
    slides_per_step: str = "one"
    max_patches: int = 0
    cache_mb: int = 1024
    further_modalities: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSettings:
    """The model to train.

    Attributes:
        init: a trained alignment model to start from (a folder); its architecture is used.
        match_by_name: with `init`: allow a cohort that lacks features of the model; they count as the training mean.
        slide_weights: initial weights of the slide encoder (folder or Hub id).
        wsi: keys of the slide encoder's `wsi_cfg`; `input_dim` follows from the features.
        omics: settings of all molecular encoders; a table in it with the name of a modality is for that one only.
        projection_dim: width d of each pair's shared space.
        preset: values of all settings that are not set: "small" (small cohorts), "published" (the published
            architecture), or "auto": chosen by the number of training patients (see `presets`).
        start: initial weights of the linear parts: "random", "cca" (regularised canonical correlation analysis of the
            training patients, see `closed_form_start`), or "auto": that of the preset.
        slide_start_steps: with `start` "cca": steps before the training in which the slide encoder learns what the
            molecular modalities share beyond the mean patch features (see `slide_start`), and twice as many once more
            if they do not clearly help; 0: none; none: that of the preset.
        ffn_start: last layer of the molecular encoders' FFN at the start: "random" or "zero" (the encoder is linear at
            first).
        rope_mode: "full", or an ablation of F-RoPE.
        frozen: encoders that are not trained, by modality.
        gradient_checkpointing: recompute the slide encoder's activations in the backward pass.
        attention: attention backend of the slide encoder; None: automatic.
    """

    init: str | None = None
    match_by_name: bool = False
    slide_weights: str | None = None
    wsi: dict[str, Any] = field(default_factory=dict)
    omics: dict[str, Any] = field(default_factory=dict)
    projection_dim: int = 256
    preset: str = "auto"
    start: str = "auto"
    slide_start_steps: int | None = None
    ffn_start: str = "random"
    rope_mode: str = "full"
    frozen: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    attention: str | None = None


@dataclass(frozen=True)
class LossSettings:
    """The loss: see `ExaonePathAlignmentConfig`."""

    kind: str = "sigmoid"
    pairs: str = "all"
    pos_weight: float | str | None = None
    pair_weights: dict[str, float] = field(default_factory=dict)
    t_init: float = math.log(10)
    b_init: float = -10.0


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warmup and cosine decay.

    Attributes:
        lr: peak learning rate; none: that of the preset. min_lr_share: final learning rate of the cosine, as a share of
            it.
        warmup: steps of linear warmup; a value below 1 is a share of all steps.
        weight_decay: weight decay of matrices; norms, biases, tokens, t and b have none.
        logit_lr_share: learning rate of t and b in multiples of `lr`; their initial values are far from the final ones;
            none: that of the preset.
        ffn_lr_share: learning rate of the FFN of the molecular encoders in multiples of `lr`; none: that of the preset.
        omics_lr_share, projection_lr_share: the same for the rest of the molecular encoders, and for the projections.
        slide_projection_lr_share: the same for both projections of the pairs with the slide; none: that of the preset.
        clip: largest norm of the gradient; 0: no clipping.
        ema: decay of the averaged weights, which are validated and saved; 0: no averaging.
    """

    lr: float | None = None
    min_lr_share: float = 0.01
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    logit_lr_share: float | None = None
    ffn_lr_share: float | None = None
    omics_lr_share: float | None = None
    projection_lr_share: float | None = None
    slide_projection_lr_share: float | None = None
    clip: float = 1.0
    ema: float = 0.0

    @property
    def peak(self) -> float:
        """`lr`, or that of the published preset."""
        return 1e-3 if self.lr is None else self.lr


@dataclass(frozen=True)
class RunSettings:
    """Schedule, device and output of the run.

    Attributes:
        epochs: passes over the training patients. steps: number of optimiser steps, instead of epochs; 0: use epochs.
            If both are 0: those of the preset.
        batch_size: patients of one step, over all processes; 0: that of the preset.
        chunk_size: patients that are encoded together, with gradient caching; 0: the whole batch, or that of the
            preset if `batch_size` is 0 too.
        seed: seed of the initial weights, the order of patients, sub-sampling and dropout.
        precision: "float32", "bfloat16", "float16" (autocast), or "auto": bfloat16 if the device supports it.
        device: "auto", "cpu", "cuda".
        log_every: steps between two rows of metrics.
        validate_every: epochs between validations; 0: only at the end; none: so many that a run has about 20.
        validate_every_steps: steps between further validations, for long epochs; 0: none.
        checkpoint_every: steps between checkpoints; 0: one per epoch.
        keep_checkpoints: number of checkpoints to keep.
        select: metric that selects the best model: "mean_recall@1", or "a->b@k" of one pair and direction.
        num_workers: processes that read slides in advance; 0: read in the training process.
        tensorboard: write event files.
        monitor: check for collapse, dominance and imbalance (see `HealthMonitors`).
    """

    epochs: int = 0
    steps: int = 0
    batch_size: int = 0
    chunk_size: int = 0
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    log_every: int = 1
    validate_every: int | None = None
    validate_every_steps: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    select: str = "mean_recall@1"
    num_workers: int = 0
    tensorboard: bool = True
    monitor: bool = True


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run; each section is a table of the file."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        out: dict[str, Any] = _plain(dataclasses.asdict(self))
        # Settings without further modalities are stored, and hashed, as by versions that had none.
        if not out["data"]["further_modalities"]:
            del out["data"]["further_modalities"]
        return out


# Settings that may change when a run is resumed: none of them has an effect on the weights.
RESUMABLE = ("run.device", "run.log_every", "run.checkpoint_every", "run.keep_checkpoints", "run.num_workers",
             "run.tensorboard", "data.cache_mb", "data.check_features")  # fmt: skip
# Settings that runs of earlier versions lack, with the value that does what those versions did.
_ADDED: dict[str, Any] = {"run.validate_every_steps": 0}


def build_settings(tables: Mapping[str, Any]) -> TrainSettings:
    """Settings from nested mappings, checked.

    Raises:
        ConfigError: a key is unknown, or values have a wrong type or range (all are named).
    """
    settings: TrainSettings = build_typed(TrainSettings, tables)
    _check(settings)
    return settings


def _check(settings: TrainSettings) -> None:
    """Raise one error for all values that are out of range."""
    problems = [
        message
        for section in (_check_data(settings.data), _check_objective(settings), _check_run(settings.run))
        for good, message in section
        if not good
    ]
    if problems:
        raise ConfigError("settings: " + "; ".join(problems))
    select_parts(settings.run.select)


def _check_data(data: DataSettings) -> Iterator[tuple[bool, str]]:
    for name, share in (("validation_share", data.validation_share), ("test_share", data.test_share)):
        yield 0 <= share < 1, f"data.{name} must be in [0, 1), got {share}"
    yield data.validation_share + data.test_share < 1, "data: the held-out shares leave nothing to train on"
    for name in ("max_patches", "cache_mb", "split_seed", "clip"):
        yield getattr(data, name) >= 0, f"data.{name} must not be negative, got {getattr(data, name)}"
    try:
        check_further(data.further_modalities)
    except SettingsError as exc:
        yield False, f"data.further_modalities: {exc}"
    yield len(data.modalities) != 1, "data.modalities: at least two are needed to align"
    yield data.min_modalities >= 2, f"data.min_modalities must be at least 2 to align, got {data.min_modalities}"
    choices = ("one", "all")
    fits = data.slides_per_step in choices
    yield fits, f"data.slides_per_step must be one of {', '.join(choices)}, got {data.slides_per_step!r}"


def _check_objective(settings: TrainSettings) -> Iterator[tuple[bool, str]]:
    model, loss, optimizer = settings.model, settings.loss, settings.optimizer
    modes = ", ".join(ROPE_MODES)
    yield model.rope_mode in ROPE_MODES, f"model.rope_mode must be one of {modes}, got {model.rope_mode!r}"
    yield model.projection_dim >= 1, f"model.projection_dim must be positive, got {model.projection_dim}"
    own = not (model.init and (model.wsi or model.omics or model.slide_weights))
    yield own, "model.init defines the architecture: remove model.wsi, model.omics and model.slide_weights"
    yield loss.kind in ("sigmoid", "softmax"), f"loss.kind must be sigmoid or softmax, got {loss.kind!r}"
    yield loss.pairs in ("all", WSI), f"loss.pairs must be all or wsi, got {loss.pairs!r}"
    weight = loss.pos_weight
    fits = weight is None or weight == "balanced" or (isinstance(weight, float) and weight > 0)
    yield fits, f'loss.pos_weight must be positive, "balanced" or "none", got {weight!r}'
    for name, choices in (
        ("preset", ("auto", *PRESETS)),
        ("start", ("auto", "random", "cca")),
        ("ffn_start", ("random", "zero")),
    ):
        value = getattr(model, name)
        yield value in choices, f"model.{name} must be one of {', '.join(choices)}, got {value!r}"
    yield not (model.init and model.start == "cca"), "model.start = cca is a start of its own: remove model.init"
    yield (
        (model.slide_start_steps or 0) >= 0,
        (f"model.slide_start_steps must not be negative, got {model.slide_start_steps}"),
    )
    yield not (model.slide_start_steps and model.start == "random"), ("model.slide_start_steps needs model.start = cca")
    yield optimizer.lr is None or optimizer.lr > 0, f"optimizer.lr must be positive, got {optimizer.lr}"
    for name in ("warmup", "weight_decay", "clip", "logit_lr_share", *LR_SHARES):
        value = getattr(optimizer, name)
        yield value is None or value >= 0, f"optimizer.{name} must not be negative, got {value}"
    yield 0 <= optimizer.min_lr_share <= 1, f"optimizer.min_lr_share must be in [0, 1], got {optimizer.min_lr_share}"
    yield all(0 <= b < 1 for b in optimizer.betas), f"optimizer.betas must be in [0, 1), got {optimizer.betas}"
    yield 0 <= optimizer.ema < 1, f"optimizer.ema must be in [0, 1), got {optimizer.ema}"


def _check_run(run: RunSettings) -> Iterator[tuple[bool, str]]:
    yield run.epochs >= 0 and run.steps >= 0, "run.epochs and run.steps must not be negative"
    fits = run.batch_size == 0 or run.batch_size >= 2
    yield fits, f"run.batch_size must be at least 2 (one patient has no negatives), got {run.batch_size}"
    for name in ("chunk_size", "validate_every", "validate_every_steps", "checkpoint_every", "num_workers", "seed"):
        yield (getattr(run, name) or 0) >= 0, f"run.{name} must not be negative, got {getattr(run, name)}"
    for name in ("log_every", "keep_checkpoints"):
        yield getattr(run, name) >= 1, f"run.{name} must be positive, got {getattr(run, name)}"
    names = ", ".join(PRECISIONS)
    yield run.precision in PRECISIONS, f"run.precision must be one of {names}, got {run.precision!r}"


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two nested mappings differ, without those of `RESUMABLE`."""
    out: list[str] = []
    for key in sorted(set(a) | set(b)):
        name = prefix + key
        left, right = (table.get(key, _ADDED.get(name)) for table in (a, b))
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            out += differing_keys(left, right, name + ".")
        elif left != right and name not in RESUMABLE:
            out.append(name)
    return out


def select_parts(select: str) -> tuple[str, int]:
    """ "name@k" to (name, k); raises `SettingsError`."""
    name, separator, k = select.rpartition("@")
    if not separator or not k.isdigit() or int(k) not in (1, 5, 10):
        raise SettingsError(f'run.select must be "mean_recall@1" or "wsi->rna@1" (k of 1, 5, 10), got {select!r}')
    return name, int(k)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
