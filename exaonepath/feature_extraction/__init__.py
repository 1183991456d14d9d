"""Features of patches: read, preprocess, encode, store; resumable, and outspoken about what could not be read."""

from exaonepath.feature_extraction.extract import ExtractionResult, extract_features
from exaonepath.feature_extraction.preprocessing import PreprocessingConfig, normalise, resize_and_crop
from exaonepath.feature_extraction.reader import PatchBatch, PatchFailure, PatchReader
from exaonepath.feature_extraction.store import FeatureSet, read_features

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
