"""Tissue that the user gives: GeoJSON and images in, contours out, and what does not fit."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import MaskError, OutputCollisionError, SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.outlines import Excluded
from exaonepath.files.patches import read_contours, read_patches
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches import pipeline, tissue
from exaonepath.slides.patches.exclusion import region_of_patches
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.rings import clipped, is_degenerate, strictly_inside
from exaonepath.slides.patches.segmentation import Tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.slides.patches.tissue import TissueSource
from exaonepath.synthetic import make_slide

SIZE = (3000, 2200)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slide") / "case.svs", *SIZE, fragments=2, seed=1)


@pytest.fixture(scope="module")
def ours(slide, tmp_path_factory):
    """The folder of a result with holes."""
    folder = tmp_path_factory.mktemp("ours")
    patchfy(slide, folder, a_t=0.2, a_h=0.01)
    return folder


@pytest.fixture
def apply(slide, tmp_path):
    def run(**options):
        out = tmp_path / "out"
        coords, index = patchfy(slide, out, save_mask=False, **options)[1:]
        return coords, index, read_contours(out / "patches" / "case.h5")

    return run


def polygon(*rings, **properties):
    coordinates = [[*ring, ring[0]] for ring in rings]
    geometry = {"type": "Polygon", "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation", **properties}}


def of_class(name):
    return {"classification": {"name": name, "color": [200, 0, 0]}}


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def write(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def test_our_geojson_given_back_is_the_same_tissue_and_the_same_patches(slide, ours, apply):
    before, original = read_patches(ours / "patches" / "case.h5"), read_contours(ours / "patches" / "case.h5")
    coords, index, outlines = apply(mask=ours / "contours" / "case.geojson")
    np.testing.assert_array_equal(coords, before.coords)
    np.testing.assert_array_equal(index, before.contour_index)
    assert [len(group) for group in outlines.holes] == [len(group) for group in original.holes]
    pairs = zip(
        [*original.contours, *chain(*original.holes)], [*outlines.contours, *chain(*outlines.holes)], strict=True
    )
    for was, now in pairs:
        pictures = [cv2.fillPoly(np.zeros(SIZE[::-1], np.uint8), [ring], 1) for ring in (was, now)]
        assert (pictures[0] == pictures[1]).all()


def test_what_qupath_makes_of_our_geojson_is_the_same(slide, ours, apply, tmp_path):
    """Ids, decimal points, another class, a lock and measurements are added, and the order of members changes."""
    document = json.loads((ours / "contours" / "case.geojson").read_text())
    for number, feature in enumerate(document["features"]):
        feature["id"] = f"5cb7d3a1-0000-4000-8000-{number:012d}"
        rings = feature["geometry"]["coordinates"]
        feature["geometry"]["coordinates"] = [[[float(x), float(y)] for x, y in ring] for ring in rings]
        feature["properties"] |= {"isLocked": True, "measurements": {"Area": 1.5}} | of_class("Tumor")
    (tmp_path / "edited.geojson").write_text(json.dumps(document["features"], indent=2))
    before = read_patches(ours / "patches" / "case.h5")
    coords, index, _ = apply(mask=tmp_path / "edited.geojson", mask_class="tumor")
    np.testing.assert_array_equal(coords, before.coords)
    np.testing.assert_array_equal(index, before.contour_index)


def test_contours_follow_the_order_of_the_polygons(apply, tmp_path):
    two = polygon(box(1000, 100, 1600, 700))
    two["geometry"] = {"type": "MultiPolygon", "coordinates": [two["geometry"]["coordinates"]] * 2}
    path = write(tmp_path / "a.geojson", polygon(box(2000, 100, 2300, 400)), two, polygon(box(0, 0, 256, 256)))
    coords, index, outlines = apply(mask=path)
    assert outlines.contours[0].tolist() == box(2000, 100, 2300, 400)
    corners = [coords[index == i].min(0).tolist() for i in range(4)]
    assert corners == [[2000, 100], [1000, 100], [1000, 100], [0, 0]]  # overlapping regions: patches of both
    assert (coords[index == 1] == coords[index == 2]).all()


def test_holes_and_crossing_outlines_follow_the_even_odd_rule(apply, tmp_path):
    bow_tie = [[0, 0], [1000, 1000], [1000, 0], [0, 1000]]
    path = write(tmp_path / "a.geojson", polygon(bow_tie), polygon(box(1200, 0, 2200, 1000), box(1500, 300, 1900, 700)))
    coords, index, outlines = apply(mask=path, patch_size=32, step_size=32)
    centres = coords + 16
    tie = centres[index == 0]
    above_or_below = np.abs(tie[:, 0] - 500) < np.abs(tie[:, 1] - 500) - 20
    assert len(tie)
    assert not above_or_below.any()  # of the crossing
    rest = centres[index == 1]
    assert not ((rest > [1500, 300]) & (rest < [1900, 700])).all(1).any()
    assert len(outlines.holes[1]) == 1


def test_degenerate_polygons_are_counted_and_ignored(apply, tmp_path, caplog):
    line, point = [[5, 5], [500, 500], [900, 900]], [[3, 3]]
    tiny = [[5.1, 5.1], [5.2, 5.1], [5.2, 5.2]]
    good = polygon(box(100, 100, 600, 600), line, point)
    nothing = {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [[], [[]]]}}
    path = write(tmp_path / "a.geojson", polygon(line), polygon(point), nothing, polygon(tiny), good)
    with caplog.at_level(logging.WARNING):
        _, _, outlines = apply(mask=path)
    assert len(outlines.contours) == 1
    assert outlines.holes == [[]]
    assert "has given regions: 5 of 6 regions of " in caplog.text


def test_polygons_are_rounded_and_cut_at_the_border(apply, tmp_path, caplog):
    path = write(
        tmp_path / "a.geojson",
        polygon([[-500, -50.5], [200.4, -50.5], [200.6, 300.2], [-500, 300]]),
        polygon(box(5000, 5000, 6000, 6000)),
        polygon(box(0, 0, *SIZE)),
    )
    with caplog.at_level(logging.WARNING):
        coords, _, outlines = apply(mask=path)
    assert outlines.contours[0].min(0).tolist() == [0, 0]
    assert outlines.contours[0].max(0).tolist() == [201, 300]
    assert outlines.contours[1].max(0).tolist() == [SIZE[0] - 1, SIZE[1] - 1]
    assert "2 of 3 regions of " in caplog.text
    assert "a.geojson reach beyond" in caplog.text  # the whole slide, as QuPath draws it, does not
    assert "1 of 3 regions of " in caplog.text
    assert "lie outside the slide" in caplog.text
    assert (coords >= 0).all()
    assert (coords < SIZE).all()
    first = [record.message for record in caplog.records]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        apply(mask=path)  # the stored result is used, and the warnings still hold
    assert [record.message for record in caplog.records] == first


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ([polygon(box(40_000, 30_000, 41_000, 31_000))], r"x 40000 to 41000, y 30000 to 31000.*3000 x 2200 pixels"),
        ([polygon(box(-900, -900, -10, -10))], "another slide, or in other units"),
        ([polygon(box(-900, 0, -10, 10)), polygon(box(4000, 0, 5000, 10))], "does not fit"),
        ([], "holds no area"),
        ([polygon([[1, 1], [5, 5]])], "holds no area"),
        ([polygon(box(0, 0, 500, 500), **of_class("Ignore*"))], r"no region of tissue; its classes are Ignore\* \(1\)"),
    ],
)
def test_a_mask_that_selects_nothing_is_an_error(apply, tmp_path, features, says):
    with pytest.raises(MaskError, match=says):
        apply(mask=write(tmp_path / "a.geojson", *features))
    assert not (tmp_path / "out" / "patches" / "case.h5").exists()


def test_classes_select_tissue_and_exclusions(apply, tmp_path, caplog):
    path = write(
        tmp_path / "a.geojson",
        polygon(box(0, 0, 1024, 1024), **of_class("Tumor")),
        polygon(box(1200, 0, 1700, 500), **of_class("Stroma")),
        polygon(box(0, 0, 256, 256), **of_class("Pen")),
        polygon(box(256, 0, 512, 256), **of_class("Excluded")),
        polygon(box(512, 0, 768, 256), **of_class("Ignore*")),
    )
    coords, index, outlines = apply(mask=path, mask_class="Tumor", exclude_class="pen")
    assert len(outlines.contours) == 1
    assert set(index.tolist()) == {0}
    assert [region.reason for region in outlines.excluded] == ["excluded"] * 3
    corners = {tuple(row) for row in coords.tolist()}
    assert (768, 0) in corners
    assert not corners & {(0, 0), (256, 0), (512, 0)}
    _, index, _ = apply(mask=path, overwrite=True)
    assert set(index.tolist()) == {0, 1, 2}
    with pytest.raises(MaskError, match=r"class Muscle; its classes are Tumor \(1\), Stroma"):
        apply(mask=path, mask_class=["Muscle"])
    with caplog.at_level(logging.WARNING):
        apply(mask=path, exclude_class=["Blood", "Pen"])
    assert "no region of class Blood to exclude" in caplog.text


def test_exclusions_leave_the_contours_as_they_are(ours, apply, tmp_path):
    before = read_patches(ours / "patches" / "case.h5")
    ring = polygon(box(300, 300, 1500, 1500), box(600, 600, 1100, 1100))
    coords, index, outlines = apply(a_t=0.2, a_h=0.01, exclude=write(tmp_path / "pen.geojson", ring))
    centres = before.coords + 128
    outside = lambda c, low, high: ((c <= low) | (c >= high)).any(1)  # noqa: E731
    kept = outside(centres, 300, 1500) | ~outside(centres, 600 - 1, 1100 + 1)
    np.testing.assert_array_equal(coords, before.coords[kept])
    np.testing.assert_array_equal(index, before.contour_index[kept])
    assert 0 < len(coords) < len(before)
    assert len(outlines.contours) == len(read_contours(ours / "patches" / "case.h5").contours)


def test_exclusions_come_back_with_our_geojson(slide, apply, tmp_path):
    region = polygon(box(300, 300, 1500, 1500), box(600, 600, 1100, 1100))
    coords, index, _ = apply(exclude=write(tmp_path / "pen.geojson", region))
    again = patchfy(slide, tmp_path / "again", mask=tmp_path / "out" / "contours" / "case.geojson")
    np.testing.assert_array_equal(again[1], coords)
    np.testing.assert_array_equal(again[2], index)


def test_everything_excluded_is_a_result_with_a_reason(apply, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        coords, _, _ = apply(exclude=write(tmp_path / "all.geojson", polygon(box(-10, -10, 4000, 4000))))
    assert len(coords) == 0
    assert "has no patch: all" in caplog.text
    assert "lie in excluded regions" in caplog.text


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("L", size) for size in ((3000, 2200), (750, 550), (47, 34), (47, 35), (46, 34))),
        *((kind, (750, 550)) for kind in ("1", "P", "I;16", "RGBA", "tif")),
    ],
)
def test_an_image_of_any_resolution_is_a_mask(apply, tmp_path, kind, size):
    mask = np.zeros(size[::-1], np.uint8)
    h, w = mask.shape
    mask[h // 4 : h // 2, w // 4 : w // 2] = 3
    mask[5 * h // 16 : 7 * h // 16, 5 * w // 16 : 7 * w // 16] = 0
    mask[3 * h // 4 :, 3 * w // 4 :] = 255
    path = tmp_path / ("a.tif" if kind == "tif" else "a.png")
    if kind == "RGBA":
        image = Image.fromarray(np.dstack([mask * 0, mask, mask * 0, np.full_like(mask, 255)]))
    elif kind == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) << 8)
    elif kind == "1":
        image = Image.fromarray(mask != 0)
    else:
        image = Image.fromarray(mask)
        if kind == "P":
            image.putpalette([255] * 768)  # all white to the eye: the index counts
    image.save(path)
    _, _, outlines = apply(mask=path)
    assert len(outlines.contours) == 2
    inner = outlines.contours[np.argmin([ring[:, 0].min() for ring in outlines.contours])]
    tolerance = 2.5 * SIZE[0] / size[0]
    np.testing.assert_allclose(inner.min(0), [750, 550], atol=tolerance)
    np.testing.assert_allclose(inner.max(0), [1500, 1100], atol=tolerance)
    assert sum(len(group) for group in outlines.holes) == 1


@pytest.mark.parametrize(
    ("shape", "name", "says"),
    [
        ((500, 500), "a.png", r"500 x 500 pixels \(ratio 1\), and the slide 3000 x 2200 \(ratio 1.364\)"),
        ((750, 540), "a.png", "does not fit"),
        ((2200, 3000), "a.tif", "does not fit"),
        ((750, 550), "a.jpg", "is a JPEG"),
        ((750, 550), "a.bmp", "neither GeoJSON"),
        ((750, 550), "empty.png", "holds no area"),
    ],
)
def test_images_that_do_not_fit(apply, tmp_path, shape, name, says):
    mask = np.full(shape[::-1], 0 if name == "empty.png" else 255, np.uint8)
    Image.fromarray(mask).save(tmp_path / name)
    with pytest.raises(MaskError, match=says):
        apply(mask=tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"II*\0" + b"\xff" * 40, b"text"])
def test_images_that_are_damaged(apply, tmp_path, content):
    for name in ("a.png", "a.tif"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MaskError, match="cannot be read as an image"):
            apply(mask=tmp_path / name)


def test_an_image_too_large_to_decode_is_refused(apply, tmp_path, monkeypatch):
    Image.fromarray(np.full((550, 750), 255, np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MaskError, match="too large"):
        apply(mask=tmp_path / "a.png")


def test_a_folder_of_masks(slide, apply, tmp_path, caplog):
    folder = tmp_path / "masks"
    folder.mkdir()
    with pytest.raises(MaskError, match=r"no mask for .*case\.svs \(case\.geojson"):
        apply(mask=folder)
    with caplog.at_level(logging.WARNING):
        apply(exclude=folder)
    assert "none are excluded" in caplog.text
    write(folder / "case.svs.geojson", polygon(box(0, 0, 600, 600)))
    assert set(apply(mask=folder)[1].tolist()) == {0}
    Image.fromarray(np.full((550, 750), 255, np.uint8)).save(folder / "case.png")
    with pytest.raises(MaskError, match="several files"):
        apply(mask=folder)
    with pytest.raises(MaskError, match="no such file"):
        apply(mask=tmp_path / "none.geojson")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_mask_that_is_no_file(apply, tmp_path):
    os.mkfifo(tmp_path / "a.geojson")
    with pytest.raises(MaskError, match="not a regular file"):
        apply(mask=tmp_path / "a.geojson")
    with pytest.raises(MaskError, match=r"cannot be read|no such file"):
        apply(mask="a\0.geojson")


def test_the_slide_is_not_its_own_mask(tmp_path):
    path = make_slide(tmp_path / "case.tif", 1500, 1000, vendor="generic")
    with pytest.raises(MaskError, match="no mask for"):
        patchfy(path, tmp_path / "out", mask=tmp_path)


def test_our_own_output_is_not_overwritten_while_it_is_read(slide, ours, tmp_path):
    shutil.copytree(ours, tmp_path / "out")
    path = tmp_path / "out" / "contours" / "case.geojson"
    before = path.read_bytes()
    with pytest.raises(OutputCollisionError, match="is an input"):
        patchfy(slide, tmp_path / "out", mask=path)
    assert path.read_bytes() == before


def test_qupath_counts_from_the_recorded_area(slide, tmp_path, caplog, monkeypatch):
    """MIRAX and Leica slides: QuPath shows the area within openslide.bounds-*, and its coordinates begin there."""
    shifted = write(tmp_path / "qupath.geojson", polygon(box(0, 0, 600, 600)))
    with SlideImage(slide) as image:
        image.properties |= {"openslide.bounds-x": "1000", "openslide.bounds-y": "500"}
        with caplog.at_level(logging.WARNING):
            patchfy(image, tmp_path / "1", mask=shifted)
        assert "QuPath counts from the recorded area, which begins at (1000, 500)" in caplog.text
        assert read_contours(tmp_path / "1" / "patches" / "case.h5").contours[0].min(0).tolist() == [0, 0]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            coords = patchfy(image, tmp_path / "2", mask=shifted, geojson_origin="bounds")[1]
        assert read_contours(tmp_path / "2" / "patches" / "case.h5").contours[0].min(0).tolist() == [1000, 500]
        written = tmp_path / "2" / "contours" / "case.geojson"
        assert json.loads(written.read_text())["features"][0]["geometry"]["coordinates"][0][0] == [0, 0]
        again = patchfy(image, tmp_path / "3", mask=written)[1]  # our own file states where it counts from
        np.testing.assert_array_equal(again, coords)
        assert not caplog.text
        with pytest.raises(SettingsError, match="geojson_origin"):
            patchfy(image, tmp_path / "4", geojson_origin="QuPath")


def test_a_result_is_used_again_only_with_the_same_mask(slide, apply, tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "a.geojson", polygon(box(0, 0, 600, 600)))
    first = apply(mask=path)[0]
    copy = shutil.copy(path, tmp_path / "b.geojson")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "find_tissue", lambda *args: pytest.fail("the mask was read again"))
        np.testing.assert_array_equal(apply(mask=copy)[0], first)
    with caplog.at_level(logging.WARNING):
        write(path, polygon(box(0, 0, 1200, 600)))
        assert len(apply(mask=path)[0]) > len(first)
    assert "made with other settings (mask)" in caplog.text
    changed = [apply(mask=path, **more)[0] for more in ({"exclude": copy}, {"mask_class": ""})]
    assert len(changed[0]) < len(changed[1])


DEFAULT = "c91fa0173359b2dbade7c9a7495e13c91f1d3aee64abd3fe60dfcf6fb007e6b6"
OTSU = "e2f748d109fb1717f4dd01382f53175c949657e8d1cb94e4cbdbbd71d5e4af4d"
SHRUNK = "fd98fa84b11c1228a0bcabe40721fa6186d70ce3b5334e3e5cd046881075d9ce"


def test_settings_that_existed_before_keep_their_hash():
    def of(**options):
        return settings_hash(PatchSettings(**options).as_json())

    assert of() == of(source=TissueSource()) == DEFAULT
    assert of(segmentation=SegmentationSettings(use_otsu=True)) == of(source=TissueSource("otsu")) == OTSU
    assert of(segmentation=SegmentationSettings(seg_downsample=4)) == SHRUNK


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"segmenter": "mask"}, "needs a mask"),
        ({"segmenter": "otsu", "mask": "x.geojson"}, "takes no mask"),
        ({"segmenter": "nobody"}, "known: exaone, otsu, mask"),
        ({"mask_class": "Tumor"}, "there is none"),
        ({"exclude_class": "Pen"}, "there is none"),
        ({"mask": "x.geojson", "mask_class": [3]}, "must be a name"),
        ({"mask": 3}, "not as int"),
        ({"exclude": [polygon(box(0, 0, 9, 9))]}, "not as list"),
    ],
)
def test_arguments_that_contradict_each_other(slide, tmp_path, options, says):
    with pytest.raises(SettingsError, match=says):
        patchfy(slide, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_points_in_regions_equal_opencvs(tmp_path):
    rng = np.random.default_rng(0)
    points = np.array([(x, y) for x in range(-2, 42) for y in range(-2, 42)], np.int64)
    for _ in range(60):
        ring = rng.integers(0, 40, (rng.integers(3, 25), 2)).astype(np.int32)
        hole = rng.integers(0, 40, (rng.integers(3, 8), 2)).astype(np.int32)
        expected = [
            cv2.pointPolygonTest(ring, (float(x), float(y)), False) > 0
            and cv2.pointPolygonTest(hole, (float(x), float(y)), False) < 0
            for x, y in points
        ]
        np.testing.assert_array_equal(strictly_inside([ring, hole], points), expected)


@pytest.mark.parametrize("patch", [1, 7, 8])
def test_the_first_region_of_a_patch(patch, monkeypatch):
    monkeypatch.setattr("exaonepath.slides.patches.rings._PAIRS", 50)
    rng = np.random.default_rng(patch)
    coords = rng.integers(0, 60, (300, 2)).astype(np.int32)
    regions = [Excluded([rng.integers(0, 60, (9, 2)).astype(np.int32)], "pen") for _ in range(6)]
    found = region_of_patches(coords, patch, regions)
    for (x, y), index in zip(coords.tolist(), found, strict=True):
        centre = (x + patch / 2, y + patch / 2)
        inside = [i for i, r in enumerate(regions) if cv2.pointPolygonTest(r.rings[0], centre, False) > 0]
        assert index == (inside[0] if inside else -1)
    assert (found >= 0).any()
    assert (region_of_patches(coords, patch, []) == -1).all()
    assert len(region_of_patches(coords[:0], patch, regions)) == 0


def test_clipping_keeps_exactly_the_part_on_the_slide():
    rng = np.random.default_rng(0)
    pixels = np.array([(x + 0.25, y + 0.25) for x in range(29) for y in range(19)])
    for _ in range(100):
        ring = rng.integers(-30, 60, (rng.integers(3, 12), 2)).astype(np.float64)
        part = clipped(ring, (30, 20))
        assert ((part >= 0) & (part <= [29, 19])).all()
        for point in pixels[::7]:
            was = cv2.pointPolygonTest(ring.astype(np.float32), point, False)
            now = cv2.pointPolygonTest(part.astype(np.float32), point, False) if len(part) else -1
            assert was == now or was == 0 or abs(cv2.pointPolygonTest(ring.astype(np.float32), point, True)) < 1e-3
    inside = np.array(box(1, 1, 5, 5), float)
    assert clipped(inside, (30, 20)) is inside
    assert not len(clipped(inside + 100, (30, 20)))


def test_rings_without_area():
    assert is_degenerate(np.array([[0, 0], [5, 5]]))
    assert is_degenerate(np.array([[0, 0], [5, 5], [9, 9], [3, 3]]))
    assert is_degenerate(np.array([[4, 4]] * 5))
    assert not is_degenerate(np.array([[0, 0], [5, 5], [9, 9], [3, 4]]))


def fake_plugin(monkeypatch, segmenter, name="deep"):
    point = SimpleNamespace(
        name=name, value="lab:segment", dist=SimpleNamespace(name="lab", version="1.0"), load=lambda: segmenter
    )
    monkeypatch.setattr(tissue, "entry_points", lambda group: [point] if group == "exaonepath.segmenters" else [])
    return point


def test_a_plugin_segments(apply, monkeypatch):
    seen = []

    def segmenter(slide, settings):
        seen.append((slide, settings))
        return Tissue([np.array(box(0, 0, 700, 700))], [[np.array(box(200, 200, 600, 600))]], 0)

    point = fake_plugin(monkeypatch, segmenter)
    _, index, outlines = apply(segmenter="deep", sthresh=20)
    assert isinstance(seen[0][0], SlideImage)
    assert seen[0][1] == SegmentationSettings(sthresh=20)
    assert set(index.tolist()) == {0}
    assert outlines.contours[0].dtype == np.int32
    assert len(outlines.holes[0]) == 1
    apply(segmenter="deep", sthresh=20)
    assert len(seen) == 1  # a stored result is used again
    point.dist.version = "1.1"
    apply(segmenter="deep", sthresh=20)
    assert len(seen) == 2  # another version of the plug-in may give another result
    assert tissue.segmenter_plugins() == ["deep"]


def test_the_plugin_of_the_documentation(slide, apply, monkeypatch, tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "masks.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def segment(" in block]
    shutil.copy(slide, tmp_path / "slide.svs")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    exec(code, names)
    fake_plugin(monkeypatch, names["segment"], "dark")
    coords, _, outlines = apply(segmenter="dark")
    assert len(outlines.contours) == 2
    assert len(coords) > 20


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (([], []), "tuple in place of"),
        (Tissue(None, [], 0), "not a list"),
        (Tissue([np.zeros((5, 2))], [[]], 0), r"not integers \[P, 2\]"),
        (Tissue([np.zeros((5, 3), int)], [[]], 0), r"not integers \[P, 2\]"),
        (Tissue([np.array(box(0, 0, 9, 9))], [], 0), "1 contours with 0 lists"),
        (Tissue([np.array(box(0, 0, 9, 9))], [[np.array([[1, 1]])]], 0), "holes that reach beyond"),
        (Tissue([np.array(box(0, 0, 3000, 9))], [[]], 0), "contours that reach beyond"),
        (Tissue([], [], 7), "the level 7"),
        (Tissue([], [], 0, excluded=[([], "pen")]), "an excluded region that is not"),
        (Tissue([], [], 0, excluded=[Excluded([np.array(box(0, 0, 9, 9))], "dust")]), "an excluded region that is not"),
        (Tissue([], [], 0, excluded=[Excluded([np.array(box(0, 0, 9999, 9))], "pen")]), "excluded regions that reach"),
    ],
)
def test_what_a_plugin_returns_is_checked(apply, monkeypatch, result, says):
    fake_plugin(monkeypatch, lambda slide, settings: result)
    with pytest.raises(SettingsError, match=says):
        apply(segmenter="deep")


def test_a_plugin_may_exclude_regions(apply, monkeypatch):
    excluded = [Excluded([np.array(box(0, 0, 300, 300))], "blur")]
    fake_plugin(
        monkeypatch,
        lambda slide, settings: Tissue(
            [np.array(box(0, 0, 600, 600))], [[]], np.int64(0), np.int64(2), excluded=excluded, tries=((0, None, 1),)
        ),
    )
    coords, _, outlines = apply(segmenter="deep")
    assert [0, 0] not in coords.tolist()
    assert [region.reason for region in outlines.excluded] == ["blur"]


def test_a_plugin_that_finds_nothing_gives_the_reason(apply, monkeypatch, caplog):
    fake_plugin(monkeypatch, lambda slide, settings: Tissue([], [], 0))
    with caplog.at_level(logging.WARNING):
        assert len(apply(segmenter="deep")[0]) == 0
    assert "segmenter 'deep' found no tissue" in caplog.text


def test_a_coarse_image_covers_what_its_pixels_cover(apply, tmp_path):
    """Not one pixel less on the right and below, where outlines through the centres of pixels would end."""
    for name, size in (("one.png", (1, 1)), ("few.png", (15, 11)), ("more.png", (30, 22)), ("exact.png", SIZE)):
        Image.fromarray(np.full(size[::-1], 255, np.uint8)).save(tmp_path / name)
        (contour,) = apply(mask=tmp_path / name)[2].contours
        assert (contour.min(0).tolist(), contour.max(0).tolist()) == ([0, 0], [SIZE[0] - 1, SIZE[1] - 1]), name
    mask = np.zeros((11, 15), np.uint8)  # a pixel covers 200 x 200 of the slide
    mask[2:9, 3:13] = 1
    mask[4:6, 5:9] = 0
    Image.fromarray(mask).save(tmp_path / "hole.png")
    outlines = apply(mask=tmp_path / "hole.png")[2]
    ((contour,), ((hole,),)) = outlines.contours, outlines.holes
    assert (contour.min(0).tolist(), contour.max(0).tolist()) == ([600, 400], [2599, 1799])
    # As OpenCV's, the outline of a hole runs on the tissue around it.
    assert (hole.min(0).tolist(), hole.max(0).tolist()) == ([999, 799], [1800, 1200])


def test_an_image_is_a_mask_only_as_it_lies_on_the_slide(apply, tmp_path):
    half = np.zeros((11, 15), np.uint8)
    half[:, :8] = 255
    image = Image.fromarray(half)
    exif = Image.Exif()
    exif[274] = 3
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "turned.tif", tiffinfo={274: 3})
    for name in ("turned.png", "turned.tif"):
        with pytest.raises(MaskError, match="states a rotation"):
            apply(mask=tmp_path / name)
    image.save(tmp_path / "lossy.png", format="JPEG")
    with pytest.raises(MaskError, match="is JPEG, whatever its name says"):
        apply(mask=tmp_path / "lossy.png")


def test_no_number_is_background(apply, tmp_path):
    values = np.full((11, 15), np.nan, np.float32)
    values[2:9, 3:13] = 1
    Image.fromarray(values).save(tmp_path / "a.tif")
    (contour,) = apply(mask=tmp_path / "a.tif")[2].contours
    assert contour.max(0).tolist() == [2599, 1799]


def test_a_class_that_no_region_has_is_warned_about(apply, tmp_path, caplog):
    square = [[300, 300], [1500, 300], [1500, 1500], [300, 1500]]
    region = polygon(square, classification={"name": "Tumor"})
    (tmp_path / "a.geojson").write_text(json.dumps(region))
    with caplog.at_level(logging.WARNING):
        apply(mask=tmp_path / "a.geojson", mask_class=["Tumor", "Fodl"])
    assert "has no region of class Fodl as tissue; its classes are Tumor (1)" in caplog.text


def test_classes_to_exclude_mean_the_same_for_every_slide(apply, tmp_path):
    """A folder of regions without a file for this slide: the classes are not those of the mask."""
    left, right = ([[x, 300], [x + 1000, 300], [x + 1000, 1800], [x, 1800]] for x in (300, 1600))
    features = [polygon(left, classification={"name": "A"}), polygon(right, classification={"name": "Fold"})]
    (tmp_path / "mask.geojson").write_text(json.dumps(features))
    (tmp_path / "others").mkdir()
    options = {"mask": tmp_path / "mask.geojson", "exclude_class": "Fold"}
    assert len(apply(**options)[2].contours) == 1
    with_folder = apply(**options, exclude=tmp_path / "others")[2]  # also: the stored result is not used again
    assert len(with_folder.contours) == 2
    assert not with_folder.excluded


@pytest.mark.parametrize("name", ["excluded", "EXCLUDED: pen"])
def test_the_class_of_excluded_regions_in_any_case(apply, tmp_path, name):
    left, right = ([[x, 300], [x + 1000, 300], [x + 1000, 1800], [x, 1800]] for x in (300, 1600))
    features = [polygon(left), polygon(right, classification={"name": name})]
    (tmp_path / "a.geojson").write_text(json.dumps(features))
    outlines = apply(mask=tmp_path / "a.geojson")[2]
    assert (len(outlines.contours), len(outlines.excluded)) == (1, 1)


def test_a_coordinate_reference_system_is_warned_about(apply, tmp_path, caplog):
    feature = polygon([[300, 300], [1500, 300], [1500, 1500], [300, 1500]])
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature], "crs": crs}))
    with caplog.at_level(logging.WARNING):
        apply(mask=tmp_path / "a.geojson")
    assert "1 coordinate reference system" in caplog.text
