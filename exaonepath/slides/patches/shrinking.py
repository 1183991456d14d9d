"""How far a level that is much finer than wanted is shrunk before it is segmented.

The Laplacian and the median of the segmentation are designed for an image of about 64x. At full resolution they find no
texture in stained tissue, or only spots of it.
"""

from __future__ import annotations

from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.saturation import WHITE_BAND

WANTED_DOWNSAMPLE = 64
NEARLY_FULL = WANTED_DOWNSAMPLE / 8  # a level with a smaller downsample is checked for overlooked tissue
_SMALLEST_SHRUNK = 8 * WHITE_BAND


def is_much_finer(factor: float) -> bool:
    """Whether a downsample is so far from the wanted one that shrinking may find more."""
    return factor < WANTED_DOWNSAMPLE / 2


def automatic_shrink(slide: SlideImage) -> int:
    """The factor of `seg_downsample="auto"`: to about 64x if the level that is segmented is much finer, else 1."""
    level = slide.get_best_level_for_downsample(WANTED_DOWNSAMPLE)
    return further_shrink(slide, level, 1) if is_much_finer(max(slide.level_downsamples[level])) else 1


def further_shrink(slide: SlideImage, level: int, shrink: float) -> int:
    """The power of 2 by which a level, shrunk already, must be shrunk further to come near the wanted downsample.

    It is limited, so that the white frame, measured in pixels of the shrunk image, stays a small part of the image.
    """
    factor = max(slide.level_downsamples[level]) * shrink
    side = min(slide.level_dimensions[level]) / shrink
    powers = [2**n for n in range(1, 7) if 2**n * factor <= WANTED_DOWNSAMPLE and side / 2**n >= _SMALLEST_SHRUNK]
    return powers[-1] if powers else 1
