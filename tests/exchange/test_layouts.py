"""The layouts in detail, as their own programs read them: names of files, datasets, attributes."""

import json
import uuid

import h5py
import numpy as np
import pytest

from exaonepath.errors import OutputError, SettingsError
from exaonepath.exchange.patho_bench import write_pooled
from exaonepath.exchange.slide_patches import Values
from exaonepath.files.annotations import read_polygons
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import read_features
from exaonepath.files.patches import read_patches
from exaonepath.slides.exporting import FORMATS, export_slides
from exaonepath.slides.importing import import_features
from exaonepath.slides.outputs import output_paths

from .conftest import FIRST, SECOND


def load_h5(path, keys):
    """What TRIDENT's and Patho-Bench's loaders do: whole datasets, attributes per dataset."""
    with h5py.File(path) as file:
        return {k: file[k][:] for k in keys}, {k: dict(file[k].attrs) for k in keys}


def values(slide):
    numbers = np.linspace(-1, 1, len(slide), dtype=np.float32)
    numbers[1] = np.nan
    groups = (np.arange(len(slide)) % 12).astype(np.float32)
    kinds = (np.arange(len(slide)) % 2).astype(np.float32)
    return {"score": Values(numbers), "group": Values(groups), "kind": Values(kinds, ("fett", "Drüse"))}


def test_trident(made, tmp_path):
    export_slides(made, tmp_path, "trident", encoder="My Encoder/v1.0")
    for name, size in ((FIRST, 128), (SECOND, 256)):
        base = tmp_path / "20x_128px_0px_overlap"
        features = read_features(output_paths(made, name).features)
        assets, attrs = load_h5(base / "patches" / f"{name}_patches.h5", ["coords"])
        np.testing.assert_array_equal(assets["coords"], features.coords)
        about = attrs["coords"]
        assert (about["patch_size"], about["patch_size_level0"], about["overlap"]) == (128, size, 0)
        assert (about["target_magnification"], about["level0_magnification"]) == (20, 20 * size // 128)
        # What TRIDENT computes: the side of a patch at level 0.
        assert round(about["patch_size"] * about["level0_magnification"] / about["target_magnification"]) == size
        assert about["name"] == name
        assets, attrs = load_h5(base / "features_v1.0" / f"{name}.h5", ["features", "coords"])
        np.testing.assert_array_equal(assets["features"], features.features)
        assert attrs["features"]["name"] == name
        assert attrs["coords"]["patch_size_level0"] == size
        assets, _ = load_h5(base / "slide_features_v1.0" / f"{name}.h5", ["features", "coords"])
        wanted = read_embedding(output_paths(made, name).embedding).slide_embedding
        np.testing.assert_array_equal(assets["features"], wanted)


def test_a_scale_that_is_no_whole_magnification(made, tmp_path):
    """Side 253 of 128 pixels at 20x: TRIDENT has to read the same pixels."""
    from exaonepath.files.features import write_features

    source = tmp_path / "odd_features.h5"
    rows = [(np.arange(2), np.ones((2, 3), np.float32))]
    coords = np.array([[0, 0], [253, 0]])
    write_features(source, rows, coords, np.zeros(2, np.int32), 3, (), {"patch_size": 253, "weights": "e"})
    export_slides(source, tmp_path / "t", "trident", target_size=256)
    _, attrs = load_h5(tmp_path / "t/20x_256px_0px_overlap/features_e/odd.h5", ["coords"])
    about = attrs["coords"]
    assert about["patch_size"] * about["level0_magnification"] / about["target_magnification"] == 253


def test_a_batch_axis(made, tmp_path):
    for format, pattern in (("trident", "features_*/first.h5"), ("clam", "h5_files/first.h5")):
        export_slides(made, tmp_path / format, format, batch_axis=True, dtype="float16")
        (path,) = (path for path in (tmp_path / format).rglob(pattern) if "slide_" not in str(path))
        features = read_features(output_paths(made, FIRST).features).features
        with h5py.File(path) as file:
            assert file["features"].shape == (1, *features.shape)
            assert file["features"].dtype == np.float16
            np.testing.assert_array_equal(file["features"][0], features.astype(np.float16))
        import_features(tmp_path / format, tmp_path / f"{format}-back", format, fragments="one", encoder="e")
        back = read_features(output_paths(tmp_path / f"{format}-back", FIRST).features)
        np.testing.assert_array_equal(back.features, features.astype(np.float16).astype(np.float32))


def test_clam(made, tmp_path):
    export_slides(made, tmp_path, "clam")
    features = read_features(output_paths(made, SECOND).features)
    assets, attrs = load_h5(tmp_path / "patches" / f"{SECOND}.h5", ["coords"])
    np.testing.assert_array_equal(assets["coords"], features.coords)
    about = attrs["coords"]
    assert (about["patch_size"], about["patch_level"], about["downsample"].tolist()) == (256, 0, [1, 1])
    assert about["level_dim"].tolist() == about["downsampled_level_dim"].tolist() == [1500, 1100]
    # The stage that reads coordinates of CLAM takes them as they are.
    assert read_patches(tmp_path / "patches" / f"{SECOND}.h5").patch_size == 256
    assets, attrs = load_h5(tmp_path / "h5_files" / f"{SECOND}.h5", ["features", "coords"])
    np.testing.assert_array_equal(assets["features"], features.features)
    assert not attrs["coords"]


def test_clam_pt_files_alone_need_coordinates(made, tmp_path):
    import shutil

    export_slides(made, tmp_path / "c", "clam")
    (tmp_path / "x").mkdir()
    shutil.move(tmp_path / "c" / "pt_files", tmp_path / "x" / "pt_files")
    options = {"encoder": "uni", "fragments": "grid"}
    with pytest.raises(SettingsError, match="2 of 2 slides cannot be imported"):
        import_features(tmp_path / "x", tmp_path / "back", "clam", **options)
    with pytest.raises(SettingsError, match="--coords"):
        import_features(tmp_path / "x/pt_files" / f"{FIRST}.pt", tmp_path / "back", "clam", **options)
    import_features(tmp_path / "x", tmp_path / "back", "clam", coords=tmp_path / "c" / "patches", **options)
    before = read_features(output_paths(made, FIRST).features)
    np.testing.assert_array_equal(
        read_features(output_paths(tmp_path / "back", FIRST).features).features, before.features
    )


def test_patho_bench(made, tmp_path):
    export_slides(made, tmp_path, "patho-bench")
    features = read_features(output_paths(made, FIRST).features)
    assets, attrs = load_h5(tmp_path / "patches" / f"{FIRST}.h5", ["features", "coords"])
    np.testing.assert_array_equal(assets["features"], features.features)
    assert attrs["coords"]["patch_size_level0"] == 128
    assets, _ = load_h5(tmp_path / "pooled" / f"{FIRST}.h5", ["features"])
    slide = assets["features"].squeeze(0)  # raises where the first axis is not 1
    np.testing.assert_array_equal(slide, read_embedding(output_paths(made, FIRST).embedding).slide_embedding)


def test_pooled_samples(tmp_path):
    rows = {"TCGA-A1": np.arange(5, dtype=np.float64), "TCGA-B2.x": np.ones(5)}
    paths = write_pooled(tmp_path / "pooled", rows, model="abc")
    assert [path.name for path in paths] == ["TCGA-A1.h5", "TCGA-B2.x.h5"]
    for sample, path in zip(rows, paths, strict=True):
        assets, attrs = load_h5(path, ["features"])
        features = assets["features"].squeeze(0)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, rows[sample].astype(np.float32))
        assert attrs["features"]["model"] == "abc"
    for bad, message in (
        ({"a": np.ones(3), "b": np.ones(4)}, "width"),
        ({"a": np.ones(3), "../b": np.ones(3)}, "file name"),
        ({"a": np.ones(3), "b": np.full(3, np.nan)}, "of b must be finite"),
    ):
        with pytest.raises(SettingsError, match=message):
            write_pooled(tmp_path / "out", bad)
    assert not (tmp_path / "out").exists()


