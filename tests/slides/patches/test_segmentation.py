"""Streaming segmentation against the whole image at once, its memory, and its refusals."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from exaonepath.errors import SettingsError, SlideReadError, SlideSkippedError
from exaonepath.reference.patches import segment_at_once
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches import levels, saturation, segmentation
from exaonepath.slides.patches.levels import LevelReader
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.synthetic import make_slide


class ArraySlide:
    """A one-level slide made of an array, tiled or in the irregular way that only OpenSlide's own cells can read."""

    def __init__(self, image, tiled=True):
        self.image = image
        self.path = Path("array")
        self.level_dimensions = ((image.shape[1], image.shape[0]),)
        self.level_downsamples = ((1.0, 1.0),)
        self.scalar_downsamples = (1.0,)
        self.properties = {f"openslide.level[0].tile-{side}": "16" for side in ("width", "height") if tiled}

    def read_strips(self, location, level, size, rows):
        x, y = location
        for top in range(y, y + size[1], rows):
            yield self.image[top : min(top + rows, y + size[1]), x : x + size[0]].copy()


@pytest.fixture
def tiny_bands(monkeypatch):
    """Bands, pieces, strips and cells so small that every image here has many of each."""
    monkeypatch.setattr(levels, "_PIECE_WIDTH", 32)
    monkeypatch.setattr(levels, "_PIECE_HEIGHT", 16)
    monkeypatch.setattr(levels, "_STRIP_PIXELS", 300)
    monkeypatch.setattr(levels, "CELL", 48)
    monkeypatch.setattr(saturation, "_BAND_PIXELS", 2000)


def mottled(seed, h, w):
    """RGBA with textured, flat, coloured, grey and transparent-black places."""
    rng = np.random.default_rng(seed)
    image = np.full((h, w, 4), 255, np.uint8)
    image[..., :3] = rng.integers(225, 256, (h, w, 3))
    for _ in range(6):
        y, x = rng.integers(0, h), rng.integers(0, w)
        part = image[y : y + rng.integers(5, 90), x : x + rng.integers(5, 90), :3]
        tint, noise = rng.integers(60, 255, 3), int(rng.choice([2, 20, 60]))
        part[:] = np.clip(tint + rng.integers(-noise, noise + 1, part.shape), 0, 255)
    if seed % 3 == 0:
        image[h // 2 :, w // 2 :] = 0
    return image


def assert_same(tissue, contours, holes):
    assert len(tissue.contours) == len(contours)
    for ours, theirs in zip(tissue.contours, contours, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [len(group) for group in tissue.holes] == [len(group) for group in holes]
    for ours, theirs in zip(chain(*tissue.holes), chain(*holes), strict=True):
        np.testing.assert_array_equal(ours, theirs)


SETTINGS = [
    {},
    {"use_otsu": True},
    {"mthresh": 1},
    {"mthresh": 10},
    {"mthresh": 31, "close": 0},
    {"seg_downsample": 2.0},
    {"seg_downsample": 3},
    {"seg_downsample": 1.5},
    {"close": 9, "max_n_holes": 2},
]


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "cells"])
@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(240, 210), (197, 301), (150, 39), (20, 90), (3, 61), (1, 1)], ids=str)
def test_bands_equal_the_whole_image(tiny_bands, shape, kwargs, tiled):
    if min(shape) < kwargs.get("seg_downsample", 1):
        return  # nothing is left of the level: an error, tested below
    settings = SegmentationSettings(a_t=0, a_h=0, **kwargs)
    for seed in range(3):
        image = mottled(seed, *shape)
        tissue = segmentation._segment_level(ArraySlide(image, tiled), 0, settings)
        assert_same(tissue, *segment_at_once(image, (1.0, 1.0), settings))


def test_bands_find_something(tiny_bands):
    tissue = segmentation._segment_level(ArraySlide(mottled(1, 240, 210)), 0, SegmentationSettings(a_t=0, a_h=0))
    assert len(tissue.contours) >= 2


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return {
        "flat": make_slide(folder / "flat.tif", 2600, 2000, levels="flat", vendor="generic", fragments=2),
        "pyramid": make_slide(folder / "pyramid.svs", 5000, 4000),
        "fractional": make_slide(folder / "fractional.tif", 5003, 4001, levels=(1, 2.37, 15.9), vendor="generic"),
        # Wider than one of OpenSlide's cells on a level with a fractional downsample.
        "wide": make_slide(folder / "wide.svs", 12001, 900, levels=(1, 2.37), fragments=4, tile=240),
    }


