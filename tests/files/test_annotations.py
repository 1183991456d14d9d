"""Polygons from GeoJSON: every form that programs write, and what is refused."""

import json
import logging

import numpy as np
import pytest

from exaonepath.errors import MaskError, MemoryLimitError
from exaonepath.files import annotations
from exaonepath.files.annotations import read_polygons

SQUARE = [[10, 10], [90, 10], [90, 90], [10, 90], [10, 10]]
HOLE = [[30, 30], [60, 30], [60, 60], [30, 30]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
MULTI = {"type": "MultiPolygon", "coordinates": [[SQUARE], [HOLE]]}


def feature(geometry=POLYGON, **properties):
    return {"type": "Feature", "id": "b7e1", "geometry": geometry, "properties": properties}


def read(tmp_path, document):
    path = tmp_path / "a.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_polygons(path)


QUPATH = feature(objectType="annotation", classification={"name": "Tumor", "color": [200, 0, 0]}, isLocked=True)
QUPATH_0_3 = {**feature(classification={"name": "Tumor", "colorRGB": -3670016}), "id": "PathAnnotationObject"}
QUPATH_DERIVED = feature(objectType="annotation", classification={"names": ["Tumor", "Edge"], "color": [1, 2, 3]})
TRIDENT = {"type": "Feature", "properties": {"tissue_id": 0}, "geometry": POLYGON}
CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}


@pytest.mark.parametrize(
    ("document", "rings", "classes"),
    [
        ({"type": "FeatureCollection", "features": [QUPATH, QUPATH_0_3]}, [2, 2], ["Tumor", "Tumor"]),
        ([QUPATH, QUPATH_DERIVED], [2, 2], ["Tumor", "Tumor: Edge"]),
        (QUPATH, [2], ["Tumor"]),
        (POLYGON, [2], [""]),
        (MULTI, [1, 1], ["", ""]),
        ({"type": "FeatureCollection", "name": "contours", "crs": CRS, "features": [TRIDENT]}, [2], [""]),
        ({"type": "GeometryCollection", "geometries": [MULTI, POLYGON]}, [1, 1, 2], [""] * 3),
        (feature(classification="Stroma"), [2], ["Stroma"]),
        (feature(classification={"name": 3}), [2], [""]),
        ({**feature(), "properties": None}, [2], [""]),
        ({"type": "FeatureCollection", "features": []}, [], []),
        ("\ufeff" + json.dumps(POLYGON), [2], [""]),
        (json.dumps(feature(measurements={"Area": 1})).replace("1}", "NaN}"), [2], [""]),
    ],
)
def test_every_form_is_read(tmp_path, document, rings, classes):
    polygons = read(tmp_path, document)
    assert [len(polygon.rings) for polygon in polygons] == rings
    assert [polygon.class_name for polygon in polygons] == classes
    if polygons:
        assert polygons[0].rings[0].tolist() == SQUARE[:-1]
        assert polygons[0].rings[0].dtype == np.float64


def test_rings_of_any_kind(tmp_path):
    rings = [[[0.5, 1.25, 7], [2, 3, 7], [4, 5, 7]], [], [[1, 2]], [[1, 2], [1, 2]]]
    (polygon,) = read(tmp_path, {"type": "Polygon", "coordinates": rings})
    assert [ring.tolist() for ring in polygon.rings] == [[[0.5, 1.25], [2, 3], [4, 5]], [], [[1, 2]], [[1, 2]]]


