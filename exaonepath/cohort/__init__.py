"""Cohorts of patients: molecular tables and slides, read, checked, split, standardised and fed to a model."""

from exaonepath.errors import MissingDependencyError

try:
    import anndata  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow  # noqa: F401
    import scipy  # noqa: F401
except ImportError as exc:
    raise MissingDependencyError(
        f"cohorts of patients need {exc.name}, which is not installed: pip install 'exaonepath[train]'"
    ) from exc

from exaonepath.cohort.checks import SCALES
from exaonepath.cohort.cohort import Cohort, load_cohort
from exaonepath.cohort.config import MODALITIES, OMICS, WSI, CohortConfig, ModalitySource
from exaonepath.cohort.dataset import (
    PatientBatch,
    PatientDataset,
    PatientRow,
    SlidePatches,
    collate_patients,
    pad_slides,
)
from exaonepath.cohort.manifest import FeatureManifest
from exaonepath.cohort.report import CohortError, CohortReport, Finding
from exaonepath.cohort.sampling import choose_patches, epoch_order
from exaonepath.cohort.slides import Slide, SlideTable
from exaonepath.cohort.splits import Split, split_patients
from exaonepath.cohort.standardizer import OmicsRows, Scaling, Standardizer, StandardizerSettings
from exaonepath.cohort.tables import ModalityTable

__all__ = [
    "MODALITIES",
    "OMICS",
    "SCALES",
    "WSI",
    "Cohort",
    "CohortConfig",
    "CohortError",
    "CohortReport",
    "FeatureManifest",
    "Finding",
    "ModalitySource",
    "ModalityTable",
    "OmicsRows",
    "PatientBatch",
    "PatientDataset",
    "PatientRow",
    "Scaling",
    "Slide",
    "SlidePatches",
    "SlideTable",
    "Split",
    "Standardizer",
    "StandardizerSettings",
    "choose_patches",
    "collate_patients",
    "epoch_order",
    "load_cohort",
    "pad_slides",
    "split_patients",
]
