"""Resizing patches to 256 px and cropping them to 224: the extension against Pillow, whose bytes it gives."""

import numpy as np
import pytest

from exaonepath.ops.resize import Axis, resize_bilinear, resize_by_pillow
from exaonepath.slides.features.preprocessing import PreprocessingConfig, read_window

COUNT = 50


@pytest.mark.parametrize("patch", [300, 506, 1012])
def test_resize(compare, patch):
    """One thread. A patch of 506 px is one of a slide scanned at 40x, of 1012 px at 80x."""
    window = read_window(patch, PreprocessingConfig())
    span = window.span
    axis = Axis(span.box_start, span.box_stop, span.size, span.crop_start, span.crop_start + window.crop)
    image = np.random.default_rng(0).integers(0, 256, (window.size, window.size, 3), np.uint8)
    assert np.array_equal(resize_bilinear(image, axis, axis), resize_by_pillow(image, axis, axis))

    def repeated(work) -> None:
        for _ in range(COUNT):
            work(image, axis, axis)

    compare(f"resize {patch} px", lambda: repeated(resize_bilinear), lambda: repeated(resize_by_pillow), threads=1)
