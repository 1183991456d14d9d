"""Cohorts of patients: molecular tables and slides, read, checked, split, standardised and fed to a model."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from exaonepath.errors import MissingDependencyError

for _package in ("anndata", "pandas", "pyarrow", "scipy"):
    if find_spec(_package) is None:
        raise MissingDependencyError(
            f"cohorts of patients need {_package}, which is not installed: pip install 'exaonepath[train]'"
        )

if TYPE_CHECKING:
    from exaonepath.alignment.data.checks import SCALES
    from exaonepath.alignment.data.cohort import Cohort, load_cohort
    from exaonepath.alignment.data.config import CohortConfig, ModalitySource
    from exaonepath.alignment.data.dataset import PatientDataset, PatientRow, collate_patients
    from exaonepath.alignment.data.manifest import FeatureManifest
    from exaonepath.alignment.data.report import CohortError, CohortReport, Finding
    from exaonepath.alignment.data.sampling import choose_patches, epoch_order
    from exaonepath.alignment.data.slides import Slide, SlideTable
    from exaonepath.alignment.data.splits import Split, split_patients
    from exaonepath.alignment.data.standardizer import OmicsRows, Scaling, Standardizer, StandardizerSettings
    from exaonepath.alignment.data.tables import ModalityTable

# Imported when they are asked for: looking at the header of a table takes none of the packages that a cohort takes.
_MODULES = {
    "checks": "SCALES",
    "cohort": "Cohort load_cohort",
    "config": "CohortConfig ModalitySource",
    "dataset": "PatientDataset PatientRow collate_patients",
    "manifest": "FeatureManifest",
    "report": "CohortError CohortReport Finding",
    "sampling": "choose_patches epoch_order",
    "slides": "Slide SlideTable",
    "splits": "Split split_patients",
    "standardizer": "OmicsRows Scaling Standardizer StandardizerSettings",
    "tables": "ModalityTable",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def _load(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


if not TYPE_CHECKING:
    __getattr__ = _load  # to a type checker, any name would be one of ours


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "SCALES",
    "Cohort",
    "CohortConfig",
    "CohortError",
    "CohortReport",
    "FeatureManifest",
    "Finding",
    "ModalitySource",
    "ModalityTable",
    "OmicsRows",
    "PatientDataset",
    "PatientRow",
    "Scaling",
    "Slide",
    "SlideTable",
    "Split",
    "Standardizer",
    "StandardizerSettings",
    "choose_patches",
    "collate_patients",
    "epoch_order",
    "load_cohort",
    "split_patients",
]
