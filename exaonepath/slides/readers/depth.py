"""How values of 16 bits become 8 bits: from 0 to the largest value that the number of significant bits allows.

Scanners store 10, 12 or 14 bits in 16. Read as 16 bits, such a slide would be nearly black.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exaonepath.slides import tiff
from exaonepath.slides.scale import ome_attribute

_USUAL = (8, 10, 12, 14, 16)


def stated_bits(directory: tiff.Directory, properties: Mapping[str, str], colours: int) -> tuple[int, str] | None:
    """(number of significant bits, the source of that number), if the file states it.

    Args:
        directory: that of level 0.
        properties: those of the slide, with the OME-XML.
        colours: number of channels that are colours. What alpha and other channels hold says nothing about them.
    """
    text = (ome_attribute(properties, "SignificantBits") or "").strip()
    if text.isdecimal() and 1 <= int(text[:9]) <= 16:
        return int(text), "SignificantBits of its OME-XML"
    largest = max(directory.numbers(tiff.MAX_SAMPLE)[:colours], default=0)
    if 255 < largest < 65535:
        return int(largest).bit_length(), f"MaxSampleValue {largest}"
    return None


def measured_bits(largest: int) -> int:
    """The usual number of bits (8, 10, 12, 14, 16) that the largest of the values needs."""
    return next(bits for bits in _USUAL if largest < 1 << bits)


def scale_to_8_bits(bits: int) -> np.ndarray:
    """uint8 [65536]: round(255 * value / (2^bits - 1)), at most 255."""
    largest = (1 << bits) - 1
    values = np.minimum(np.arange(1 << 16, dtype=np.int64), largest)
    return ((values * 255 + largest // 2) // largest).astype(np.uint8)
