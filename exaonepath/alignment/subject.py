"""The subject of an evaluation: a trained alignment model, a cohort, and the held-out patients."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.dataset import PatientDataset, collate_patients
from exaonepath.alignment.data.formats import modalities_of_mudata
from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.modalities import MODALITIES, WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.data import (
    TrainingData,
    check_features,
    load_split,
    load_training_cohort,
    restrict_modalities,
    standardizer_of,
)
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.settings import DataSettings, build_settings
from exaonepath.alignment.training.settings_file import read_settings
from exaonepath.alignment.training.validation import EmbeddedPatients, embed_patients
from exaonepath.encoders.loading import no_bars
from exaonepath.errors import DataFileError, ExaonePathError, SettingsError
from exaonepath.text import few

logger = logging.getLogger(__name__)

_BATCH = 32
HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class Subject:
    """A model and a cohort.

    Attributes:
        model: the model in evaluation mode.
        data: the cohort, standardised as in training.
        seen: whether the training patients are known from the split; else all patients count as held out.
        processes: the device.
        used: which model it is, in words.
    """

    model: ExaonePathAlignmentModel
    data: TrainingData
    seen: bool
    processes: Processes
    used: str = ""

    @property
    def cohort(self) -> Cohort:
        """The cohort."""
        return self.data.cohort

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of the model that the cohort has."""
        return tuple(name for name in self.model.modalities if name in self.cohort.held)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part to its patients, without empty parts."""
        return {name: ids for name, ids in self.data.split.parts.items() if ids}

    @property
    def held_out(self) -> tuple[str, ...]:
        """Sorted patients that did not train the model."""
        return tuple(sorted(p for name in HELD_OUT for p in self.data.split.parts.get(name, ())))

    def embed(self, patients: Sequence[str]) -> EmbeddedPatients:
        """Embeddings of patients, in their order: all slides, all patches."""
        rows = list(range(len(patients)))
        return embed_patients(
            self.model,
            self.data.evaluation_batches(patients, rows, _BATCH),
            patients,
            autocast=contextlib.nullcontext,
            processes=self.processes,
        )

    def embed_slides(self, patients: Sequence[str]) -> EmbeddedPatients:
        """Embeddings of single slides, all patches: one row per slide, whose id is in `patients` of the result.

        Only the slide modality is available; the order is that of `slides_of`.
        """
        dataset = PatientDataset(self.cohort, self.data.standardizer, patients, slides="rows", cache_bytes=0)
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(dataset), _BATCH):
            rows = [dataset[at] for at in range(start, min(start + _BATCH, len(dataset)))]
            rows = [row for row in rows if row.slides and len(row.slides[0].features)]
            if rows:
                with torch.no_grad():
                    embedded = self.model.embed(collate_patients(rows).to(self.model.loss_device))[WSI]
                found |= dict(zip((row.slides[0].slide for row in rows), embedded.float().cpu().numpy(), strict=True))
        ids = [slide for slide, _ in self.slides_of(patients) if slide in found]
        widths = self.model.config.widths
        modality = {name: np.zeros((len(ids), width), np.float32) for name, width in widths.items()}
        if ids:
            modality[WSI] = np.stack([found[slide] for slide in ids])
        available = {name: np.full(len(ids), name == WSI) for name in widths}
        empty = np.zeros((len(ids), 0), np.float32)
        whole = EmbeddedPatients(tuple(ids), modality, available, empty, ())
        return replace(whole, fused=self.fuse(whole, (WSI,)))

    def slides_of(self, patients: Sequence[str]) -> list[tuple[str, str]]:
        """(slide, patient) of the slides of these patients, sorted."""
        wanted = set(patients)
        return sorted((slide.slide, slide.patient) for slide in self.cohort.slides.slides if slide.patient in wanted)

    def fuse(self, embedded: EmbeddedPatients, modalities: Sequence[str]) -> np.ndarray:
        """Fused embedding float32 [n, D] of patients as if only these modalities were available."""
        device = self.model.loss_device
        embeddings = {name: torch.from_numpy(h).to(device) for name, h in embedded.modality.items()}
        available = {
            name: torch.from_numpy(flags if name in modalities else np.zeros_like(flags))
            for name, flags in embedded.available.items()
        }
        with torch.no_grad():
            fused: np.ndarray = self.model.fuse(embeddings, available).float().cpu().numpy()
        return fused

    def shared_spaces(self, embedded: EmbeddedPatients) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """(i, j) -> unit vectors (u, v) float32 [n, d] of all rows; those of missing modalities have no meaning."""
        device = self.model.loss_device
        h = {name: torch.from_numpy(x).to(device) for name, x in embedded.modality.items()}
        with torch.no_grad():
            return {
                (a, b): (
                    self.model.project(h[a], a, b).float().cpu().numpy(),
                    self.model.project(h[b], b, a).float().cpu().numpy(),
                )
                for a, b in self.model.trained_pairs
            }


def open_subject(
    model: Path,
    cohort: Path | None = None,
    *,
    split: Path | None = None,
    by_name: bool = False,
    device: str = "auto",
    id_column: str | None = None,
) -> Subject:
    """Load a model and the cohort of its evaluation.

    Args:
        model: folder of a run (its best model is used, by the metric that the run selects by, or the final one if
            nothing was validated), or of a model.
        cohort: a folder with cohort.h5mu, slides.csv and labels.csv (those that exist), or a settings file with a table
            `data`; None: the cohort of the run, with its split.
        split: file of a split of `cohort`; None: the training patients of the run do not count as held out.
        by_name: accept a cohort that lacks features of the model; they count as the training mean.
        device: "auto", "cpu", "cuda".
        id_column: the column of the labels with patient ids; None: that of the settings.

    Raises:
        SettingsError: no cohort is given, it has no modality of the model, it has changed since the training, or all
            its patients are training patients.
        DataFileError: the run's files cannot be read. WeightsError: features differ, or the model cannot be loaded.
    """
    if cohort is None and not is_run(model):
        raise SettingsError(f"{model} is a model without a run; name the cohort to evaluate it on")
    loaded, run, processes = load_model(model, device)
    used = describe_model(loaded, run, model)
    logger.info("%s", used)
    known, settings = open_cohort(loaded, run, cohort, by_name=by_name, id_column=id_column)
    if cohort is None and run is not None:
        split = split or run / "split.json"
    if split is not None:
        parts, seen = load_split(split, known), True
    else:
        parts, seen = _apart_from_training(run, loaded, known)
    data = TrainingData(known, parts, standardizer_of(loaded), settings, 0)
    return Subject(loaded, data, seen, processes, used)


def as_subject(
    subject: Subject | str | os.PathLike[str],
    cohort: str | os.PathLike[str] | None = None,
    split: str | os.PathLike[str] | None = None,
) -> Subject:
    """A subject as it is, or `open_subject` of the folder of a run or a model."""
    if isinstance(subject, Subject):
        return subject
    return open_subject(
        Path(subject), None if cohort is None else Path(cohort), split=None if split is None else Path(split)
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run (else: of a model)."""
    return (folder / "settings.json").is_file()


