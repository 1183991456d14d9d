"""Batches of the alignment model from the cohort and its split."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.data.cohort import Cohort, load_cohort
from exaonepath.alignment.data.config import CohortConfig, ModalitySource
from exaonepath.alignment.data.dataset import PatientDataset
from exaonepath.alignment.data.feature_cache import FeatureCache
from exaonepath.alignment.data.sites import sites_of
from exaonepath.alignment.data.slides import Slide, SlideTable
from exaonepath.alignment.data.splits import Split, split_patients
from exaonepath.alignment.data.standardizer import OmicsRows, Scaling, Standardizer, StandardizerSettings
from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.batch_plan import PlannedChunk
from exaonepath.alignment.training.loading import read_batches
from exaonepath.alignment.training.settings import DataSettings
from exaonepath.alignment.training.step import Chunk
from exaonepath.alignment.training.typed_tables import build_typed
from exaonepath.errors import ConfigError, SettingsError
from exaonepath.files.features import read_features
from exaonepath.text import few

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")


def load_training_cohort(settings: DataSettings) -> Cohort:
    """The cohort of the settings, with their modalities.

    Raises:
        CohortError: it cannot be used; every reason is listed. ConfigError, SettingsError: the settings do not match
            it.
    """
    sources = {}
    for name, table in settings.tables.items():
        where = f"data.tables.{name}."
        if "path" not in table:
            raise ConfigError(f"{where}path is missing")
        sources[name] = build_typed(ModalitySource, table, where)
    cohort = load_cohort(
        CohortConfig(
            mudata=settings.mudata,
            modalities=sources,
            slides=settings.slides,
            labels=settings.labels,
            id_column=settings.id_column,
            patient_ids=settings.patient_ids,  # type: ignore[arg-type]
            scales=settings.scales,
            missing=settings.missing,  # type: ignore[arg-type]
            min_modalities=settings.min_modalities,
            check_features=settings.check_features,  # type: ignore[arg-type]
            further_modalities=settings.further_modalities,
        )
    )
    return restrict_modalities(cohort, settings.modalities, settings.min_modalities)


def restrict_modalities(cohort: Cohort, modalities: Sequence[str], min_modalities: int = 2) -> Cohort:
    """The cohort with only these modalities, and the patients that have enough of them; empty: all modalities.

    Raises:
        SettingsError: the cohort lacks a modality, or no patients are left.
    """
    if unknown := [name for name in modalities if name not in cohort.held]:
        raise SettingsError(
            f"data.modalities: the cohort has no {', '.join(unknown)}; it has {', '.join(cohort.held)} (modalities of "
            "other names are read if data.further_modalities names them)"
        )
    if not modalities:
        return cohort
    part = replace(
        cohort,
        modalities={name: table for name, table in cohort.modalities.items() if name in modalities},
        slides=cohort.slides if WSI in modalities else SlideTable(),
    )
    enough = part.availability().sum(1) >= min_modalities
    if not enough.any():
        raise SettingsError(f"no patient has {min_modalities} of the modalities {', '.join(modalities)}")
    dropped = [p for p, keep in zip(part.patients, enough, strict=True) if not keep]
    if dropped:
        logger.info("%d patients have too few of the chosen modalities: %s", len(dropped), few(dropped))
    return part.subset(p for p, keep in zip(part.patients, enough, strict=True) if keep)


def make_split(cohort: Cohort, settings: DataSettings) -> Split:
    """The split of the settings, with the parts "train", "val" and "test"; the last two may be empty.

    Raises:
        SettingsError: the label does not exist, or there are too few patients. DataFileError: the split file cannot be
            read.
    """
    if settings.split is not None:
        split = load_split(Path(settings.split), cohort)
    else:
        labels = None
        if settings.stratify is not None:
            if settings.stratify not in cohort.labels.columns:
                names = ", ".join(map(str, cohort.labels.columns)) or "none"
                raise SettingsError(f"data.stratify: no label {settings.stratify!r}; the cohort has {names}")
            labels = cohort.labels[settings.stratify]
        shares = {"val": settings.validation_share, "test": settings.test_share}
        fractions = {"train": 1 - sum(shares.values()), **{name: share for name, share in shares.items() if share}}
        groups = sites_of(cohort, settings.site) if settings.split_sites else None
        if groups is not None and len(set(groups.values())) < len(fractions):
            raise SettingsError(
                f"data.split_sites: the cohort has {len(set(groups.values()))} sites for {len(fractions)} parts; name "
                "the column that tells the site with data.site"
            )
        split = split_patients(cohort.patients, labels, fractions=fractions, seed=settings.split_seed, groups=groups)
    parts = {name: split.parts.get(name, ()) for name in PARTS}
    if len(parts["train"]) < 2:
        raise SettingsError(f"{len(parts['train'])} patients to train on; at least 2 are needed")
    return Split(parts, split.seed, split.stratified_by)


def load_split(path: Path, cohort: Cohort) -> Split:
    """The split in a file, with the cohort's patients only; a warning names patients that are in no part.

    Raises:
        DataFileError: it cannot be read. SettingsError: a part has another name than "train", "val", "test", or no
            patient of the cohort is in it.
    """
    split = Split.load(path)
    if strange := sorted(set(split.parts) - set(PARTS)):
        raise SettingsError(f"{path} has parts named {', '.join(strange)}; they must be {', '.join(PARTS)}")
    known = {p for part in split.parts.values() for p in part}
    if not known & set(cohort.patients):
        raise SettingsError(
            f"{path} names {few(sorted(known))}; none of them is in the cohort, which has {few(cohort.patients)}"
        )
    if strange := sorted(set(cohort.patients) - known):
        logger.warning("%d patients are in no part of %s: %s", len(strange), path, few(strange))
    found = split.restricted_to(cohort.patients)
    return Split({name: found.parts.get(name, ()) for name in PARTS}, found.seed, found.stratified_by)


def fit_standardizer(cohort: Cohort, split: Split, settings: DataSettings) -> Standardizer:
    """A standardizer with means and deviations of the training patients."""
    options = StandardizerSettings(settings.top_variance, settings.clip or None, settings.further_modalities)
    return Standardizer.fit(cohort, split["train"], options)[0]


def standardizer_of(model: ExaonePathAlignmentModel) -> Standardizer:
    """The standardizer in a model; raises `SettingsError` if a foundation model reads profiles as measured."""
    scalings, clips = {}, set()
    for name in model.modalities:
        if name == WSI:
            continue
        encoder = model.omics_encoder(name)
        if encoder.foundation_cfg is not None:
            raise SettingsError(f"{name}: profiles go to the foundation model as measured; there is no standardizer")
        clips.add(encoder.clip)
        mean, std = encoder.mean.float().cpu().numpy(), encoder.std.float().cpu().numpy()
        scalings[name] = Scaling(
            encoder.feature_names, encoder.scale, encoder.transform, mean, std, encoder.n_patients, encoder.measured
        )
    if len(clips) > 1:
        raise SettingsError(f"the modalities of the model are clipped at different bounds: {sorted(map(str, clips))}")
    return Standardizer(scalings, clips.pop() if clips else None)


def check_features(model: ExaonePathAlignmentModel, cohort: Cohort, *, by_name: bool = False) -> None:
    """Compare the features of a cohort with those of a model.

    Raises:
        WeightsError: the cohort lacks features of the model (named), and `by_name` is False.
        SettingsError: the cohort has no modality of the model, or slides of another feature width.
    """
    common = [name for name in cohort.modalities if name in model.modalities]
    for name in common:
        model.match_features(name, cohort.modalities[name].features, by_name=by_name)
    has_slides = bool(len(cohort.slides)) and WSI in model.modalities
    if not common and not has_slides:
        raise SettingsError(f"the cohort has none of the model's modalities: {', '.join(model.modalities)}")
    if has_slides:
        width = model.config.widths[WSI] - model.slide_encoder.config.wsi["embed_dim"]
        if cohort.slides.dim != width:
            raise SettingsError(f"slide features are {cohort.slides.dim} wide, the model needs {width}")


class Probe(NamedTuple):
    """Patches of one slide: [N, C], [N, 2], [N]."""

    features: Tensor
    coords: Tensor
    contour_index: Tensor


@dataclass
class TrainingData:
    """A cohort, its split, and the standardisation of its values.

    Attributes:
        cohort, split, standardizer: see `exaonepath.alignment.data`.
        settings: settings of the data. seed: seed of the random choices.
        cache: patch features of all slides of the cohort, shared by training, evaluation and their workers.
    """

    cohort: Cohort
    split: Split
    standardizer: Standardizer
    settings: DataSettings
    seed: int

    def __post_init__(self) -> None:
        budget = self.settings.max_patches or None
        self.cache = FeatureCache(self.cohort.slides.slides, self.settings.cache_mb << 20)
        choice: Any = self.settings.slides_per_step
        self._training = PatientDataset(
            self.cohort, self.standardizer, self.train, slides=choice, patch_budget=budget, seed=self.seed,
            cache=self.cache,
        )  # fmt: skip
        self._number = {patient: i for i, patient in enumerate(self._training.cohort.patients)}
        self._evaluation: tuple[tuple[str, ...], PatientDataset] | None = None

    @property
    def train(self) -> tuple[str, ...]:
        """Training patients, sorted."""
        return self.split["train"]

    @property
    def validation(self) -> tuple[str, ...]:
        """Validation patients, sorted."""
        return self.split["val"]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of the cohort that a model can use."""
        return (*((WSI,) if len(self.cohort.slides) else ()), *self.standardizer.scalings)

    @property
    def provenance(self) -> dict[str, Any]:
        """Facts about the data that a trained model stores in its configuration."""
        counts = {name: len(part) for name, part in self.split.parts.items()}
        return {"cohort_hash": self.cohort.fingerprint, "patients": counts}

    def standardized_rows(self, modality: str) -> OmicsRows:
        """Rows of the whole cohort's table of a molecular modality, as inputs of the model."""
        return self._aligned[modality]

    @cached_property
    def _aligned(self) -> dict[str, OmicsRows]:
        return self.standardizer.align(self.cohort)[0]

    @cached_property
    def sites(self) -> dict[str, str]:
        """Patient to site, as far as it is known; raises `SettingsError` if `settings.site` cannot be used."""
        return sites_of(self.cohort, self.settings.site)

    @cached_property
    def probe_slide(self) -> Probe | None:
        """A small validation slide with at least two fragments, to test for leakage between them; None if there is
        none."""
        held_out = set(self.validation)
        slides = [s for s in self.cohort.slides.slides if s.patient in held_out and s.n_patches <= _PROBE_PATCHES]
        for slide in sorted(slides, key=lambda s: s.n_patches)[:_PROBE_TRIES]:
            stored = read_features(slide.features)
            if stored.coords is not None and len(np.unique(stored.contour_index)) > 1:
                return Probe(*(torch.from_numpy(x) for x in (stored.features, stored.coords, stored.contour_index)))
        return None

    def chunks(
        self, plan: Iterable[tuple[int, list[PlannedChunk]]], *, workers: int = 0
    ) -> Iterator[tuple[int, list[Chunk]]]:
        """Read the chunks of a plan of (step, its chunks), with workers that stay until its end."""
        steps, ahead = itertools.tee(plan)  # the loader is a few chunks ahead of the step
        number = self._number
        requests = (
            (epoch, [number[patient] for patient in patients]) for _, planned in ahead for patients, epoch, _ in planned
        )
        batches = read_batches(self._training, requests, workers=workers)
        for step, planned in steps:
            yield step, [Chunk(next(batches), seed) for _, _, seed in planned]

    def evaluation_batches(
        self, patients: Sequence[str], rows: Sequence[int], size: int, *, workers: int = 0
    ) -> Iterator[tuple[list[int], PatientBatch]]:
        """(rows, batch) of `patients` at `rows`, `size` at a time, with all slides and all patches."""
        dataset = self._evaluation_dataset(tuple(patients))
        place = {patient: i for i, patient in enumerate(dataset.cohort.patients)}
        size = max(size, 1)
        parts = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
        requests = [(0, [place[patients[i]] for i in part]) for part in parts]
        workers = min(workers, len(parts) - 1)  # a worker for a single batch would only add its start
        yield from zip(parts, read_batches(dataset, requests, workers=max(workers, 0)), strict=True)

    def slide_features(self, slide: Slide) -> np.ndarray:
        """All patch features of a slide, float32 [N, D], from the cache if they are in it."""
        return self.cache.read(slide).features.numpy()

    def _evaluation_dataset(self, patients: tuple[str, ...]) -> PatientDataset:
        """A data set with all slides and all patches; the last one is kept."""
        if self._evaluation is None or self._evaluation[0] != patients:
            dataset = PatientDataset(self.cohort, self.standardizer, patients, slides="all", cache=self.cache)
            self._evaluation = patients, dataset
        return self._evaluation[1]


# The test for leakage runs every RoPE block twice. For a slide of this size, the cost is negligible.
_PROBE_PATCHES, _PROBE_TRIES = 4096, 20


def available_counts(cohort: Cohort, patients: Sequence[str]) -> dict[str, int]:
    """Modality to the number of these patients who have it."""
    available = cohort.subset(patients).availability()
    return {name: int(count) for name, count in zip(cohort.columns, np.asarray(available.sum(0)), strict=True)}
