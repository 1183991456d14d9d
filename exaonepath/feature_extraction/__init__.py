"""Import path of EXAONE Path and version 0.1. The code is in `exaonepath.slides.features` and `exaonepath.files`."""

from exaonepath.files.features import FeatureSet, PatchFailure, read_features
from exaonepath.slides.features.extract import ExtractionResult, extract_features
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise, resize_and_crop
from exaonepath.slides.features.reader import PatchBatch, PatchReader

__all__ = [
    "ExtractionResult",
    "FeatureSet",
    "PatchBatch",
    "PatchFailure",
    "PatchReader",
    "PreprocessingConfig",
    "extract_features",
    "normalise",
    "read_features",
    "resize_and_crop",
]