def load_model(folder: Path, device: str) -> tuple[ExaonePathAlignmentModel, Path | None, Processes]:
    """The model of a run or of a model folder, in evaluation mode; the run, if it is one; and the device.

    Raises:
        WeightsError: the model cannot be loaded. DeviceError: the device does not exist.
    """
    run = is_run(folder)
    processes = Processes.start(device)
    with no_bars():
        model: ExaonePathAlignmentModel = ExaonePathAlignmentModel.from_pretrained(best_of(folder) if run else folder)
    model.eval().to(processes.device)
    return model, folder if run else None, processes


def best_of(run: Path) -> Path:
    """The folder of a run's best model, or of its final one if there is no best."""
    return run / "best" if (run / "best").is_dir() else run / "model"


def describe_model(model: ExaonePathAlignmentModel, run: Path | None, folder: Path) -> str:
    """Which model is used, in words."""
    step = model.config.provenance.get("step")
    at = "" if step is None else f", step {step}"
    if run is None:
        return f"{folder}{at}"
    chosen = best_of(run)
    what = "best by validation" if chosen.name == "best" else "final model; nothing was validated"
    return f"{chosen} ({what}{at})"


def open_cohort(
    model: ExaonePathAlignmentModel,
    run: Path | None,
    cohort: Path | None,
    *,
    by_name: bool = False,
    id_column: str | None = None,
) -> tuple[Cohort, DataSettings]:
    """A cohort, or that of the run, restricted to the modalities of a model.

    Raises:
        SettingsError, DataFileError, WeightsError: see `open_subject`.
    """
    column: dict[str, Any] = {} if id_column is None else {"id_column": id_column}
    if cohort is not None:
        # A patient with one modality of the model can be embedded; only training needs two.
        settings = replace(cohort_settings(cohort), modalities=(), min_modalities=1, **column)
        known = load_training_cohort(_with_further(settings, model))
    elif run is not None:
        settings = replace(_run_data(run), **column)
        known = load_training_cohort(settings)
        if known.fingerprint != _stored(run).get("cohort_hash"):
            raise SettingsError(
                f"the cohort has changed since {run} was trained on it, so its split is not valid any more; to "
                "evaluate on the current cohort, name it and a split of it"
            )
    else:
        raise SettingsError("a model without a run has no cohort; name one")
    known = restrict_modalities(known, [n for n in model.modalities if n in known.held], settings.min_modalities)
    check_features(model, known, by_name=by_name)
    return known, settings


