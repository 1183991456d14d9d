"""Alignment of slide embeddings with the molecular modalities of the same patient."""

from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel, PatientEmbeddings
from exaonepath.alignment.model.batch import PatientBatch, SlideBatch, SlidePatches
from exaonepath.alignment.model.configuration import (
    OMICS,
    WSI,
    ExaonePathAlignmentConfig,
    ExaonePathOmicsEncoderConfig,
)
from exaonepath.alignment.model.loss import PairwiseSigmoidLoss, PairwiseSigmoidLossOutput
from exaonepath.alignment.model.omics import ExaonePathOmicsEncoderModel

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
