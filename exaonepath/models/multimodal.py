"""Import path of version 0.1. The code is in `exaonepath.alignment.model`."""

from exaonepath.alignment.model import (
    OMICS,
    WSI,
    ExaonePathAlignmentConfig,
    ExaonePathAlignmentModel,
    ExaonePathOmicsEncoderConfig,
    ExaonePathOmicsEncoderModel,
    PairwiseSigmoidLoss,
    PairwiseSigmoidLossOutput,
    PatientBatch,
    PatientEmbeddings,
    SlideBatch,
    SlidePatches,
)

__all__ = [
    "OMICS",
    "WSI",
    "ExaonePathAlignmentConfig",
    "ExaonePathAlignmentModel",
    "ExaonePathOmicsEncoderConfig",
    "ExaonePathOmicsEncoderModel",
    "PairwiseSigmoidLoss",
    "PairwiseSigmoidLossOutput",
    "PatientBatch",
    "PatientEmbeddings",
    "SlideBatch",
    "SlidePatches",
]
