"""Settings of a cohort: the files, and properties that the files do not state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from exaonepath.alignment.data.checks import DuplicateFeatures, Missing, scales_of
from exaonepath.alignment.data.dialect import Decimal
from exaonepath.alignment.data.feature_checks import FeatureCheck
from exaonepath.alignment.data.orientation import Orientation
from exaonepath.alignment.data.patient_ids import PatientIds
from exaonepath.alignment.modalities import MODALITIES, OMICS, check_further
from exaonepath.errors import SettingsError

Format = Literal["auto", "matrix", "maf", "gistic", "anndata"]


@dataclass(frozen=True)
class ModalitySource:
    """The file of a modality's table, and properties that the file does not state.

    Attributes:
        path: the file.
        format: "matrix" (CSV, TSV, Parquet with ids), "maf", "gistic", "anndata" (.h5ad, or one modality of an .h5mu);
            "auto": inferred from the file name.
        orientation: orientation of a matrix; see `orient`.
        scale: scale of the numbers, one of `scales_of(modality)`; None: that of the format, or the usual scale.
        key: the modality's name inside an .h5mu file.
        duplicate_features: see `check_table`.
        decimal: decimal separator of a text matrix: "." or ","; "auto": inferred from the numbers, with an error if
            they are ambiguous.
        annotation: names of additional rows or columns of a matrix that are no values. None: those with usual names are
            left out, and others that look like annotation are an error. A list, even an empty one, is complete.
    """

    path: str | os.PathLike[str]
    format: Format = "auto"
    orientation: Orientation = "auto"
    scale: str | None = None
    key: str | None = None
    duplicate_features: DuplicateFeatures = "error"
    decimal: Decimal = "auto"
    annotation: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.annotation, str):
            raise SettingsError(f"annotation is {self.annotation!r}; it must be a list of names")
        if self.annotation is not None:
            object.__setattr__(self, "annotation", tuple(self.annotation))
        _one_of("decimal", self.decimal, get_args(Decimal))
        _one_of("format", self.format, get_args(Format))
        _one_of("orientation", self.orientation, get_args(Orientation))
        _one_of("duplicate_features", self.duplicate_features, get_args(DuplicateFeatures))


@dataclass(frozen=True)
class CohortConfig:
    """Settings of a cohort.

    Attributes:
        mudata: a .h5mu file with modalities named rna, snp, cnv, methylation, or as `further_modalities` (others are
            ignored, with a warning).
        modalities: tables of single modalities; one given here replaces that of `mudata`.
        slides: the table of slides; None: a cohort without slides.
        labels: a table with a column of patient ids and any others; it is combined with the `obs` of `mudata`.
        id_column: the column of ids in `labels`; None: one named patient, Patient_ID, case_id or similar.
        patient_ids: "as_is", or "tcga": ids are barcodes, whose first three fields are the patient id.
        scales: for `mudata`: scales of modalities that do not have the usual scale.
        missing: treatment of single missing values; see `check_table`.
        min_modalities: patients with fewer modalities are left out, with a note that names them.
        feature_dim: input width of the slide encoder; None: any.
        check_features: "full", "again" or "header"; see `read_slides`.
        further_modalities: names of molecular modalities in addition to the four of the paper, such as "mirna" or
            "protein": in `mudata`, or in `modalities`.
    """

    mudata: str | os.PathLike[str] | None = None
    modalities: Mapping[str, ModalitySource] = field(default_factory=dict)
    slides: str | os.PathLike[str] | None = None
    labels: str | os.PathLike[str] | None = None
    id_column: str | None = None
    patient_ids: PatientIds = "as_is"
    scales: Mapping[str, str] = field(default_factory=dict)
    missing: Missing = "error"
    min_modalities: int = 2
    feature_dim: int | None = None
    check_features: FeatureCheck = "full"
    further_modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.further_modalities, str):
            raise SettingsError(f"further_modalities is {self.further_modalities!r}; it must be a list of names")
        object.__setattr__(self, "further_modalities", check_further(self.further_modalities))
        for name in (*self.modalities, *self.scales):
            if name not in self.omics:
                raise SettingsError(
                    f"unknown modality {name!r}; molecular modalities are {', '.join(self.omics)} (name another one in "
                    "further_modalities)"
                )
        given = {**self.scales, **{name: s.scale for name, s in self.modalities.items() if s.scale is not None}}
        for name, scale in given.items():
            if scale not in scales_of(name):
                raise SettingsError(f"scale {scale!r} of {name} is not one of {', '.join(scales_of(name))}")
        _one_of("patient_ids", self.patient_ids, get_args(PatientIds))
        _one_of("missing", self.missing, get_args(Missing))
        _one_of("check_features", self.check_features, get_args(FeatureCheck))
        most = len(MODALITIES) + len(self.further_modalities)
        if not 1 <= self.min_modalities <= most:
            raise SettingsError(f"min_modalities is {self.min_modalities}; it must be 1 to {most}")
        if not (self.mudata or self.modalities or self.slides):
            raise SettingsError("a cohort needs at least one of: mudata, modalities, slides")

    @property
    def omics(self) -> tuple[str, ...]:
        """Names of the molecular modalities that this cohort can have, in order."""
        return (*OMICS, *self.further_modalities)

    @staticmethod
    def from_folder(folder: str | os.PathLike[str], **settings: Any) -> CohortConfig:
        """The cohort of a folder with `cohort.h5mu` and, if they exist, `slides.csv` and `labels.csv`.

        Args:
            folder: the folder.
            settings: any other field.

        Raises:
            SettingsError: the folder has neither `cohort.h5mu` nor `slides.csv`.
        """
        found: dict[str, Any] = {}
        for key, name in (("mudata", "cohort.h5mu"), ("slides", "slides.csv"), ("labels", "labels.csv")):
            if (Path(folder) / name).is_file():
                found[key] = Path(folder) / name
        if not {"mudata", "slides"} & set(found):
            raise SettingsError(f"{folder} has neither cohort.h5mu nor slides.csv; name the files one by one")
        return CohortConfig(**{**found, **settings})

    @staticmethod
    def from_dict(data: Mapping[str, Any], base: str | os.PathLike[str] = ".") -> CohortConfig:
        """A cohort from plain values, as a settings file holds them.

        Args:
            data: fields of this class; each of `modalities` is a path, or a mapping of fields of `ModalitySource`.
            base: the folder that relative paths start from.

        Raises:
            SettingsError: a key is unknown, or a value is not valid.
        """
        data = dict(data)
        _known_keys("the cohort", data, CohortConfig)
        for key in ("mudata", "slides", "labels"):
            if data.get(key) is not None:
                data[key] = Path(base) / data[key]
        sources = {}
        for name, source in dict(data.get("modalities") or {}).items():
            source = dict(source) if isinstance(source, Mapping) else {"path": source}
            _known_keys(f"modality {name!r}", source, ModalitySource)
            if not source.get("path"):
                raise SettingsError(f"modality {name!r} has no path")
            sources[name] = ModalitySource(**{**source, "path": Path(base) / source["path"]})
        return CohortConfig(**{**data, "modalities": sources})


def _known_keys(what: str, data: Mapping[str, Any], kind: type) -> None:
    known = [entry.name for entry in fields(kind)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise SettingsError(f"unknown setting(s) of {what}: {', '.join(unknown)}; known are {', '.join(known)}")


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{what} is {value!r}; it must be one of {', '.join(choices)}")
