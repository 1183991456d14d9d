"""Cohorts of patients: reading, checks, splits and standardisation of molecular tables and slides, for training."""

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

# Imported at their first use: reading the header of a table needs none of the packages that a cohort needs.
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
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def _load(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


if not TYPE_CHECKING:
    __getattr__ = _load  # hidden from type checkers, which would accept any name


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


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
