"""Alignment of slide embeddings with the molecular modalities of the same patient."""

from exaonepath.models.multimodal.alignment import ExaonePathAlignmentModel, PatientEmbeddings
from exaonepath.models.multimodal.batch import PatientBatch, SlideBatch, SlidePatches
from exaonepath.models.multimodal.configuration import (
    OMICS,
    WSI,
    ExaonePathAlignmentConfig,
    ExaonePathOmicsEncoderConfig,
)
from exaonepath.models.multimodal.loss import PairwiseSigmoidLoss, PairwiseSigmoidLossOutput
from exaonepath.models.multimodal.omics import ExaonePathOmicsEncoderModel

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
