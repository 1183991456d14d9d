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

from exaonepath.alignment.data.checks import SCALES
from exaonepath.alignment.data.cohort import Cohort, load_cohort
from exaonepath.alignment.data.config import MODALITIES, OMICS, WSI, CohortConfig, ModalitySource
from exaonepath.alignment.data.dataset import (
    PatientBatch,
    PatientDataset,
    PatientRow,
    SlidePatches,
    collate_patients,
    pad_slides,
)
from exaonepath.alignment.data.manifest import FeatureManifest
from exaonepath.alignment.data.report import CohortError, CohortReport, Finding
from exaonepath.alignment.data.sampling import choose_patches, epoch_order
from exaonepath.alignment.data.slides import Slide, SlideTable
from exaonepath.alignment.data.splits import Split, split_patients
from exaonepath.alignment.data.standardizer import OmicsRows, Scaling, Standardizer, StandardizerSettings
from exaonepath.alignment.data.tables import ModalityTable

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
