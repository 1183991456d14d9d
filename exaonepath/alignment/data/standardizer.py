"""Conversion of measured values to model inputs: a transform, then standardisation per feature.

The statistics are fitted on training patients only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from exaonepath.alignment.data.cohort import Cohort
from exaonepath.alignment.data.count_totals import check_totals
from exaonepath.alignment.data.manifest import FeatureManifest
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.modalities import OMICS, check_further
from exaonepath.alignment.standardization import standardized, transformed
from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.atomic import atomic_path
from exaonepath.text import few

_FORMAT = "exaonepath-standardizer-1"

# Transform of each scale before the standardisation. Counts are first converted to counts per million of the patient's
# total, so that differences of sequencing depth do not look like biology.
_TRANSFORM = {"counts": "cpm_log1p", "tpm": "log1p"}
# A feature is constant if its standard deviation is below this fraction of its mean: float32 has seven digits.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class StandardizerSettings:
    """Settings of the standardisation.

    Attributes:
        top_variance: modality to the number of features to keep: those with the largest variance, after the transform,
            among the training patients. Other modalities keep all features.
        clip: standardised values are clipped to +-clip; None: no clipping.
        further_modalities: names of modalities in addition to `OMICS`; see `CohortConfig`.
    """

    top_variance: Mapping[str, int] = field(default_factory=dict)
    clip: float | None = 10.0
    further_modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*OMICS, *check_further(self.further_modalities))
        for name, count in self.top_variance.items():
            if name not in known or count < 1:
                raise SettingsError(f"top_variance of {name!r} is {count}; a known modality and 1 or more are needed")
        if self.clip is not None and not self.clip > 0:
            raise SettingsError(f"clip is {self.clip}; it must be positive, or None")


@dataclass(frozen=True, eq=False)
class Scaling:
    """Fitted statistics of one modality.

    Attributes:
        features: F names, in the order of the model's inputs.
        scale: required scale of the numbers ("counts", "beta", ...).
        transform: "none", "log1p" or "cpm_log1p".
        mean, std: float32 [F], after the transform.
        n_patients: number of training patients.
        measured: for counts: all features that are part of a patient's total; empty: not known.
    """

    features: tuple[str, ...]
    scale: str
    transform: str
    mean: np.ndarray
    std: np.ndarray
    n_patients: int
    measured: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Fitted scalings of all modalities.

    Attributes:
        scalings: modality to `Scaling`.
        clip: as in `StandardizerSettings`.
    """

    scalings: Mapping[str, Scaling]
    clip: float | None = 10.0

    @property
    def manifest(self) -> FeatureManifest:
        """The features of a model with these inputs."""
        return FeatureManifest({name: scaling.features for name, scaling in self.scalings.items()})

    @staticmethod
    def fit(
        cohort: Cohort, patients: Iterable[str], settings: StandardizerSettings | None = None
    ) -> tuple[Standardizer, CohortReport]:
        """Fit on the given (training) patients.

        Constant features, and those without a value for any training patient, are dropped and named in the report.

        Raises:
            CohortError: a modality has no training patient, or no feature that varies.
            SettingsError: a patient is not in the cohort.
        """
        settings = settings or StandardizerSettings()
        report = CohortReport()
        training = cohort.subset(patients)
        scalings = {}
        for name, table in training.modalities.items():
            if len(table.patients) < 2:
                report.add(
                    "error",
                    "too-few-patients",
                    name,
                    f"{len(table.patients)} training patient(s) have it, at least 2 are needed; leave the modality out",
                )
                continue
            scaling = _fit(name, table, settings, report)
            if scaling is not None:
                scalings[name] = scaling
        report.log()
        report.raise_errors()
        return Standardizer(scalings, settings.clip), report

    def align(self, cohort: Cohort) -> tuple[dict[str, OmicsRows], CohortReport]:
        """Arrange a cohort's tables in the order of the model's inputs.

        Modalities that the model does not have are left out, and those that the cohort lacks are missing for all
        patients. The report contains both, as well as missing features, and counts with another total than in training.

        Raises:
            CohortError: a modality has no feature in common with the model, or its numbers have another scale.
        """
        report = CohortReport()
        manifest = self.manifest
        rows = {}
        for name, table in cohort.modalities.items():
            scaling = self.scalings.get(name)
            if scaling is None:
                report.add("warning", "unused-modality", name, "the model does not use it; left out")
                continue
            if table.scale != scaling.scale:
                report.add(
                    "error",
                    "other-scale",
                    name,
                    f"the values are {table.scale}, the model was trained on {scaling.scale}; convert them, or declare "
                    "the scale",
                )
            columns = manifest.columns(name, table, report)
            if scaling.transform == "cpm_log1p" and (columns >= 0).any():
                check_totals(name, table, scaling.features, scaling.measured, report)
            rows[name] = OmicsRows(table, scaling, columns, self.clip)
        absent = [name for name in self.scalings if name not in cohort.modalities]
        if absent:
            report.add("note", "absent-modality", "cohort", f"the cohort has no {', '.join(absent)}: taken as missing")
        report.log()
        report.raise_errors()
        return rows, report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: means and deviations as tensors, everything else as JSON in its header.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {}
        facts = {}
        for name, scaling in self.scalings.items():
            tensors[f"{name}.mean"], tensors[f"{name}.std"] = scaling.mean, scaling.std
            facts[name] = {
                "features": list(scaling.features),
                "scale": scaling.scale,
                "transform": scaling.transform,
                "n_patients": scaling.n_patients,
                "measured": list(scaling.measured),
            }
        text = json.dumps({"clip": self.clip, "modalities": facts})
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"format": _FORMAT, "settings": text})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Standardizer:
        """Read a file of `save`.

        Raises:
            DataFileError: the file is missing, damaged, or no standardizer.
        """
        path = Path(path)
        if not path.is_file():
            raise DataFileError(f"{path}: no such file")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise DataFileError(f"{path} is no standardizer of this package ({metadata.get('format')!r})")
                settings = json.loads(metadata["settings"])
                scalings = {}
                for name, facts in settings["modalities"].items():
                    mean, std = file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.std")
                    features = tuple(facts["features"])
                    if not mean.shape == std.shape == (len(features),):
                        raise DataFileError(f"{path}: {len(features)} features of {name}, {mean.shape[0]} means")
                    measured = tuple(facts.get("measured", ()))  # files of earlier versions do not contain it
                    scalings[name] = Scaling(
                        features, facts["scale"], facts["transform"], mean, std, facts["n_patients"], measured
                    )
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as exc:
            raise DataFileError(f"{path} cannot be read as a standardizer ({exc})") from exc
        return Standardizer(scalings, settings["clip"])