def test_what_is_no_annotation_or_no_area_is_counted(tmp_path, caplog):
    document = [
        QUPATH,
        *[feature(objectType="cell")] * 3,
        {**feature(), "id": "PathDetectionObject"},
        feature({"type": "Point", "coordinates": [1, 2]}),
        feature(None),
        {"type": "GeometryCollection", "geometries": [{"type": "LineString", "coordinates": [[1, 2], [3, 4]]}]},
    ]
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path, document)) == 1
    said = caplog.text
    for count in ("3 of type cell", "1 of type PathDetectionObject", "1 Point", "1 LineString", "1 without geometry"):
        assert count in said


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("", "not valid JSON"),
        ('{"type": "FeatureColl', "not valid JSON"),
        ("3", "object 0 is 3"),
        ('"text"', "object 0 is 'text'"),
        ("[[1, 2], [3, 4]]", "not a GeoJSON feature"),
        ("{}", "not a GeoJSON feature"),
        ('{"type": ["Feature"]}', "not a GeoJSON feature"),
        ('{"type": "Topology", "objects": {}}', "'Topology', which GeoJSON does not have"),
        ('{"type": "FeatureCollection"}', "no list of features"),
        ('{"type": "FeatureCollection", "features": [null]}', "object 0 is None"),
        (DEEP, "nests deeper"),
        ('{"type": "FeatureCollection", "features": ' + DEEP, "nests deeper"),
        ('{"a": "' + "]" * 100 + '\\"[", "b": ' + DEEP, "nests deeper"),  # brackets in text do not count
        ('{"type": "Polygon", "type": "Polygon"}', "states 'type' twice"),
        (feature({"type": "Polygon"}), "has None where GeoJSON has a list"),
        (feature({"type": "Polygon", "coordinates": {"0": 1}}), "where GeoJSON has a list"),
        (feature({"type": "Polygon", "coordinates": SQUARE}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[SQUARE]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1], [2]]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1, 2], [3]]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1, 2], [3, "4"]]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1, 2], [3, None]]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1, 2], [3, True], [5, 6]]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1, 2], [3, 10**400]]]}), "not pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": [[[1, 2], [3, 1e300]]]}), "no pixels of a slide"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, NaN]]]}', "not finite"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 1e999]]]}', "not finite"),
        ('{"type": "Polygon", "coordinates": "\\ud800"}', "not UTF-8"),
        ({"type": "Sphere"}, "'Sphere'"),
    ],
)
def test_refused(tmp_path, document, says):
    with pytest.raises(MaskError, match=says) as caught:
        read(tmp_path, document)
    assert str(tmp_path / "a.geojson") in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x1f\x8b\x08\x00 gzip", "compressed"),
        (b"PK\x03\x04 zip", "compressed"),
        ('{"type": "Polygon"}'.encode("utf-16"), "UTF-16"),
        (b'{"type": "\xe9"}', "not UTF-8"),
        (b"\0" * 1000, "not valid JSON"),
        (None, "no such file"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, data, says):
    path = tmp_path / "a.geojson"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(MaskError, match=says):
        read_polygons(path)


def test_a_file_that_does_not_fit_into_memory_is_refused_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "a.geojson"
    with path.open("wb") as file:
        file.truncate(500_000_000)  # sparse
    monkeypatch.setattr(annotations, "available_host_memory", lambda: 4_000_000_000)
    with pytest.raises(MemoryLimitError, match="export fewer objects"):
        read_polygons(path)
    with path.open("wb") as file:
        file.truncate(2_000_000_000)
    with pytest.raises(MaskError, match=r"more than 1 GB is not read"):
        read_polygons(path)


def test_damaged_files_raise_nothing_else(tmp_path):
    """Bytes changed, removed and doubled anywhere: polygons, or one error."""
    text = json.dumps([QUPATH, QUPATH_0_3, feature(MULTI), TRIDENT]).encode()
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "a.geojson", 0
    for _ in range(600):
        data = bytearray(text)
        for at in rng.integers(0, len(text), rng.integers(1, 4)):
            kind = rng.integers(0, 3)
            part = data[at : at + rng.integers(1, 30)]
            if kind == 0:
                data[at % len(data)] = int(rng.choice(list(b'0{}[]",:eE-.\\nu\xff\x00')))
            else:
                data[at : at + len(part)] = part * (2 * (kind - 1))
        path.write_bytes(data)
        try:
            polygons = read_polygons(path)
        except MaskError:
            refused += 1
        else:
            assert all(np.isfinite(ring).all() for polygon in polygons for ring in polygon.rings)
    assert 100 < refused < 600


def test_depth_is_exact_across_parts(tmp_path, monkeypatch):
    from exaonepath.files import strict_json

    monkeypatch.setattr(strict_json, "_DEPTH_BYTES", 7)
    text = json.dumps(feature(note='["[[[[\\"[[' * 40, objectType="annotation"))
    assert len(read(tmp_path, text)) == 1
    with pytest.raises(MaskError, match="nests deeper"):
        read(tmp_path, '{"a": "\\\\", "b": ' + "[" * 33 + "]" * 33 + "}")
