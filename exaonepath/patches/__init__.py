"""Patching: where the tissue of a slide is, and the grid of patches on it."""

from exaonepath.patches.pipeline import PatchSettings, patchfy
from exaonepath.patches.segmentation import SegmentationSettings, Tissue, segment_tissue
from exaonepath.patches.slide import SlideImage
from exaonepath.patches.store import PatchSet, read_patches

__all__ = [
    "PatchSet",
    "PatchSettings",
    "SegmentationSettings",
    "SlideImage",
    "Tissue",
    "patchfy",
    "read_patches",
    "segment_tissue",
]