def test_qupath(made, tmp_path):
    (path,) = export_slides(made, tmp_path / "one.geojson", "qupath", slides=[SECOND], values=values, classify="kind")
    value = json.loads(path.read_text())
    assert value["type"] == "FeatureCollection"
    features = read_features(output_paths(made, SECOND).features)
    assert len(value["features"]) == len(features.coords)
    ids = set()
    for row, (item, (x, y)) in enumerate(zip(value["features"], features.coords.tolist(), strict=True)):
        assert item["type"] == "Feature"
        ids.add(uuid.UUID(item["id"]))
        ring = item["geometry"]["coordinates"]
        assert ring == [[[x, y], [x + 256, y], [x + 256, y + 256], [x, y + 256], [x, y]]]
        properties = item["properties"]
        assert properties["objectType"] == "tile"
        assert properties["classification"]["name"] == ("fett", "Drüse")[row % 2]
        assert all(isinstance(channel, int) and 0 <= channel < 256 for channel in properties["classification"]["color"])
        measurements = properties["measurements"]
        assert ("score" in measurements) == (row != 1)  # JSON has no NaN
        assert measurements["Patch"] == row
        assert measurements["Fragment"] == features.contour_index[row]
        assert all(isinstance(number, float) for number in measurements.values())
    assert len(ids) == len(features.coords)
    warnings = []
    assert read_polygons(path, warnings.append) == []  # tiles are no regions: none is taken for an annotation
    assert f"{len(ids)} of type tile" in warnings[0]