def _with_further(settings: DataSettings, model: ExaonePathAlignmentModel) -> DataSettings:
    """The settings with those further modalities of the model that the cohort's .h5mu file has, in the model's scale.

    The check of the scale warns if the values do not look like it.
    """
    wanted = [n for n in model.modalities if n not in MODALITIES and n not in settings.further_modalities]
    if not wanted or settings.mudata is None:
        return settings
    try:
        held = modalities_of_mudata(settings.mudata)
    except ExaonePathError:
        return settings  # the reader of the whole file reports it
    names = tuple(name for name in wanted if name in held)
    scales = {name: model.omics_encoder(name).scale for name in names}
    return replace(
        settings,
        further_modalities=(*settings.further_modalities, *names),
        scales={**scales, **settings.scales},
    )


def _apart_from_training(run: Path | None, model: ExaonePathAlignmentModel, cohort: Cohort) -> tuple[Split, bool]:
    """A split with all patients in "test" except the known training patients, and whether any are known."""
    trained: set[str] = set()
    if run is not None and (run / "split.json").is_file():
        trained = set(Split.load(run / "split.json").parts.get("train", ())) & set(cohort.patients)
        if trained:
            logger.warning(
                "%d of the cohort's patients were used for training and are not held out: %s",
                len(trained),
                few(sorted(trained)),
            )
    elif model.config.provenance.get("cohort_hash") == cohort.fingerprint:
        logger.warning("the model was trained on this cohort; name its split, or all patients count as held out")
    test = tuple(p for p in cohort.patients if p not in trained)
    if not test:
        raise SettingsError("every patient of the cohort was used for training: nobody is held out")
    return Split({"train": tuple(sorted(trained)), "val": (), "test": test}), bool(trained)


def cohort_settings(path: Path) -> DataSettings:
    """Settings with the files of a cohort: a folder with files of the usual names, or a settings file.

    Raises:
        SettingsError: the folder has none of these files. ConfigError: the settings file is not valid.
    """
    if path.is_dir():
        files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
        existing = {key: str(path / name) for key, name in files.items() if (path / name).is_file()}
        if not existing:
            raise SettingsError(f"{path} has none of {', '.join(files.values())}; name a settings file instead")
        return DataSettings(**existing)  # type: ignore[arg-type]
    return read_settings(path).data


def _run_data(run: Path) -> DataSettings:
    return build_settings(_stored(run)["settings"]).data


def _stored(run: Path) -> Mapping[str, Any]:
    try:
        stored: Mapping[str, Any] = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        if not isinstance(stored["settings"], Mapping):
            raise TypeError("settings is no table")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataFileError(f"{run / 'settings.json'} cannot be read ({exc})") from exc
    return stored
