"""Drawn regions: saved as GeoJSON that `--mask` reads; other programs' files and other windows' work are not lost."""

from __future__ import annotations

import json

import numpy as np
import pytest

from exaonepath import patchfy, read_contours
from exaonepath.errors import MaskError, OutputCollisionError
from exaonepath.files.annotations import read_polygons
from exaonepath.files.regions import Region, parse_region, read_regions, write_regions
from exaonepath.viz.values.library import key_of

SECOND = key_of("second")
SQUARE = [[300.0, 300.0], [900.0, 300.0], [900.0, 800.5], [300.0, 800.0]]


def test_saved_regions_are_read_again_and_are_a_mask(results, view):
    slide = results / "slides" / "second.svs"
    with view(results, [slide.parent]) as client:
        before = client.json(f"api/slides/{SECOND}/regions")
        assert (before["regions"], before["revision"], before["ours"]) == ([], "", True)
        regions = [
            {"name": 'Tumour "A" <b>é</b>', "class": "Tissue", "points": SQUARE},
            {"name": "", "class": "", "points": [[1000, 300], [1200, 300], [1100, 500]]},
        ]
        status, saved = client.put(f"api/slides/{SECOND}/regions", {"regions": regions, "revision": ""})
        assert status == 200
        assert saved["regions"] == json.loads(json.dumps(regions))
        assert client.json(f"api/slides/{SECOND}/regions") == saved
    path = results / "regions" / "second.geojson"
    assert saved["path"] == str(path)
    polygons = read_polygons(path)
    assert [p.class_name for p in polygons] == ["Tissue", ""]
    assert (polygons[0].rings[0] == np.array(SQUARE)).all()
    out, coords, index = patchfy(slide, results / "masked", mask=path, step_size=64)
    assert len(read_contours(out).contours) == 2
    assert len(coords) > 0
    assert set(index.tolist()) == {0, 1}
    assert patchfy(slide, results / "folder", mask=path.parent, mask_class=["Tissue"], step_size=64)[1].shape[0] > 0


def test_two_windows_do_not_overwrite_each_other(results, view):
    with view(results, [results / "slides"]) as client:
        path = f"api/slides/{SECOND}/regions"
        _, first = client.put(path, {"regions": [{"name": "a", "points": SQUARE}], "revision": ""})
        status, error = client.put(path, {"regions": [], "revision": ""})
        assert status == 409
        assert "load it again" in error["error"]
        assert client.json(path)["regions"][0]["name"] == "a"
        assert client.put(path, {"regions": [], "revision": first["revision"]})[0] == 200
        assert client.json(path)["regions"] == []


def test_files_of_other_programs_are_shown_and_never_replaced(results, view):
    path = results / "regions" / "second.geojson"
    with view(results, [results / "slides"]) as client:
        client.put(f"api/slides/{SECOND}/regions", {"regions": [{"name": "a", "points": SQUARE}], "revision": ""})
        changed = path.read_text().replace('"name":"a"', '"name":"b"')  # QuPath, an editor, ...
        path.write_text(changed)
        found = client.json(f"api/slides/{SECOND}/regions")
        assert not found["ours"]
        assert len(found["regions"]) == 1
        status, error = client.put(f"api/slides/{SECOND}/regions", {"regions": [], "revision": found["revision"]})
        assert status == 409
        assert "another program" in error["error"]
        assert path.read_text() == changed
        path.write_text("{not json")
        assert client.get(f"api/slides/{SECOND}/regions")[0] == 422


POINTS = [[0, 0], [10, 0], [10, 10]]


@pytest.mark.parametrize(
    "region",
    [
        None,
        [],
        {},
        {"points": None},
        {"points": []},
        {"points": POINTS[:2]},
        {"points": [[0, 0], [1, 1], [2, 2]]},
        {"points": [[0, 0], [0, 0], [0, 0]]},
        {"points": [*POINTS, [1]]},
        {"points": [*POINTS, [1, 2, 3]]},
        {"points": [*POINTS, ["1", "2"]]},
        {"points": [*POINTS, [True, False]]},
        {"points": [*POINTS, None]},
        {"points": [*POINTS, [-1, 5]]},
        {"points": [*POINTS, [5, 1201]]},
        {"points": [*POINTS, [1e308, 5]]},
        {"points": POINTS, "name": 5},
        {"points": POINTS, "name": "x" * 121},
        {"points": POINTS, "name": "a\nb"},
        {"points": POINTS, "name": "a\u202eb"},
        {"points": POINTS, "class": "\x00"},
        {"points": POINTS * 7000},
    ],
)
def test_regions_that_are_none_are_refused(region, client):
    with pytest.raises(MaskError):
        parse_region(region, (1600, 1200), "region 0")
    status, answer = client.put(f"api/slides/{SECOND}/regions", {"regions": [region], "revision": ""})
    assert status == 422
    assert "region 0" in answer["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"regions": []}',
        b'{"regions": {}, "revision": ""}',
        b'{"regions": [], "revision": 1}',
        b"{",
        b"\xff\xfe",
        b'{"regions": [{"points": [[NaN, 0], [1, 0], [1, 1]]}], "revision": ""}',
        b"[" * 100_000,
        b'{"regions": [], "regions": [], "revision": ""}',
        json.dumps({"regions": [{"points": POINTS}] * 2001, "revision": ""}).encode(),
    ],
)
def test_bodies_that_are_no_regions_are_refused(body, client, made):
    assert client.put(f"api/slides/{SECOND}/regions", body)[0] == 422
    assert not (made / "regions").exists()


def test_other_bodies_are_refused(client):
    assert (
        client.put(f"api/slides/{SECOND}/regions", {}, "text/plain")[0] == 415
    )  # what a form of another page can send
    assert client.put(f"api/slides/{SECOND}/regions", b" " * (17 << 20))[0] == 413


def test_the_file_is_whole_or_absent(tmp_path):
    region = Region("a", "b", ((0.0, 0.0), (5.0, 0.0), (5.0, 5.0)))
    path = tmp_path / "x.geojson"
    revision = write_regions(path, [region], {"slide_fingerprint": "f"}, "")
    assert read_regions(path) == ([region], revision, True)
    with pytest.raises(OutputCollisionError):
        write_regions(path, [], {}, "other")
    assert write_regions(path, [], {}) != revision
    assert read_regions(path)[0] == []
    assert [p.name for p in tmp_path.iterdir()] == ["x.geojson"]