def test_classes_of_tiles(made, tmp_path):
    for classify, first in (("group", "group 0"), ("fragment", "fragment 0")):
        (path,) = export_slides(made, tmp_path / classify, "qupath", slides=[FIRST], values=values, classify=classify)
        assert json.loads(path.read_text())["features"][0]["properties"]["classification"]["name"] == first
    colours = [
        item["properties"]["classification"]
        for item in json.loads((tmp_path / "group/first.geojson").read_text())["features"]
    ]
    assert len({(c["name"], *c["color"]) for c in colours}) == len({tuple(c["color"]) for c in colours}) == 12
    with pytest.raises(SettingsError, match="fractions"):
        export_slides(made, tmp_path / "x", "qupath", slides=[FIRST], values=values, classify="score")
    with pytest.raises(SettingsError, match=r"no value 'nothing'.* score, group, kind, fragment"):
        export_slides(made, tmp_path / "x", "qupath", slides=[FIRST], values=values, classify="nothing")
    assert list((tmp_path / "x").iterdir()) == []


def test_the_origin_of_the_contours(made, results, tmp_path):
    """Where contours count from another position, for QuPath, tiles do too."""
    path = output_paths(results, FIRST).contours
    text = path.read_text().replace('"exaonepath":{', '"exaonepath":{"origin":"100,50",', 1)
    path.write_text(text)
    (moved,) = export_slides(results, tmp_path / "a", "qupath", slides=[FIRST])
    (plain,) = export_slides(made, tmp_path / "b", "qupath", slides=[FIRST])
    corner = [json.loads(p.read_text())["features"][0]["geometry"]["coordinates"][0][0] for p in (plain, moved)]
    assert np.subtract(*corner).tolist() == [100, 50]


def test_options_that_do_not_fit(made, tmp_path):
    for options, message in (
        ({"format": "clan"}, "did you mean 'clam'"),
        ({"format": "clam", "classify": "x"}, "classify is for qupath"),
        ({"format": "zarr", "batch_axis": True}, "batch axis"),
        ({"format": "clam", "vectors": "both"}, "features or embeddings"),
        ({"format": "clam", "dtype": "int8"}, "float32 or float16"),
        ({"format": "clam", "slides": ["frist"]}, "did you mean 'first'"),
        ({"format": "clam", "patch_size": 0}, "positive"),
    ):
        with pytest.raises(SettingsError, match=message):
            export_slides(made, tmp_path / "x", **options)
    with pytest.raises(SettingsError, match="does not exist"):
        export_slides(tmp_path / "nowhere", tmp_path / "x", "clam")
    with pytest.raises(SettingsError, match="holds no results"):
        export_slides(tmp_path, tmp_path / "x", "clam")
    assert not (tmp_path / "x").exists()


def test_slides_of_different_vectors_do_not_mix(made, results, tmp_path):
    pytest.importorskip("zarr", reason="needs the extra `exchange`")
    from exaonepath.files.features import write_features

    other = np.ones((1, 7), np.float32)
    write_features(
        output_paths(results, "other").features,
        [(np.arange(1), other)],
        np.zeros((1, 2), np.int32),
        np.zeros(1, np.int32),
        7,
        (),
        {"patch_size": 128, "weights": "else"},
    )
    with pytest.raises(SettingsError, match="do not fit into one file"):
        export_slides(results, tmp_path / "all.zarr", "zarr")
    assert not (tmp_path / "all.zarr").exists()
    assert len(export_slides(results, tmp_path / "each", "zarr")) == 3


def test_names_of_files_of_another_format(made, tmp_path):
    """A folder called patches.h5ad would be taken for the file that was meant."""
    for name, format, message in (
        ("a.h5ad", "parquet", r"like a file of anndata, and the format is parquet; .* ends with \.parquet"),
        ("a.parquet", "anndata", "like a file of parquet"),
        ("a.zarr", "trident", "like a file of spatialdata or zarr, and the format is trident; name a folder$"),
        ("a.GEOJSON", "clam", "like a file of qupath"),
        ("a.H5AD", "zarr", "like a file of anndata"),
    ):
        with pytest.raises(SettingsError, match=message):
            export_slides(made, tmp_path / name, format)
    assert not list(tmp_path.iterdir())
    assert export_slides(made, tmp_path / "a.GeoJSON", "qupath", slides=[FIRST]) == [tmp_path / "a.GeoJSON"]
    assert (tmp_path / "a.GeoJSON").is_file()


def test_a_name_that_the_file_system_refuses(made, tmp_path):
    for format in FORMATS:
        with pytest.raises(OutputError, match="name too long"):
            export_slides(made, tmp_path / ("x" * 300), format)
