"""Import path of EXAONE Path and of version 0.1. The code is in `exaonepath.slides` and `exaonepath.files`."""

from exaonepath.files.patches import PatchSet, read_patches
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.segmentation import Tissue, segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings

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
