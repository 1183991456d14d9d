"""The pixel size that the user states: it comes before what the file states, is stored, and decides about reuse."""

import copy
import logging

import h5py
import numpy as np
import pytest
import tifffile

from exaonepath.errors import ScaleError, SettingsError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.scale import GIVEN, slide_pixel_size
from exaonepath.slides.stages import checked_patching as _patching
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    """A slide of 0.5 um per pixel."""
    return make_slide(tmp_path_factory.mktemp("slide") / "a.svs", 2000, 1600, fragments=1, seed=3)


def test_it_decides_the_size_of_the_patches_and_is_stored(tmp_path, slide_path):
    h5, coords, _ = patchfy(slide_path, tmp_path, mpp=0.25)
    with h5py.File(h5) as file:
        assert file["coords"].attrs["patch_size"] == 512
        assert (file.attrs["mpp"], file.attrs["mpp_y"], file.attrs["mpp_source"]) == (0.25, 0.25, GIVEN)
    assert len(coords) > 1


def test_a_result_is_used_again_for_the_same_pixel_size_only(tmp_path, slide_path, caplog):
    counts = []
    with caplog.at_level(logging.INFO):
        for mpp in (None, None, 0.25, 0.25, 0.5, None):
            caplog.clear()
            counts.append((len(patchfy(slide_path, tmp_path, mpp=mpp)[1]), "patches taken from" in caplog.text))
    assert [reused for _, reused in counts] == [False, True, False, True, False, False]
    assert counts[0][0] == counts[4][0] > counts[2][0]


def test_the_settings_of_earlier_results_stay_equal():
    assert "mpp" not in PatchSettings().as_json()
    assert PatchSettings(mpp=1).as_json()["mpp"] == 1.0


def test_it_removes_the_doubts_about_what_the_file_states(tmp_path, caplog):
    path = tmp_path / "print.tif"
    image = np.full((600, 600, 3), 240, np.uint8)
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", resolution=(300, 300), resolutionunit="INCH")
    with caplog.at_level(logging.INFO), SlideImage(path, mpp=0.5) as slide:
        assert (slide.mpp, slide.scale_doubts) == (0.5, ())
        assert "pixels of 0.5 x 0.5 um (given); the file states 84.6667 um (openslide.mpp-x)" in caplog.text
        patchfy(slide, tmp_path / "out", strict_scale=True, mpp=0.5)
    with pytest.raises(ScaleError, match=r"implausible.*--mpp"):
        patchfy(path, tmp_path / "out", strict_scale=True)


def test_an_implausible_one_is_doubted_too(tmp_path, slide_path, caplog):
    with pytest.raises(ScaleError, match=r"implausible pixel size, 20 um \(given\)"):
        patchfy(slide_path, tmp_path, mpp=20, strict_scale=True)
    with pytest.raises(ScaleError, match="patch would be"):
        patchfy(slide_path, tmp_path, mpp=1e-9)


@pytest.mark.parametrize("mpp", [0, -0.5, float("nan"), float("inf"), "0.5", True])
def test_what_is_no_pixel_size(tmp_path, slide_path, mpp):
    with pytest.raises(SettingsError, match="positive number"):
        SlideImage(slide_path, mpp=mpp)
    with pytest.raises(SettingsError, match="positive number"):
        patchfy(slide_path, tmp_path, mpp=mpp)
    assert not list(tmp_path.iterdir())


def test_an_open_slide_keeps_its_own(tmp_path, slide_path):
    with SlideImage(slide_path) as slide, pytest.raises(SettingsError, match=r"SlideImage\(path, mpp=0\.25\)"):
        patchfy(slide, tmp_path, mpp=0.25)
    with SlideImage(slide_path, mpp=0.25) as slide:
        again = copy.deepcopy(slide)  # as pickle: opened again from its path
        assert (again.mpp, again.mpp_source) == (0.25, GIVEN)
        again.close()


@pytest.mark.parametrize(
    ("properties", "given", "expected"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, None, (0.25, 0.5, "openslide.mpp-x")),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, 1, (1.0, 1.0, GIVEN)),
        ({"aperio.MPP": "0.25"}, None, (0.25, 0.25, "aperio.MPP")),
        ({}, None, (0.5, 0.5, "assumed")),
        ({}, 0.3, (0.3, 0.3, GIVEN)),
    ],
)
def test_both_axes_and_the_source(properties, given, expected):
    found = slide_pixel_size(properties, given)
    assert (found.x, found.y, found.source) == expected
    assert bool(found.overridden) == (given is not None and bool(properties))


def test_encode_takes_it_with_the_settings_of_the_patches():
    assert _patching({"mpp": 0.25})["mpp"] == 0.25


def test_a_size_of_the_vertical_axis_alone_is_doubted():
    xml = '<OME><Image><Pixels SizeX="600" SizeY="600" PhysicalSizeY="0.25"/></Image></OME>'
    found = slide_pixel_size({"openslide.vendor": "generic-tiff", "tiff.ImageDescription": xml, "openslide.mpp-x": "1"})
    assert (found.x, found.source) == (1.0, "openslide.mpp-x")
    assert any("0.25 um for the vertical axis only" in doubt for doubt in found.doubts)
