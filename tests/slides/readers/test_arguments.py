"""Regions that cannot be: one typed error, whichever reader reads the slide."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import MemoryLimitError, SettingsError
from exaonepath.slides.image import SlideImage

BAD = {
    "level": ((0, 0), 9, (10, 10), r"has no level 9 \(1 level\)"),
    "negative level": ((0, 0), -1, (10, 10), "has no level -1"),
    "level of another kind": ((0, 0), 0.0, (10, 10), "level must be a whole number, not 0.0"),
    "negative width": ((0, 0), 0, (-5, 5), r"size must not be negative, not \(-5, 5\)"),
    "negative height": ((0, 0), 0, (5, -5), "size must not be negative"),
    "fractions": ((1.5, 2.5), 0, (10, 10), r"location must be two whole numbers, not \(1\.5, 2\.5\)"),
    "fraction of a size": ((0, 0), 0, (10.0, 10), "size must be two whole numbers"),
    "NaN": ((float("nan"), 0), 0, (10, 10), "location must be two whole numbers"),
    "text": ("ab", 0, (10, 10), "location must be two whole numbers, not 'ab'"),
    "three numbers": ((0, 0, 0), 0, (10, 10), "location must be two whole numbers"),
    "one number": (0, 0, (10, 10), "location must be two whole numbers, not 0"),
    "more than 64 bits": ((1 << 70, 0), 0, (10, 10), "outside what can be addressed"),
}


@pytest.fixture(params=["tiff", "fast", "openslide", "image"])
def slide(request, tmp_path, write, pixels):
    if request.param == "image":
        path = tmp_path / "a.png"
        Image.fromarray(pixels).save(path)
    else:
        path = write("a.tif", pixels, byteorder=">" if request.param == "tiff" else "<")
    with SlideImage(path, "openslide" if request.param == "openslide" else "auto") as opened:
        yield opened


def calls(slide, location, level, size):
    yield lambda: slide.read_region(location, level, size)
    yield lambda: slide.read_image(location, level, size)
    yield lambda: slide.read_rgb(location, level, size)
    yield lambda: list(slide.read_strips(location, level, size, 5))


@pytest.mark.parametrize("kind", BAD)
def test_impossible_regions(slide, kind):
    location, level, size, says = BAD[kind]
    for call in calls(slide, location, level, size):
        with pytest.raises(SettingsError, match=says):
            call()


def test_tiles_of_levels_that_do_not_exist(slide):
    for level in (-1, 1):
        with pytest.raises(SettingsError, match=f"has no level {level}"):
            slide.encoded_tile(level, 0, 0)


def test_regions_that_do_not_fit_into_the_memory(slide):
    for call in calls(slide, (0, 0), 0, (1 << 31, 1 << 31)):
        with pytest.raises(MemoryLimitError, match=r"2147483648 x 2147483648 pixels takes .* GB"):
            call()


def test_regions_at_the_limits(slide):
    assert slide.read_region((0, 0), 0, (0, 7)).shape == (7, 0, 4)
    assert slide.read_rgb((0, 0), 0, (0, 0))[0].shape == (0, 0, 3)
    for far in (-(1 << 50), 1 << 50):
        assert slide.read_region((far, far), 0, (3, 3)).max() == 0
    location, size = np.array([5, 6]), np.array([7, 8], np.int32)  # numbers of numpy are whole numbers too
    found = slide.read_rgb(location, np.int64(0), size)[0]
    assert np.array_equal(found, slide.read_region((5, 6), 0, (7, 8))[..., :3])
