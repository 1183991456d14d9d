"""Slides as they come: doubtful scales, empty tissue, missing tiles, files that change, formats that are none."""

import copy
import errno
import logging
import multiprocessing
import operator
import os
import pickle
import shutil
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor

import cv2
import h5py
import numpy as np
import pytest
import tifffile
import torch

from exaonepath.errors import MemoryLimitError, ScaleError, SlideChangedError, SlideOpenError
from exaonepath.files.features import read_features
from exaonepath.files.patches import write_patches
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.formats import why_not_a_slide, wrong_pixels
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches import segmentation
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.scale import doubts, pixel_size
from exaonepath.slides.tiff import read_tiff
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Level 0 of a synthetic slide, uint8 [h, w, 3], and how many patches its pyramid yields."""
    path = make_slide(tmp_path_factory.mktemp("slide") / "a.svs", 3000, 2200, fragments=2, seed=1)
    with SlideImage(path) as slide:
        whole = slide.read_region((0, 0), 0, slide.dimensions)[..., :3]
        return whole, len(patchfy(slide, tmp_path_factory.mktemp("out"))[1])


def write(path, pixels, **options):
    options = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb", **options}
    tifffile.imwrite(path, pixels, **options)
    return path


OME = {
    "axes": "YXS",
    "PhysicalSizeX": 0.5,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeY": 0.5,
    "PhysicalSizeYUnit": "µm",
}


def test_a_flat_ome_tiff_has_its_scale_and_its_patches(tmp_path, pixels, caplog):
    whole, expected = pixels
    path = write(tmp_path / "flat.ome.tif", whole, ome=True, metadata=OME)
    with SlideImage(path) as slide, caplog.at_level(logging.WARNING):
        assert (slide.mpp, slide.mpp_source, slide.scale_doubts) == (0.5, "OME PhysicalSizeX", ())
        coords = patchfy(slide, tmp_path / "out")[1]
    assert 0.7 * expected < len(coords) < 1.5 * expected
    assert not caplog.text  # found as the original finds it: its result stands


def test_a_flat_slide_without_texture_is_segmented_shrunk(tmp_path, pixels, caplog):
    whole, expected = pixels
    path = write(tmp_path / "soft.ome.tif", cv2.GaussianBlur(whole, (0, 0), 1), ome=True, metadata=OME)
    with caplog.at_level(logging.WARNING):
        coords = patchfy(path, tmp_path / "out")[1]
    assert 0.5 * expected < len(coords) < 1.5 * expected
    assert "0 contours were found at 1x, and after shrinking to 8x" in caplog.text


@pytest.mark.parametrize("tile", [256, 240])
def test_a_flat_slide_on_which_one_spot_hides_the_rest_is_warned_about(tmp_path, pixels, caplog, tile):
    whole, expected = pixels
    soft = cv2.GaussianBlur(whole, (0, 0), 1)
    soft[50:750, 50:750] = np.random.default_rng(0).integers(0, 255, (700, 700, 3))
    path = write(tmp_path / "spot.ome.tif", soft, ome=True, metadata=OME, tile=(tile, tile))
    with caplog.at_level(logging.WARNING):
        coords = patchfy(path, tmp_path / "out")[1]
    assert len(coords) < expected / 2  # the original's result stands
    assert 'tissue would be found after shrinking it (seg_downsample = "auto", or --seg-downsample auto)' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(patchfy(path, tmp_path / "shrunk", seg_downsample="auto")[1]) > 2 * len(coords)
    assert not caplog.text


@pytest.mark.parametrize("levels", ["pyramid", "flat"])
@pytest.mark.parametrize("seed", range(3))
def test_other_slides_are_not_warned_about(tmp_path, caplog, levels, seed):
    path = make_slide(tmp_path / "a.tif", 4000, 3000, levels=levels, vendor="generic", fragments=2, seed=seed)
    with caplog.at_level(logging.WARNING):
        assert len(patchfy(path, tmp_path / "out")[1])
    assert not caplog.text


@pytest.mark.golden
def test_the_flat_ome_tiff_of_the_report(tmp_path, data_dir, golden):
    """0 patches, exit 0 and a vector of zeros before; the same slide with a pyramid has 56."""
    with SlideImage(data_dir / "slides" / "small.svs") as slide:
        whole = slide.read_region((0, 0), 0, slide.dimensions)[..., :3]
    coords = patchfy(write(tmp_path / "flat.ome.tif", whole, ome=True, metadata=OME), tmp_path / "out")[1]
    expected = len(golden("patchfy_small")["coords"])
    assert abs(len(coords) - expected) <= 3


@pytest.mark.parametrize(
    ("unit", "value", "mpp"),
    [("nm", 250, 0.25), ("mm", 0.0005, 0.5), ("μm", 2, 2.0), ("cm", 0.00005, 0.5), ("in", 0.00001, 0.254)],
)
def test_units_of_ome(tmp_path, unit, value, mpp):
    metadata = {**OME, "PhysicalSizeX": value, "PhysicalSizeY": value}
    metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = write(tmp_path / "a.ome.tif", np.full((512, 512, 3), 255, np.uint8), ome=True, metadata=metadata)
    with SlideImage(path) as slide:
        assert slide.mpp == pytest.approx(mpp)


@pytest.mark.parametrize(
    ("text", "mpp"),
    [
        ('<OME><Image><Pixels PhysicalSizeX="0.5"/></Image></OME>', 0.5),
        ('<OME><Image><Pixels PhysicalSizeX="-1"/></Image></OME>', 0.5),
        ('<OME><Image><Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="furlong"/></Image></OME>', 0.5),
        ("<OME><Image>", 0.5),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><OME>&a;<Image><Pixels PhysicalSizeX="0.25"/></Image></OME>', 0.5),
        ("<OME" + "x" * (1 << 25), 0.5),
    ],
    ids=["right", "negative", "unit", "cut", "entities", "huge"],
)
def test_ome_text_of_any_kind(text, mpp):
    assert pixel_size({"openslide.vendor": "generic-tiff", "tiff.ImageDescription": text})[0] == mpp


def ome(*images, **properties):
    """Properties of a generic TIFF of 400 x 300 pixels with these OME images."""
    level = {"openslide.level[0].width": "400", "openslide.level[0].height": "300"}
    text = f"<OME xmlns='x'>{''.join(f'<Image>{image}</Image>' for image in images)}</OME>"
    return {"openslide.vendor": "generic-tiff", "tiff.ImageDescription": text, **level, **properties}


LABEL = '<Pixels SizeX="40" SizeY="30" PhysicalSizeX="9" PhysicalSizeY="9"><TiffData IFD="1"/></Pixels>'
TWICE = '<Pixels SizeX="400" SizeY="300" PhysicalSizeX="9" PhysicalSizeY="9"><TiffData IFD="{}"/></Pixels>'
LEVEL_0 = '<Pixels SizeX="400" SizeY="300" PhysicalSizeX="0.25" PhysicalSizeY="0.25"><TiffData IFD="0"/></Pixels>'
NO_SIZE = '<Pixels PhysicalSizeX="0.25" PhysicalSizeY="0.25"/>'


@pytest.mark.parametrize(
    ("images", "mpp", "says"),
    [
        ((LABEL, LEVEL_0), 0.25, None),
        ((LEVEL_0, LABEL), 0.25, None),
        ((LABEL, LEVEL_0.replace('<TiffData IFD="0"/>', "")), 0.25, None),  # known by its size
        ((TWICE.format(3), LEVEL_0), 0.25, None),  # known by its directory
        ((LABEL.replace("40", "41"), LEVEL_0.replace("400", "401")), 0.25, None),
        ((NO_SIZE, NO_SIZE.replace("0.25", "0.5")), 0.25, "2 images of different pixel sizes"),
        ((NO_SIZE, NO_SIZE), 0.25, None),
        ((TWICE.format(0), LEVEL_0), 9, "2 images of different pixel sizes"),
    ],
)
def test_the_ome_image_of_level_0_counts(images, mpp, says):
    properties = ome(*images)
    assert pixel_size(properties) == (mpp, "OME PhysicalSizeX")
    found = doubts(properties, *pixel_size(properties))
    assert (says in found[0]) if says else found == []


@pytest.mark.parametrize(
    ("tags", "warned"),
    [("0.25", False), ("0.26", False), ("0.27", True), ("0.5", True), ("352.8", False), ("-1", False)],
)
def test_ome_against_the_resolution_tags(tags, warned):
    properties = ome(LEVEL_0, **{"openslide.mpp-x": tags, "openslide.mpp-y": tags})
    found = doubts(properties, *pixel_size(properties))
    assert found == (
        [f"has pixels of 0.25 um by its OME-XML, which is used, and of {tags} um by its resolution tags"] * warned
    )


@pytest.mark.parametrize("declared", ["ISO-8859-1", "UTF-8"])
@pytest.mark.parametrize("stored", ["latin-1", "utf-8", "twice"])
def test_the_micro_sign_in_any_encoding(tmp_path, declared, stored):
    text = (
        f'<?xml version="1.0" encoding="{declared}"?><OME><Image><Pixels PhysicalSizeX="250" PhysicalSizeXUnit="µm"/>'
    )
    text += "</Image></OME>"
    data = text.replace("µ", "Âµ").encode() if stored == "twice" else text.encode(stored)
    path = tmp_path / "a.ome.tif"
    write(path, np.full((300, 300, 3), 255, np.uint8), description=data, metadata=None)
    with SlideImage(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (250, "OME PhysicalSizeX")


def test_an_ome_unit_that_is_no_length_is_warned_about():
    properties = ome('<Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="pixel"/>')
    assert pixel_size(properties) == (0.5, "assumed")
    assert "states a pixel size of '0.25' 'pixel' in its OME-XML" in doubts(properties, 0.5, "assumed")[1]


@pytest.mark.parametrize(
    ("text", "mpp", "warned"),
    [("0.25 um", 0.5, True), ("-0.25", 0.5, True), ("0", 0.5, True), ("inf", 0.5, True), ("0,25", 0.25, False)],
)
def test_an_mpp_that_cannot_be_used_is_warned_about(tmp_path, text, mpp, warned):
    path = tmp_path / "a.svs"
    description = APERIO.replace("MPP = 0.5", f"MPP = {text}")
    write(path, np.full((600, 600, 3), 255, np.uint8), description=description, metadata=None)
    with SlideImage(path) as slide:
        assert slide.mpp == mpp
        said = "; ".join(slide.scale_doubts)
    assert (f"states a pixel size of '{text}'" in said) if warned else not said


def test_ome_text_does_not_take_the_place_of_a_vendors_own_property():
    properties = {"openslide.vendor": "aperio", "openslide.mpp-x": "0.25", "tiff.ImageDescription": "<OME/>"}
    assert pixel_size(properties) == (0.25, "openslide.mpp-x")


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [((300, 300), "INCH", 84.67), ((72, 72), "INCH", 352.8), ((40_000_000, 40_000_000), "CENTIMETER", 0.00025)],
)
def test_the_resolution_of_a_print_is_no_scale(tmp_path, pixels, caplog, resolution, unit, mpp):
    path = write(tmp_path / "print.tif", pixels[0][:600, :600], resolution=resolution, resolutionunit=unit)
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)
    assert f"implausible pixel size, {slide.mpp:g} um (openslide.mpp-x)" in caplog.text
    with pytest.raises(ScaleError, match="strict_scale"):
        patchfy(path, tmp_path / "out", strict_scale=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, "0.25 x 0.5 um"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.2524"}, None),
        ({"openslide.mpp-x": "0.5"}, None),
        ({"openslide.mpp-x": "0.05", "openslide.mpp-y": "0.05"}, None),
        ({"openslide.mpp-x": "10", "openslide.mpp-y": "10"}, None),
        ({"aperio.MPP": "11"}, "implausible"),
        ({"openslide.objective-power": "1000"}, "implausible"),
        ({"openslide.objective-power": "40"}, None),
        ({}, "assuming 0.50 um"),
        ({"openslide.mpp-x": "nan"}, "assuming"),
    ],
)
def test_doubts(properties, says):
    found = doubts(properties, *pixel_size(properties))
    assert (says in found[0]) if says else found == []


@pytest.mark.parametrize(("mpp", "fails"), [("1e-300", True), ("1e308", False), ("1e-9", True)])
def test_a_scale_that_cannot_be_computed_with_ends_its_slide_only(tmp_path, pixels, caplog, monkeypatch, mpp, fails):
    path = write(tmp_path / "a.tif", pixels[0])
    with caplog.at_level(logging.WARNING), SlideImage(path) as slide:
        slide.mpp, slide.mpp_source = pixel_size({"aperio.MPP": mpp})
        assert "implausible" in doubts(slide.properties, slide.mpp, slide.mpp_source)[0]
        if fails:
            with pytest.raises(ScaleError, match=r"aperio\.MPP"):
                patchfy(slide, tmp_path / "out")
        else:
            patchfy(slide, tmp_path / "out")  # the original's own fallback: a patch of 0 pixels is the requested size


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("white", {}, "saturation above the threshold"),
        ("tissue", {"a_t": 1e9}, "smaller than a_t"),
        ("tissue", {"sthresh": 250}, "saturation above the threshold"),
    ],
)
def test_no_patch_has_a_reason(tmp_path, pixels, caplog, kind, options, says):
    data = pixels[0] if kind == "tissue" else np.full((1000, 1000, 3), 245, np.uint8)
    path = write(tmp_path / "a.tif", data, resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    with caplog.at_level(logging.WARNING):
        assert len(patchfy(path, tmp_path / "out", **options)[1]) == 0
    assert "has no patch" in caplog.text
    assert says in caplog.text


def drop_tiles(path, which):
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0 if which(at) else count for at, count in enumerate(tag.value)])


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def with_coordinates_of_before(path, h5, coords):
    """Coordinates of the whole file, for the file as it is now."""
    with SlideImage(path) as slide:
        write_patches(h5, slide, coords, np.zeros(len(coords)), patch_size=256, patch_level=0, settings={})


def test_tiles_of_zero_length_are_missing_patches(tmp_path, pixels, caplog):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    h5, coords, _ = patchfy(path, tmp_path)
    coords = np.concatenate([coords, [[0, 0], [256, 256]]])  # one on a whole tile, one wherever tile 13 of 12 a row is
    drop_tiles(path, lambda at: at % 3 == 0)
    with_coordinates_of_before(path, h5, coords)
    with SlideImage(path) as slide:
        shares = [slide.missing_share(slide.read_image(tuple(xy), 0, (256, 256)), tuple(xy)) for xy in coords.tolist()]
    assert sum(0 < share < 1 for share in shares) > 0
    assert shares[-2] == 1
    with caplog.at_level(logging.WARNING):
        result = extract_features(
            path, h5, tmp_path / "f.h5", Mean(), weights="m", weights_fingerprint="m", num_workers=2
        )
    assert [failure.index for failure in result.failures] == [i for i, share in enumerate(shares) if share == 1]
    assert all("no image data" in failure.reason for failure in read_features(tmp_path / "f.h5").failures)
    partly = sum(0 < share < 1 for share in shares)
    assert f"{partly} of {len(coords)} patches lie partly on tiles without data" in caplog.text


@pytest.mark.parametrize("options", [{}, {"seg_downsample": 3}], ids=["", "shrunk"])
def test_tissue_on_tiles_without_data_is_warned_about(tmp_path, pixels, caplog, options):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    drop_tiles(path, lambda at: at % 12 >= 6)  # the right half
    with caplog.at_level(logging.WARNING):
        (first, stored), again = (patchfy(path, tmp_path, **options)[:2] for _ in range(2))
    assert 0 < len(stored) == len(again[1])
    assert stored[:, 0].max() < 1536
    assert caplog.text.count("the file holds no data for 48.8 % of the segmented level") == 2  # also where it is reused
    with h5py.File(first) as file:
        assert file.attrs["missing_share"] == pytest.approx(1464 / 3000)


def test_a_slide_without_any_data_says_so(tmp_path, pixels, caplog):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    drop_tiles(path, lambda at: True)
    with caplog.at_level(logging.WARNING):
        assert len(patchfy(path, tmp_path)[1]) == 0
    assert "has no patch: the file holds no data for 100 % of level 0" in caplog.text


def test_formats_that_leave_out_background_are_not_warned_about(tmp_path, pixels, caplog):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    drop_tiles(path, lambda at: at % 12 >= 6)
    with SlideImage(path) as slide, caplog.at_level(logging.WARNING):
        for number, vendor in enumerate(("leica", "zeiss", "mirax", "dicom", "philips", "ventana")):
            slide.properties["openslide.vendor"] = vendor
            patchfy(slide, tmp_path / str(number))
    assert not caplog.text


def test_patches_partly_without_data_are_counted_over_the_whole_run(tmp_path, pixels, caplog):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    h5, coords, _ = patchfy(path, tmp_path)
    drop_tiles(path, lambda at: at % 3 == 0)
    with_coordinates_of_before(path, h5, coords)
    options = {"weights": "m", "weights_fingerprint": "m", "num_workers": 0, "batch_size": 4}
    whole = extract_features(path, h5, tmp_path / "whole.h5", Mean(), **options)
    assert whole.n_partly_missing > 2

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(path, h5, tmp_path / "f.h5", Mean(), progress=stop, **options)
    text = f"{whole.n_partly_missing} of {len(coords)} patches lie partly on tiles without data"
    for reused in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            result = extract_features(path, h5, tmp_path / "f.h5", Mean(), **options)
        assert result.n_partly_missing == whole.n_partly_missing
        assert text in caplog.text
        assert result.reused == reused
    assert read_features(tmp_path / "f.h5").attrs["n_partly_missing"] == whole.n_partly_missing


def test_a_patch_without_any_data_is_a_failure(tmp_path, pixels):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    h5, coords, _ = patchfy(path, tmp_path)
    drop_tiles(path, lambda at: True)
    os.utime(path, (0, 0))
    with_coordinates_of_before(path, h5, coords)
    result = extract_features(path, h5, tmp_path / "f.h5", Mean(), weights="m", weights_fingerprint="m", num_workers=0)
    assert (result.n_features, len(result.failures)) == (0, len(coords))


def test_what_lies_outside_the_slide_is_black_and_no_failure(tmp_path, pixels):
    path = write(tmp_path / "a.tif", pixels[0])
    with SlideImage(path) as slide:
        width, height = slide.dimensions
        for corner in ((-100, -100), (width - 50, height - 50), (width + 10, 0), (-300, 0)):
            assert slide.missing_share(slide.read_image(corner, 0, (256, 256)), corner) == 0


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, pixels, how):
    path = write(tmp_path / "a.tif", pixels[0], resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    other = write(tmp_path / "b.tif", pixels[0][::-1].copy(), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    h5 = patchfy(path, tmp_path)[0]
    calls = []

    class Changing(Mean):
        def forward(self, x):
            calls.append(len(x))
            if len(calls) == 2:
                if how == "replaced":
                    other.replace(path)
                else:
                    shutil.copyfile(other, path)
            return super().forward(x)

    with pytest.raises(SlideChangedError, match="replaced or changed"):
        extract_features(path, h5, tmp_path / "f.h5", Changing(), weights="m", weights_fingerprint="m", batch_size=4)
    assert not (tmp_path / "f.h5").exists()
    assert len(calls) <= 3  # a batch may be encoded while the one before it is checked
    # The next run is of the new file, from its beginning.
    h5 = patchfy(path, tmp_path)[0]
    result = extract_features(path, h5, tmp_path / "f.h5", Mean(), weights="m", weights_fingerprint="m", batch_size=4)
    assert result.resumed_from == 0


def test_one_that_changes_while_it_is_segmented_leaves_no_patches(tmp_path, pixels, monkeypatch):
    path = write(tmp_path / "a.tif", pixels[0])
    segment = segmentation._segment

    def changing(*args):
        os.utime(path, (1, 1))
        return segment(*args)

    monkeypatch.setattr(segmentation, "_segment", changing)
    with pytest.raises(SlideChangedError):
        patchfy(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.h5"))


def _name_of(slide):
    return slide.name, slide.read_region((0, 0), 0, (8, 8)).tolist()


def test_a_slide_is_pickled_and_copied_by_its_path(tmp_path, pixels):
    path = write(tmp_path / "a.tif", pixels[0][:600, :600])
    with SlideImage(path) as slide:
        wanted = _name_of(slide)
        for other in (pickle.loads(pickle.dumps(slide)), copy.copy(slide), copy.deepcopy(slide)):  # noqa: S301
            assert _name_of(other) == wanted
            other.close()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(operator.attrgetter("name", "mpp"), slide).result(120) == ("a", slide.mpp)
        data = pickle.dumps(slide)
    os.utime(path, (1, 1))
    with pytest.raises(SlideChangedError):
        pickle.loads(data)  # noqa: S301


def test_a_flat_slide_that_cannot_fit_is_refused_before_anything_is_allocated(tmp_path, monkeypatch):
    path = tmp_path / "huge.tif"
    side = 100_000
    tile = zlib.compress(bytes(4096 * 4096 * 3))  # the same one everywhere, as it is stored
    count = (-(-side // 4096)) ** 2
    tifffile.imwrite(
        path, (tile for _ in range(count)), shape=(side, side, 3), dtype="u1", tile=(4096, 4096), compression="zlib",
        photometric="rgb", bigtiff=True, resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    monkeypatch.setattr(segmentation, "available_host_memory", lambda: 20 << 30)
    with pytest.raises(MemoryLimitError, match=r"80\.\d GB.*--seg-downsample 16"):
        patchfy(path, tmp_path / "out")


def test_what_is_no_slide_says_so(tmp_path):
    (tmp_path / "text.svs").write_text("slide")
    with pytest.raises(SlideOpenError, match="not a slide"):
        SlideImage(tmp_path / "text.svs")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
def test_every_form_of_tiff_is_opened_and_its_tags_are_read(tmp_path, pixels, order, big):
    small, options = pixels[0][:600, :600], {"byteorder": order, "bigtiff": big, "compression": "zlib"}
    path = write(tmp_path / "a.tif", small, **options)
    if order == ">" and not big:  # OpenSlide 4.0 does not open those, the TIFF reader does
        with pytest.raises(SlideOpenError, match="big-endian byte order"):
            SlideImage(path, reader="openslide")
    with SlideImage(path) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (600, 600))[..., :3], small)
    (image,) = read_tiff(path, check_data=True).images
    tags = {tag: image.numbers(tag) for tag in (256, 258, 259, 322)}
    assert tags == {256: (600,), 258: (8, 8, 8), 259: (8,), 322: (256,)}
    path = write(tmp_path / "sixteen.svs", small.astype("u2") * 257, description=APERIO, metadata=None, **options)
    if order == "<" or big:
        with pytest.raises(SlideOpenError, match="16 bits a channel"):
            SlideImage(path, reader="openslide")
    with SlideImage(path) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (600, 600))[..., :3], small)
        assert slide.mpp == 0.5


APERIO = "Aperio Image Library v11\n600x600|AppMag = 20|MPP = 0.5"


@pytest.mark.parametrize("share", [0.0, 0.00003, 0.5, 0.999])
def test_a_truncated_slide_is_called_so(tmp_path, pixels, share):
    path = write(tmp_path / "a.svs", pixels[0][:600, :600], description=APERIO, metadata=None)
    data = path.read_bytes()
    # As scanners write it: the directory comes last.
    (offset,) = struct.unpack_from("<I", data, 4)
    directory, size = data[offset : offset + 2 + 12 * 20], len(data)
    path.write_bytes(data[:4] + struct.pack("<I", size) + data[8:] + directory)
    path.write_bytes(path.read_bytes()[: int(share * size)])
    with pytest.raises(SlideOpenError, match="is truncated|is empty" if share != 0.00003 else "not a slide"):
        SlideImage(path)


def test_a_slide_that_may_not_be_read_is_called_so(tmp_path, pixels, monkeypatch):
    path = write(tmp_path / "a.tif", pixels[0][:600, :600])
    if os.getuid() == 0:  # who may read everything

        def refuse(self, *args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(type(path), "open", refuse)
    path.chmod(0)
    with pytest.raises(SlideOpenError, match=r"a\.tif may not be read \(permission denied\)"):
        SlideImage(path)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_tiffs_raise_nothing_else(tmp_path, pixels, seed):
    path = write(tmp_path / "a.tif", pixels[0][:300, :300], bigtiff=bool(seed % 2), byteorder="<>"[seed // 2 % 2])
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for _ in range(30):
        data[rng.integers(4, 400)] = rng.integers(256)
        path.write_bytes(data)
        read_tiff(path, check_data=True)
        why_not_a_slide(path)
        wrong_pixels(path, {})


@pytest.mark.parametrize("options", [{"compression": "lzw"}, {"compression": "zlib"}, {}])
def test_tiled_tiffs_are_read(tmp_path, pixels, options):
    path = write(tmp_path / "a.tif", pixels[0][:600, :600], **options)
    with SlideImage(path) as slide:
        read = slide.read_region((0, 0), 0, (600, 600))[..., :3].astype(int)
    assert np.abs(read - pixels[0][:600, :600]).max() <= (40 if not options else 0)
