"""Contours as data: in the patches file and as GeoJSON for QuPath."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import chain

import cv2
import h5py
import numpy as np
import pytest

from exaonepath.errors import DataFileError, OutputCollisionError, OutputError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.geojson import geojson_made_from, without_collinear_points, write_outlines_geojson
from exaonepath.files.outlines import Excluded, Outlines
from exaonepath.files.patches import read_contours, read_patches, write_patches
from exaonepath.log_once import forget
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches import pipeline
from exaonepath.slides.patches.pipeline import PatchSettings, patchfy
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.synthetic import make_slide

OPTIONS = {"a_t": 0.2, "a_h": 0.01}


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slide") / "case.svs", 3000, 2200, fragments=2, seed=1)


@pytest.fixture
def result(slide, tmp_path):
    patchfy(slide, tmp_path, save_mask=False, **OPTIONS)
    return tmp_path / "patches" / "case.h5"


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_stored_contours_are_exactly_those_of_segmentation(slide, result):
    with SlideImage(slide) as image:
        tissue = segment_tissue(image, SegmentationSettings(**OPTIONS))
    stored = read_contours(result)
    same(stored.contours, tissue.contours)
    assert [len(group) for group in stored.holes] == [len(group) for group in tissue.holes]
    assert sum(map(len, stored.holes)) > 0
    same(list(chain(*stored.holes)), list(chain(*tissue.holes)))
    assert read_patches(result).has_outlines
    assert max(read_patches(result).contour_index) < len(stored.contours)


def test_excluded_regions_and_many_small_contours_come_back(slide, tmp_path):
    rng = np.random.default_rng(0)
    contours = [rng.integers(0, 3000, (n, 2)).astype(np.int32) for n in rng.integers(1, 9, 40_000)]
    contours[7] = rng.integers(0, 3000, (150_000, 2)).astype(np.int32)  # more than a chunk
    holes = [[contours[i]] * (i % 5 == 0) for i in range(len(contours))]
    excluded = [Excluded([contours[1], contours[2], contours[3]], "pen"), Excluded([contours[4]], "excluded")]
    with SlideImage(slide) as image:
        write_patches(
            tmp_path / "a.h5",
            image,
            np.zeros((0, 2)),
            np.zeros(0),
            patch_size=256,
            patch_level=0,
            settings={},
            outlines=Outlines(contours, holes, excluded),
        )
    stored = read_contours(tmp_path / "a.h5")
    same(stored.contours, contours)
    same(list(chain(*stored.holes)), list(chain(*holes)))
    assert [len(group) for group in stored.holes] == [len(group) for group in holes]
    assert [region.reason for region in stored.excluded] == ["pen", "excluded"]
    same(stored.excluded[0].rings, excluded[0].rings)


def test_a_slide_without_tissue_stores_empty_contours(tmp_path):
    patchfy(make_slide(tmp_path / "empty.svs", 1500, 1000, fragments=0), tmp_path)
    assert read_contours(tmp_path / "patches" / "empty.h5") == Outlines([], [])
    assert json.loads((tmp_path / "contours" / "empty.geojson").read_text())["features"] == []


def test_a_flipped_bit_in_the_contours_is_noticed(result):
    with h5py.File(result) as file:
        chunk = file["outline_points"].id.get_chunk_info(0)
        at = chunk.byte_offset + chunk.size // 2
    data = bytearray(result.read_bytes())
    data[at] ^= 4
    result.write_bytes(data)
    with pytest.raises(DataFileError):
        read_contours(result)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("outline_offsets", [1, 4, 7, 10], "does not divide"),
        ("outline_offsets", [], "outline_parent must be"),
        ("outline_offsets", [0, 4, 3, 10], "does not divide"),
        ("outline_parent", [-1, 2, -1], "does not name"),
        ("outline_parent", [-2, 0, 0], "does not name"),
        ("outline_parent", [-1, 0, -1], "does not name"),  # a contour after a hole
        ("outline_kind", [0, 0, 4], "other values"),
        ("outline_kind", [0, 2, 0], "does not name"),
        ("outline_points", np.zeros((10, 3), int), "outline_points must be"),
    ],
)
def test_contradictions_are_errors(tmp_path, name, values, says):
    tables = {
        "coords": np.zeros((0, 2), int),
        "outline_points": np.zeros((10, 2), int),
        "outline_offsets": [0, 4, 7, 10],
        "outline_parent": [-1, 0, 0],
        "outline_kind": [0, 0, 0],
    }
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, value in {**tables, name: values}.items():
            file.create_dataset(key, data=np.asarray(value, int))
        file.attrs["complete"] = True
    with pytest.raises(DataFileError, match=says):
        read_contours(tmp_path / "a.h5")


def rings_of(feature):
    return [np.array(ring) for ring in feature["geometry"]["coordinates"]]


def drawn(rings, shift):
    """Even-odd picture of a polygon, at full resolution."""
    picture = np.zeros((2300, 3100), np.uint8)
    cv2.fillPoly(picture, [np.asarray(ring, np.int32).reshape(-1, 1, 2) + shift for ring in rings], 1)
    return picture


def test_geojson_is_what_qupath_reads_and_the_same_geometry(result):
    document = json.loads((result.parents[1] / "contours" / "case.geojson").read_text())
    stored = read_contours(result)
    assert document["type"] == "FeatureCollection"
    assert len(document["features"]) == len(stored.contours)
    fewer = 0
    for index, feature in enumerate(document["features"]):
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        properties = feature["properties"]
        assert (properties["objectType"], properties["isLocked"]) == ("annotation", False)
        assert properties["name"] == f"Contour {index}"
        assert properties["classification"]["name"] == "Tissue"
        assert len(properties["classification"]["color"]) == 3
        rings = rings_of(feature)
        exact = [stored.contours[index], *stored.holes[index]]
        assert len(rings) == len(exact)
        for ring, points in zip(rings, exact, strict=True):
            assert (ring[0] == ring[-1]).all()
            assert ring.dtype == np.int64
            assert cv2.contourArea(ring.astype(np.int32)) == cv2.contourArea(points)
        assert (drawn(rings, 20) == drawn(exact, 20)).all()
        fewer += sum(map(len, exact)) - sum(map(len, rings))
    assert fewer > 0


def test_points_are_dropped_only_where_nothing_changes():
    square = [(0, 0), (2, 0), (2, 0), (4, 0), (4, 4), (4, 2), (4, 5), (0, 5), (0, 3)]
    kept = [(0, 0), (4, 0), (4, 4), (4, 2), (4, 5), (0, 5)]  # the outline turns back at (4, 4) and at (4, 2)
    assert without_collinear_points(np.array(square, np.int32)).tolist() == [list(point) for point in kept]
    rng = np.random.default_rng(0)
    points = [(x, y) for x in range(-1, 9) for y in range(-1, 9)]
    for _ in range(300):
        ring = rng.integers(0, 8, (rng.integers(3, 30), 2)).astype(np.int32)
        smaller = without_collinear_points(ring).astype(np.int32)
        for point in points:
            was = cv2.pointPolygonTest(ring, point, False)
            assert was == cv2.pointPolygonTest(smaller, point, False)


def test_huge_coordinates_are_compared_exactly():
    far = np.array([(0, 0), (1 << 30, 1), ((1 << 31) - 1, 2), (5, (1 << 31) - 1)], np.int32)
    assert len(without_collinear_points(far)) == 4


def test_without_contours_nothing_of_them_is_written(slide, tmp_path):
    h5_path, _, _ = patchfy(slide, tmp_path, save_contours=False)
    assert not (tmp_path / "contours").exists()
    assert not read_patches(h5_path).has_outlines
    with pytest.raises(DataFileError, match="holds no contours"):
        read_contours(h5_path)


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(pipeline, "find_tissue", lambda *args: pytest.fail("the slide was segmented again"))


def test_geojson_that_is_missing_is_written_from_the_stored_contours(slide, result, no_work):
    path = result.parents[1] / "contours" / "case.geojson"
    before = path.read_bytes()
    shutil.rmtree(path.parent)
    patchfy(slide, result.parents[1], save_mask=False, **OPTIONS)
    assert path.read_bytes() == before


def test_a_read_only_folder_of_finished_results_is_used(slide, result, no_work, monkeypatch, caplog):
    shutil.rmtree(result.parents[1] / "contours")

    def refuse(folder):
        raise OutputError(f"cannot write {folder}: read-only")

    monkeypatch.setattr(pipeline, "ensure_folder", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(patchfy(slide, result.parents[1], save_mask=False, **OPTIONS)[1])
    assert "are stored in" in caplog.text


def test_geojson_alone(slide, tmp_path):
    assert patchfy(slide, tmp_path, save_h5=False, save_mask=False, save_contours=True)[0] is None
    assert [path.name for path in tmp_path.rglob("*.*")] == ["case.geojson"]


def test_geojson_of_an_earlier_result_is_replaced(slide, result, no_work):
    path = result.parents[1] / "contours" / "case.geojson"
    before = path.read_bytes()
    write_outlines_geojson(path, Outlines([], []), {"settings_hash": "another"})
    patchfy(slide, result.parents[1], save_mask=False, **OPTIONS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}", b'{"type":"FeatureCollection","features":[]}', b"\0" * 10_000])
def test_a_file_that_the_user_changed_is_not_replaced(slide, result, content):
    folder = result.parents[1]
    path = folder / "contours" / "case.geojson"
    path.write_bytes(content)
    assert geojson_made_from(path) is None
    patchfy(slide, folder, save_mask=False, **OPTIONS)  # the stored result is used
    assert path.read_bytes() == content
    with pytest.raises(OutputCollisionError, match="changed by another program"):
        patchfy(slide, folder, save_mask=False, a_t=0.3)
    assert path.read_bytes() == content
    patchfy(slide, folder, save_mask=False, a_t=0.3, overwrite=True)
    assert geojson_made_from(path)


def test_results_of_before_are_used_and_said_to_hold_no_contours(slide, tmp_path, caplog, no_work):
    """A result as this package wrote it before it stored contours: the hash of its settings is the same today."""
    values = PatchSettings().as_json()
    assert settings_hash(values) == "c91fa0173359b2dbade7c9a7495e13c91f1d3aee64abd3fe60dfcf6fb007e6b6"
    (tmp_path / "patches").mkdir()
    coords = np.array([[256, 256]], np.int32)
    with SlideImage(slide) as image:
        write_patches(
            tmp_path / "patches" / "case.h5", image, coords, [0], patch_size=256, patch_level=0, settings=values
        )
    forget()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(patchfy(slide, tmp_path, save_mask=False)[1], coords)
    assert "hold no contours" in caplog.text
    assert not (tmp_path / "contours").exists()
