"""A slide without a patch: the reason, what is stored of it, and automatic shrinking."""

from __future__ import annotations

import json
import logging

import cv2
import h5py
import numpy as np
import pytest
import tifffile

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.patches import Outcome, read_patches
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches import pipeline
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.synthetic import make_slide

SCALE = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}


def write(path, pixels):
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="deflate", photometric="rgb", **SCALE)
    return path


def stored(folder, name):
    return read_patches(folder / "patches" / f"{name}.h5").outcome


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """Level 0 of a slide whose tissue has no texture at full resolution, uint8 [h, w, 3]."""
    path = make_slide(tmp_path_factory.mktemp("slide") / "a.svs", 3000, 2200, fragments=2, seed=1)
    with SlideImage(path) as slide:
        return cv2.GaussianBlur(slide.read_region((0, 0), 0, slide.dimensions)[..., :3], (0, 0), 1)


def white(side=1000):
    return np.full((side, side, 3), 245, np.uint8)


def textured(pixels, y0, y1, x0, x1):
    """Strongly coloured noise on a part of white pixels."""
    rng = np.random.default_rng(0)
    part = pixels[y0:y1, x0:x1]
    part[:] = rng.integers(0, 255, part.shape)
    return pixels


@pytest.mark.parametrize(
    ("pixels", "options", "says"),
    [
        (white(), {}, "no textured pixel of level 0 has a saturation above the threshold of 8"),
        (textured(white(), 0, 20, 0, 1000), {}, "which has 1000 x 1000 pixels, lie in its outer 20 pixels"),
        (textured(white(), 300, 1000, 981, 1000), {}, "lie in its outer 20 pixels"),
        (textured(white(40), 0, 40, 0, 40), {}, "lie in its outer 20 pixels"),
        (textured(white(), 500, 550, 500, 550), {}, "smaller than a_t = 1 allows"),
        (textured(white(), 0, 60, 0, 60), {}, r"smaller than a_t = 1 allows; more lies in its outer 20 pixels"),
        (textured(white(), 200, 900, 200, 900), {"sthresh": 255}, "saturation above the threshold of 255"),
        (textured(white(), 300, 1000, 981, 1000), {"use_otsu": True}, "lie in its outer 20 pixels"),
        (textured(white(), 200, 900, 200, 900), {"mask": "everything"}, "all 9 patches on its 1 contours lie in"),
    ],
)
def test_the_reason_is_logged_stored_and_repeated(tmp_path, caplog, monkeypatch, pixels, options, says):
    path = write(tmp_path / "a.tif", pixels)
    if "mask" in options:
        square = {"type": "Polygon", "coordinates": [[[100, 100], [700, 100], [700, 700], [100, 700]]]}
        (tmp_path / "m.geojson").write_text(json.dumps(square))
        (tmp_path / "e.geojson").write_text(json.dumps(square).replace("100", "0").replace("700", "990"))
        options = {"mask": tmp_path / "m.geojson", "exclude": tmp_path / "e.geojson"}
    for again in (False, True):
        if again:
            monkeypatch.setattr(pipeline, "find_tissue", lambda *args: pytest.fail("the slide was segmented again"))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(patchfy(path, tmp_path / "out", **options)[1]) == 0
        (line,) = [record.message for record in caplog.records if "has no patch" in record.message]
        assert says in line
        assert stored(tmp_path / "out", "a").no_patch in line
    assert len(caplog.records) == 1


def test_both_tries_are_stored_and_the_warning_is_repeated(tmp_path, caplog, soft, monkeypatch):
    path = write(tmp_path / "soft.tif", soft)
    with caplog.at_level(logging.WARNING):
        coords = patchfy(path, tmp_path)[1]
    outcome = stored(tmp_path, "soft")
    assert len(coords)
    assert (outcome.segmenter, outcome.level, outcome.shrink, outcome.no_patch) == ("exaone", 0, 8, "")
    assert outcome.tries == ((0, 1, 0), (0, 8, outcome.contours))
    assert outcome.contours > 0
    (note,) = outcome.notes
    assert "0 contours were found at 1x, and after shrinking to 8x" in note
    first = [record.message for record in caplog.records]
    caplog.clear()
    monkeypatch.setattr(pipeline, "find_tissue", lambda *args: pytest.fail("the slide was segmented again"))
    with caplog.at_level(logging.WARNING):
        patchfy(path, tmp_path)
    assert [record.message for record in caplog.records] == first == [f"{path} {note}"]