@dataclass(frozen=True, eq=False)
class OmicsRows:
    """Model inputs of one modality, computed row by row: the table is not changed, and stays sparse if it is sparse.

    Attributes:
        table: the cohort's table.
        scaling: statistics and transform.
        columns: int64 [F], column of the table for each input, -1 if the table lacks the feature.
        clip: bound of the standardised values.
    """

    table: ModalityTable
    scaling: Scaling
    columns: np.ndarray
    clip: float | None

    def rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [len(rows), F] of table rows: standardised, 0 if the value or the feature is missing."""
        values = _transformed(self.table.rows(rows), self.scaling.transform)[:, self.columns]
        mean, std = torch.from_numpy(self.scaling.mean), torch.from_numpy(self.scaling.std)
        out = standardized(torch.from_numpy(values), mean, std, self.clip).numpy().astype(np.float32, copy=False)
        out[:, self.columns < 0] = 0
        return out


def _transformed(values: np.ndarray, transform: str) -> np.ndarray:
    return transformed(torch.from_numpy(values), transform).numpy()


def _blocks(table: ModalityTable, transform: str) -> Iterator[np.ndarray]:
    for _, block in table.row_blocks():
        yield _transformed(block, transform).astype(np.float64)


def _fit(name: str, table: ModalityTable, settings: StandardizerSettings, report: CohortReport) -> Scaling | None:
    transform = _TRANSFORM.get(table.scale, "none")
    width = len(table.features)
    count, total = np.zeros(width), np.zeros(width)
    for block in _blocks(table, transform):
        count += (~np.isnan(block)).sum(0)
        total += np.nansum(block, axis=0)
    mean = total / np.maximum(count, 1)
    # A second pass: the difference of sums of squares would lose all digits of a feature that varies little.
    squares = np.zeros(width)
    for block in _blocks(table, transform):
        squares += np.nansum((block - mean) ** 2, axis=0)
    std = np.sqrt(squares / np.maximum(count, 1))
    never = count == 0
    constant = ~never & (std <= _CONSTANT * np.maximum(1.0, np.abs(mean)))
    for code, mask, what in (
        ("all-missing-features", never, "have no value among the training patients"),
        ("constant-features", constant, "are the same for every training patient"),
    ):
        if mask.any():
            names = [table.features[at] for at in np.flatnonzero(mask)]
            report.add(
                "note",
                code,
                name,
                f"{len(names)} feature(s) {what} and were dropped: {few(names)}",
                features=names,
            )
    kept = np.flatnonzero(~never & ~constant)
    if not len(kept):
        report.add("error", "no-varying-feature", name, f"none of its {width} features varies among training patients")
        return None
    top = settings.top_variance.get(name)
    if top is not None and top < len(kept):
        # Ties are sorted by name, so that the choice does not depend on the order of columns.
        order = sorted(kept, key=lambda at: (-std[at], table.features[at]))
        kept = np.sort(np.array(order[:top]))
        report.add("note", "top-variance", name, f"{top} of {width} features kept: those that vary most")
    return Scaling(
        tuple(table.features[at] for at in kept),
        table.scale,
        transform,
        mean[kept].astype(np.float32),
        std[kept].astype(np.float32),
        len(table.patients),
        table.features if transform == "cpm_log1p" else (),
    )
