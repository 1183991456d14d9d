"""Resizing gives Pillow's bytes with every instruction set, and Pillow itself where they would differ."""

import logging

import numpy as np
import pytest

from exaonepath.ops import resize
from exaonepath.ops.extension import load_extension
from exaonepath.ops.resize import Axis, resize_bilinear, resize_by_pillow

EXTENSION, WHY_NOT = load_extension()
pytestmark = pytest.mark.skipif(EXTENSION is None, reason=WHY_NOT)
ISAS = ["avx512", "avx2", "sse2", "generic"]


def image_of(kind: str, height: int, width: int) -> np.ndarray:
    if kind == "noise":
        return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    if kind == "white":
        return np.full((height, width, 3), 255, np.uint8)
    image = np.zeros((height, width, 3), np.uint8)  # edges: the largest sums and the smallest next to each other
    image[::2, 1::3] = 255
    return image


def whole(length: int, size: int) -> Axis:
    return Axis(0.0, float(length), size, 0, size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["noise", "white", "edges"])
@pytest.mark.parametrize(
    ("length", "axis"),
    [
        (450, Axis(3.625, 446.375, 224, 0, 224)),  # a patch of a 40x slide
        (454, Axis(3.0, 451.0, 224, 0, 224)),
        (300, Axis(0.0, 300.0, 256, 16, 240)),
        (896, Axis(5.25, 890.75, 224, 0, 224)),
        (100, whole(100, 256)),  # enlarged
        (37, whole(37, 37)),  # unchanged
        (1, whole(1, 9)),
        (2, whole(2, 1)),
        (5, Axis(1.3, 4.9, 17, 3, 16)),
        (64, Axis(0.1, 63.7, 3, 1, 2)),  # 43 taps
        (3000, whole(3000, 2)),
    ],
)
def test_equals_pillow(isa, kind, length, axis):
    weights = resize._weights_if_equal(length, length, axis, axis)
    assert weights is not None
    image = image_of(kind, length, length)
    try:
        ours = resize._by_extension(image, *weights, isa)
    except ValueError as exc:
        pytest.skip(str(exc))
    assert np.array_equal(ours, resize_by_pillow(image, axis, axis))


@pytest.mark.parametrize("seed", range(30))
def test_equals_pillow_in_any_geometry(seed):
    """With the extension where it gives Pillow's bytes, with Pillow elsewhere: the result is the same."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 300, 2))
    axes = []
    for length in (height, width):
        start = float(rng.uniform(0, length - 0.5))
        stop = float(rng.uniform(start + 0.4, length))
        size = int(rng.integers(1, 200))
        first = int(rng.integers(0, size))
        axes.append(Axis(start, stop, size, first, int(rng.integers(first + 1, size + 1))))
    image = image_of("noise", height, width)
    assert np.array_equal(resize_bilinear(image, *axes), resize_by_pillow(image, *axes))


def test_parts_of_other_images():
    """Rows that lie apart, and pixels that do: nothing but the part itself is read."""
    large = image_of("noise", 120, 130)
    axis = whole(80, 50)
    for part in (large[20:100, 30:110], large[::-1, ::-1][:80, :80], np.asfortranarray(large)[:80, :80]):
        assert np.array_equal(resize_bilinear(part, axis, axis), resize_by_pillow(part.copy(), axis, axis))


def test_another_pillow_is_used_itself(monkeypatch, caplog):
    """If Pillow gives one other value, its own result is returned, and the reason is logged."""
    axis, image = whole(61, 32), image_of("noise", 61, 61)
    real = resize_by_pillow

    def other(image, rows, columns):
        result = real(image, rows, columns).copy()
        result[-1, -1, -1] ^= 1
        return result

    resize._weights_if_equal.cache_clear()
    monkeypatch.setattr(resize, "resize_by_pillow", other)
    with caplog.at_level(logging.INFO):
        found = resize_bilinear(image, axis, axis)
    assert np.array_equal(found, other(image, axis, axis))
    assert "resized by Pillow" in caplog.text
    resize._weights_if_equal.cache_clear()


def test_another_weight_is_seen(monkeypatch):
    """The last bit of a weight rarely changes a pixel; it is seen in an image of floating-point numbers."""
    real = resize._exact_weights

    def other(length, axis):
        first, weights = real(length, axis)
        weights[7, 1] += 2.0**-22
        return first, weights

    axis = whole(61, 32)
    monkeypatch.setattr(resize, "_exact_weights", other)
    resize._weights_if_equal.cache_clear()
    assert resize._weights_if_equal(61, 61, axis, axis) is None
    resize._weights_if_equal.cache_clear()


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(resize, "load_extension", lambda: (None, "not built"))
    resize._weights_if_equal.cache_clear()
    axis, image = whole(61, 32), image_of("noise", 61, 61)
    assert np.array_equal(resize_bilinear(image, axis, axis), resize_by_pillow(image, axis, axis))
    resize._weights_if_equal.cache_clear()


@pytest.mark.parametrize(
    ("first", "weights", "message"),
    [
        ([0, 9], [[1, 1], [1, 1]], "outside the image"),
        ([-1, 0], [[1, 1], [1, 1]], "outside the image"),
        ([3, 2], [[1, 1], [1, 1]], "not in order"),
        ([0, 1], [[1, 1], [-1, 1]], "negative"),
        ([0, 1], [[1 << 23, 1], [1, 1]], "too large"),
        ([0, 1], [[2**31 - 1, 2**31 - 1], [1, 1]], "too large"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_bad_weights(first, weights, message, swapped):
    image = image_of("noise", 10, 10)
    bad = resize._Weights(np.array(first, np.int32), np.array(weights, np.int32))
    good = resize._Weights(np.zeros(2, np.int32), np.ones((2, 2), np.int32))
    with pytest.raises(ValueError, match=message):
        resize._by_extension(image, *((good, bad) if swapped else (bad, good)))


def test_empty_results_and_bad_sizes():
    image = image_of("noise", 10, 10)
    none = resize._Weights(np.empty(0, np.int32), np.empty((0, 2), np.int32))
    good = resize._Weights(np.zeros(2, np.int32), np.ones((2, 2), np.int32))
    assert resize._by_extension(image, none, good).shape == (0, 2, 3)
    assert resize._by_extension(image, good, none).shape == (2, 0, 3)
    with pytest.raises(ValueError, match="no taps"):
        resize._by_extension(image, good, resize._Weights(np.zeros(2, np.int32), np.empty((2, 0), np.int32)))
    with pytest.raises(ValueError, match="no mmx"):
        resize._by_extension(image, good, good, "mmx")
    with pytest.raises(ValueError, match="no valid size"):
        EXTENSION.resize_rgb(image.ctypes.data, 10, 10, 29, good.pointers(), good.pointers(), image.ctypes.data)