def test_two_tries_that_find_nothing_say_both(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        patchfy(write(tmp_path / "a.tif", white(2000)), tmp_path)
    outcome = stored(tmp_path, "a")
    assert outcome.tries == ((0, 1, 0), (0, 8, 0))
    assert "After shrinking to 8x: no textured pixel of level 0 shrunk 8x" in outcome.no_patch


def test_overlooked_tissue_is_a_stored_warning(tmp_path, soft):
    pixels = soft.copy()
    textured(pixels, 50, 750, 50, 750)
    patchfy(write(tmp_path / "spot.tif", pixels), tmp_path)
    (note,) = stored(tmp_path, "spot").notes
    assert 'seg_downsample = "auto", or --seg-downsample auto' in note


def test_auto_shrinks_levels_that_are_much_finer_only(tmp_path, soft, caplog):
    flat = write(tmp_path / "flat.tif", soft)
    pyramid = make_slide(tmp_path / "pyramid.svs", 5000, 4000, fragments=2, seed=1, levels=(1, 4, 32))
    with caplog.at_level(logging.WARNING):
        for path, shrink in ((flat, 8), (pyramid, 1)):
            with SlideImage(path) as slide:
                automatic = segment_tissue(slide, SegmentationSettings(seg_downsample="auto"))
                explicit = segment_tissue(slide, SegmentationSettings(seg_downsample=shrink))
                assert automatic.shrink == shrink
                assert automatic.tries == explicit.tries
                for ours, theirs in zip(automatic.contours, explicit.contours, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
    assert not caplog.text


def test_numbers_of_numpy_are_settings(tmp_path, soft):
    path = write(tmp_path / "a.tif", soft)
    first = patchfy(path, tmp_path, seg_downsample=np.int64(4), sthresh=np.int32(8), save_mask=False)[1]
    assert stored(tmp_path, "a").shrink == 4
    np.testing.assert_array_equal(patchfy(path, tmp_path, seg_downsample=4.0, save_mask=False)[1], first)


def test_auto_is_a_setting_of_its_own(tmp_path, soft):
    values = {
        PatchSettings(segmentation=SegmentationSettings(seg_downsample=s)).as_json()["seg_downsample"]
        for s in (1, 8, "auto")
    }
    assert values == {1.0, 8.0, "auto"}
    hashes = {
        settings_hash(PatchSettings(segmentation=SegmentationSettings(seg_downsample=s)).as_json())
        for s in (1, 8, "auto")
    }
    assert len(hashes) == 3
    for wrong in ("Auto", "8", None, float("nan")):
        with pytest.raises(SettingsError, match="seg_downsample"):
            SegmentationSettings(seg_downsample=wrong)
    with pytest.raises(SettingsError, match="for a given slide"):
        _ = SegmentationSettings(seg_downsample="auto").shrink


@pytest.mark.parametrize("kind", ["exaone", "otsu", "mask"])
def test_the_segmenter_is_stored(tmp_path, soft, kind):
    square = {"type": "Polygon", "coordinates": [[[0, 0], [600, 0], [600, 600]]]}
    (tmp_path / "m.geojson").write_text(json.dumps(square))
    options = {"exaone": {}, "otsu": {"segmenter": "otsu"}, "mask": {"mask": tmp_path / "m.geojson"}}[kind]
    patchfy(write(tmp_path / "a.tif", soft), tmp_path, **options)
    assert stored(tmp_path, "a").segmenter == kind


def test_otsu_by_either_name_is_one_setting(tmp_path, soft, monkeypatch):
    path = write(tmp_path / "a.tif", soft)
    first = patchfy(path, tmp_path, use_otsu=True)[1]
    monkeypatch.setattr(pipeline, "find_tissue", lambda *args: pytest.fail("the slide was segmented again"))
    np.testing.assert_array_equal(patchfy(path, tmp_path, segmenter="otsu")[1], first)


def test_files_that_do_not_state_the_outcome_are_valid(tmp_path, soft, drop_checksums):
    h5_path, coords, _ = patchfy(write(tmp_path / "a.tif", soft), tmp_path)
    with h5py.File(h5_path, "r+") as file:
        drop_checksums(file)
        file.attrs["seg_tries"] = "no JSON"
    with pytest.raises(DataFileError, match="how the tissue was found"):
        read_patches(h5_path)
    with h5py.File(h5_path, "r+") as file:
        for name in Outcome("exaone", 0, 1.0, 0).attributes():
            del file.attrs[name]
    patches = read_patches(h5_path)
    assert patches.outcome is None
    np.testing.assert_array_equal(patches.coords, coords)