@pytest.mark.parametrize("shrink", [1, 2, 1.5, 3])
@pytest.mark.parametrize("name", ["flat", "pyramid", "fractional", "wide"])
def test_pieces_are_the_whole_level(slides, name, shrink):
    with SlideImage(slides[name]) as slide, openslide.OpenSlide(slides[name]) as reference:
        for level, size in enumerate(slide.level_dimensions):
            if size[0] * size[1] > 12e6:
                continue
            whole = np.asarray(reference.read_region((0, 0), level, size))[..., :3]
            if shrink > 1:
                small = (int(size[0] / shrink), int(size[1] / shrink))
                whole = cv2.resize(whole, small, interpolation=cv2.INTER_AREA)
            reader = LevelReader(slide, level, shrink)
            assert reader.size == whole.shape[1::-1]
            result = np.zeros_like(whole)
            end = 0
            for top, bottom, pieces in reader.bands():
                assert top == end
                end = bottom
                for x, y, pixels in pieces:
                    result[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels[..., :3]
            assert end == len(whole)
            np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("kwargs", [{}, {"use_otsu": True}, {"seg_downsample": 2}, {"seg_downsample": 1.5}], ids=str)
@pytest.mark.parametrize("name", ["flat", "pyramid", "fractional", "wide"])
def test_slides_equal_the_whole_level(slides, name, kwargs):
    settings = SegmentationSettings(a_t=0.2, a_h=0.01, **kwargs)
    with SlideImage(slides[name]) as slide:
        level = slide.get_best_level_for_downsample(64)
        image = slide.read_region((0, 0), level, slide.level_dimensions[level])
        tissue = segment_tissue(slide, settings)
        assert tissue.seg_level == level
        assert tissue.contours
        assert_same(tissue, *segment_at_once(image, slide.level_downsamples[level], settings))


PEAK = """
import re, sys
from pathlib import Path
from exaonepath.patches import SlideImage, segment_tissue
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
with SlideImage(sys.argv[1]) as slide:
    segment_tissue(slide)  # libraries and thread pools are in memory from here on
for path in sys.argv[2:]:
    with SlideImage(path) as slide:
        level = slide.get_best_level_for_downsample(64)
        w, h = slide.level_dimensions[level]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        assert segment_tissue(slide).contours
        print((status("VmHWM") - before) / (w * h))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak memory")
def test_peak_memory_per_pixel(tmp_path, slides):
    """At most 8 bytes per segmented pixel, everything included: the original takes 32."""
    paths = [
        # One of OpenSlide's cells must be held here: the worst case.
        make_slide(tmp_path / "fractional.tif", 4200, 3300, levels=(1, 1.3), vendor="generic", fragments=2),
        make_slide(tmp_path / "flat.tif", 6000, 4500, levels="flat", vendor="generic", fragments=2),
    ]
    command = [sys.executable, "-c", PEAK, *map(str, [slides["pyramid"], *paths])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if "Permission" in done.stderr:
        pytest.skip("the peak memory of a process cannot be reset here")
    assert done.returncode == 0, done.stderr
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) <= 8, peaks


def test_unreadable_level_falls_back(slides, monkeypatch, caplog):
    with SlideImage(slides["pyramid"]) as slide:
        expected = segment_tissue(slide)
        read = SlideImage.read_strips
        monkeypatch.setattr(SlideImage, "get_best_level_for_downsample", lambda self, factor: 1)

        def broken(self, location, level, size, rows):
            if level == 1:
                raise SlideReadError("level 1 is damaged")
            return read(self, location, level, size, rows)

        monkeypatch.setattr(SlideImage, "read_strips", broken)
        with caplog.at_level(logging.WARNING):
            tissue = segment_tissue(slide)
        assert tissue.seg_level == 2
        assert "level 1 is damaged; segmenting level 2" in caplog.text
        assert_same(tissue, expected.contours, expected.holes)


def test_unreadable_fallback_is_an_error(slides, monkeypatch):
    def broken(self, *args):
        raise SlideReadError("damaged")

    monkeypatch.setattr(SlideImage, "read_strips", broken)
    with SlideImage(slides["pyramid"]) as slide, pytest.raises(SlideReadError, match="damaged"):
        segment_tissue(slide)


def test_other_failures_are_not_retried(slides, monkeypatch):
    def broken(*args):
        raise MemoryError

    monkeypatch.setattr(segmentation, "textured_saturation", broken)
    with SlideImage(slides["pyramid"]) as slide, pytest.raises(MemoryError):
        segment_tissue(slide)


def test_too_many_pixels(slides):
    with SlideImage(slides["flat"]) as slide:
        with pytest.raises(SlideSkippedError, match=re.escape("2600 x 2000 = 5200000 pixels")):
            segment_tissue(slide, SegmentationSettings(max_seg_pixels=5_199_999))
        for limit in (5_200_000, None, 0, -1):
            assert segment_tissue(slide, SegmentationSettings(max_seg_pixels=limit)).contours


def test_nothing_left_of_the_level(slides):
    with SlideImage(slides["pyramid"]) as slide, pytest.raises(SettingsError, match="leaves nothing"):
        segment_tissue(slide, SegmentationSettings(seg_downsample=10_000))


def test_the_tile_cache_comes_back(slides):
    with SlideImage(slides["pyramid"]) as slide:
        slide.set_cache_bytes(5 << 20)
        segment_tissue(slide)
        assert slide.cache_bytes == 5 << 20


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sthresh": -1},
        {"sthresh": 256},
        {"mthresh": -1},
        {"mthresh": 255},
        {"close": -1},
        {"a_t": -1},
        {"a_h": float("nan")},
        {"max_n_holes": -1},
        {"seg_downsample": 0},
        {"seg_downsample": 0.5},
        {"seg_downsample": float("inf")},
    ],
    ids=str,
)
def test_impossible_settings(kwargs):
    with pytest.raises(SettingsError, match=next(iter(kwargs))):
        SegmentationSettings(**kwargs)
