"""Alignment of slide embeddings with the molecular modalities of the same patient."""

from exaonepath.alignment.batch import PatientBatch, SlideBatch, SlidePatches
from exaonepath.alignment.modalities import OMICS, WSI
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel, PatientEmbeddings
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig, ExaonePathOmicsEncoderConfig
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
