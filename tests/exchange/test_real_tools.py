"""Exports read by the tools themselves. `make test-exchange` installs those that the environment lacks."""

import importlib.util
import json
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from stand_in_encoders import WIDTH

from exaonepath.exchange.slide_patches import Values
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import read_features, write_features
from exaonepath.slides.exporting import export_slides
from exaonepath.slides.importing import import_features
from exaonepath.slides.outputs import output_paths

from .conftest import FIRST, SECOND, tool, why_not_installed


def cluster(slide):
    return {"cluster": Values((np.arange(len(slide)) % 3).astype(np.float32), ("blood", "stroma", "tumour"))}


@pytest.fixture
def slide2vec_artifacts(monkeypatch):
    """The module with slide2vec's readers and writers, without the encoders that importing the package would load."""
    spec = importlib.util.find_spec("slide2vec")
    if spec is None:
        pytest.skip(f"slide2vec: {why_not_installed('slide2vec')}")
    bare = types.ModuleType("slide2vec")
    bare.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "slide2vec", bare)
    return importlib.import_module("slide2vec.artifacts")


@pytest.fixture(scope="module")
def h5ad(made, tmp_path_factory):
    pytest.importorskip("anndata", reason="needs the extra `exchange`")
    to = tmp_path_factory.mktemp("h5ad") / "all.h5ad"
    export_slides(made, to, "anndata", values=cluster)
    return to


@pytest.mark.filterwarnings("ignore")
def test_anndata(made, h5ad):
    anndata = tool("anndata")
    data = anndata.read_h5ad(h5ad)
    assert data.shape[1] == WIDTH
    assert list(data.obs["slide"].cat.categories) == [FIRST, SECOND]
    assert data.obs_names.is_unique
    assert data.uns["spatial"].keys() == {FIRST, SECOND}
    assert list(data.obs["cluster"].cat.categories) == ["blood", "stroma", "tumour"]
    for at, name in enumerate((FIRST, SECOND)):
        features = read_features(output_paths(made, name).features)
        rows = data[data.obs["slide"] == name]
        np.testing.assert_array_equal(rows.X, features.features)
        np.testing.assert_array_equal(rows.obs[["x", "y"]], features.coords)
        np.testing.assert_array_equal(rows.obs["fragment"], features.contour_index)
        half = features.attrs["patch_size"] / 2
        np.testing.assert_array_equal(rows.obsm["spatial"], features.coords + half)
        slide = read_embedding(output_paths(made, name).embedding).slide_embedding
        np.testing.assert_array_equal(data.uns["exaonepath"]["slide_embedding"][at], slide)
    assert list(data.obs["patient"].cat.categories) == ["P1"]
    assert data[data.obs["slide"] == SECOND].obs["patient"].isna().all()
    # Backed: X is read by parts, also by the library.
    assert anndata.read_h5ad(h5ad, backed="r")[5:9].to_memory().shape == (4, WIDTH)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scanpy(h5ad, dtype):
    scanpy = tool("scanpy")
    data = scanpy.read_h5ad(h5ad)
    data.X = data.X.astype(dtype)
    scanpy.pp.pca(data, n_comps=5)
    scanpy.pp.neighbors(data, n_neighbors=5)
    assert data.obsp["connectivities"].shape == (data.n_obs, data.n_obs)


@pytest.mark.filterwarnings("ignore")
def test_squidpy(h5ad, tmp_path):
    squidpy, scanpy = tool("squidpy"), tool("scanpy")
    plot = tool("matplotlib.pyplot")
    plot.switch_backend("Agg")
    data = scanpy.read_h5ad(h5ad)
    squidpy.gr.spatial_neighbors(data, library_key="slide", coord_type="generic", n_neighs=4)
    squidpy.gr.nhood_enrichment(data, cluster_key="cluster", n_perms=10, show_progress_bar=False, n_jobs=1)
    assert data.uns["cluster_nhood_enrichment"]["zscore"].shape == (3, 3)
    # The picture, scaled to it, and the spots of the right size: everything that it looks up in uns["spatial"].
    squidpy.pl.spatial_scatter(
        data, color="cluster", library_key="slide", save=str(tmp_path / "picture.png"), img_res_key="hires"
    )
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    for name in (FIRST, SECOND):
        spatial = data.uns["spatial"][name]
        height, width = spatial["images"]["hires"].shape[:2]
        of = data[data.obs["slide"] == name].obsm["spatial"] * spatial["scalefactors"]["tissue_hires_scalef"]
        assert (of >= 0).all()
        assert (of <= (width, height)).all()


@pytest.mark.filterwarnings("ignore")
def test_squidpy_without_pictures(made, tmp_path):
    squidpy, scanpy = tool("squidpy"), tool("scanpy")
    tool("matplotlib.pyplot").switch_backend("Agg")
    to = tmp_path / "one.h5ad"
    export_slides(made, to, "anndata", slides=[SECOND], pictures=False, values=cluster)
    data = scanpy.read_h5ad(to)
    squidpy.pl.spatial_scatter(data, color="cluster", shape=None, save=str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 5_000


@pytest.mark.filterwarnings("ignore")
def test_spatialdata(made, tmp_path):
    spatialdata = tool("spatialdata")
    to = tmp_path / "all.zarr"
    assert export_slides(made, to, "spatialdata", values=cluster) == [to]
    data = spatialdata.read_zarr(to)
    second = "zweite_F_rbung.1"
    assert set(data.shapes) == {f"{FIRST}_patches", f"{second}_patches"}
    assert set(data.images) == {f"{FIRST}_image", f"{second}_image"}
    assert set(data.coordinate_systems) == {FIRST, second}
    table = data.tables["patches"]
    for name, element in ((FIRST, FIRST), (SECOND, second)):
        features = read_features(output_paths(made, name).features)
        rows = table[table.obs["region"] == f"{element}_patches"]
        np.testing.assert_array_equal(rows.X, features.features)
        bounds = data.shapes[f"{element}_patches"].bounds.to_numpy()
        np.testing.assert_array_equal(bounds[:, :2], features.coords)
        np.testing.assert_array_equal(bounds[:, 2] - bounds[:, 0], features.attrs["patch_size"])
        # Patches and picture in the coordinates of the slide: the patches lie inside of it.
        whole = spatialdata.get_extent(data.images[f"{element}_image"], coordinate_system=element)
        patches = spatialdata.get_extent(data.shapes[f"{element}_patches"], coordinate_system=element)
        for axis in "xy":
            assert whole[axis][0] <= patches[axis][0] + 1
            assert patches[axis][1] <= whole[axis][1] + features.attrs["patch_size"]
    # A join of shapes and table finds every row.
    joined, rows = spatialdata.join_spatialelement_table(
        sdata=data, spatial_element_names=f"{FIRST}_patches", table_name="patches", how="left"
    )
    assert len(joined[f"{FIRST}_patches"]) == len(rows)


def test_hs2p_and_slide2vec_read_their_layout(made, tmp_path):
    artifacts = tool("hs2p.artifacts")
    export_slides(made, tmp_path, "slide2vec")
    for name in (FIRST, SECOND):
        base = tmp_path / "tiles" / f"{name}.coordinates"
        tiles = artifacts.load_tiling_result(
            base.with_name(base.name + ".npz"), base.with_name(base.name + ".meta.json")
        )
        features = read_features(output_paths(made, name).features)
        np.testing.assert_array_equal(np.stack([tiles.x, tiles.y], axis=1), features.coords)
        assert tiles.tile_size_lv0 == features.attrs["patch_size"]
        assert tiles.sample_id == name
        assert tiles.requested_tile_size_px == 128
        assert np.isnan(tiles.tissue_fractions).all()
        # Written by hs2p itself, which sorts tiles, and imported with features in that order.
        artifacts.save_tiling_result(tiles, tmp_path / "theirs")
        order = np.lexsort((features.coords[:, 1], features.coords[:, 0]))
        folder = tmp_path / "theirs" / "tile_embeddings"
        folder.mkdir(exist_ok=True)
        torch.save(torch.from_numpy(features.features[order]), folder / f"{name}.pt")
        shutil.copy(tmp_path / "tile_embeddings" / f"{name}.meta.json", folder)
    for slide in import_features(tmp_path / "theirs", tmp_path / "back", "slide2vec", fragments="one"):
        before, after = read_features(output_paths(made, slide.id).features), read_features(slide.features_path)
        order = np.lexsort((before.coords[:, 1], before.coords[:, 0]))
        np.testing.assert_array_equal(after.coords, before.coords[order])
        np.testing.assert_array_equal(after.features, before.features[order])


def test_tools_read_a_slide_without_patches(tmp_path):
    """N = 0, in the formats whose tools read a file of that kind."""
    anndata, spatialdata, artifacts = tool("anndata"), tool("spatialdata"), tool("hs2p.artifacts")
    source = tmp_path / "none_features.h5"
    write_features(
        source, [], np.empty((0, 2), np.int32), np.empty(0, np.int32), 5, (), {"patch_size": 256, "weights": "e"}
    )
    export_slides(source, tmp_path / "a.h5ad", "anndata")
    assert anndata.read_h5ad(tmp_path / "a.h5ad").shape == (0, 5)
    export_slides(source, tmp_path / "s.zarr", "spatialdata")
    assert spatialdata.read_zarr(tmp_path / "s.zarr").tables["patches"].shape == (0, 5)
    export_slides(source, tmp_path / "t", "slide2vec", target_size=256)
    assert len(artifacts.load_tiling_result(None, tmp_path / "t/tiles/none.coordinates.meta.json").x) == 0
    (path,) = export_slides(source, tmp_path / "q", "qupath")
    assert tool("geojson").loads(path.read_text()).is_valid


def test_slide2vec_reads_the_embeddings(made, tmp_path, slide2vec_artifacts):
    artifacts = slide2vec_artifacts
    export_slides(made, tmp_path, "slide2vec", dtype="float16")
    features = read_features(output_paths(made, FIRST).features).features
    found = artifacts.load_array(tmp_path / "tile_embeddings" / f"{FIRST}.pt")
    np.testing.assert_array_equal(found.numpy(), features.astype(np.float16))
    about = artifacts.load_metadata(tmp_path / "tile_embeddings" / f"{FIRST}.meta.json")
    assert (about["feature_dim"], about["num_tiles"], about["feature_dtype"]) == (WIDTH, len(features), "fp16")
    slide = artifacts.load_array(tmp_path / "slide_embeddings" / f"{FIRST}.pt")
    wanted = read_embedding(output_paths(made, FIRST).embedding).slide_embedding
    np.testing.assert_array_equal(slide.numpy(), wanted)


def test_what_slide2vec_writes_is_imported(made, tmp_path, slide2vec_artifacts):
    """Files of its own writers, not of ours."""
    artifacts = slide2vec_artifacts
    features = read_features(output_paths(made, FIRST).features)
    artifacts.write_tile_embeddings(
        "s1",
        features.features,
        output_dir=tmp_path,
        output_format="npz",
        metadata={"encoder_name": "uni2", "tile_size_lv0": 128, "requested_spacing_um": 0.5},
    )
    (tmp_path / "tiles").mkdir()
    x, y = features.coords.astype(np.int64).T
    np.savez_compressed(tmp_path / "tiles" / "s1.coordinates.npz", x=x, y=y)
    (done,) = import_features(tmp_path, tmp_path / "back", "slide2vec", fragments="grid")
    after = read_features(done.features_path)
    np.testing.assert_array_equal(after.features, features.features)
    assert (after.attrs["weights"], after.attrs["patch_size"]) == ("uni2", 128)


def test_geopandas_reads_the_geojson(made, tmp_path):
    """Not QuPath, but an independent reader of its format."""
    geopandas = tool("geopandas")
    (path,) = export_slides(made, tmp_path / "one.geojson", "qupath", slides=[FIRST], values=cluster)
    frame = geopandas.read_file(path)
    coords = read_features(output_paths(made, FIRST).features).coords
    assert frame.geometry.is_valid.all()
    np.testing.assert_array_equal(frame.geometry.bounds[["minx", "miny"]], coords)
    assert set(frame["objectType"]) == {"tile"}


def test_validators_of_geojson(made, tmp_path):
    """Two programs that check the standard (RFC 7946), of which QuPath's files are a kind."""
    geojson, models = tool("geojson"), tool("geojson_pydantic")
    (path,) = export_slides(
        made, tmp_path / "one.geojson", "qupath", slides=[SECOND], values=cluster, classify="cluster"
    )
    found = geojson.loads(path.read_text())
    assert found.is_valid, found.errors()
    checked = models.FeatureCollection.model_validate_json(path.read_text())
    assert len(checked.features) == len(read_features(output_paths(made, SECOND).features).coords)
    for feature in checked.features:
        (ring,) = feature.geometry.coordinates
        x, y = np.array(ring).T
        assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2 == 256**2  # outlines run counterclockwise there


def test_torch_opens_pt_files_as_clam_does(made, tmp_path):
    export_slides(made, tmp_path, "clam")
    path = tmp_path / "pt_files" / f"{FIRST}.pt"
    value = torch.load(path)  # as CLAM's dataset does; by default only what is safe is loaded
    np.testing.assert_array_equal(value.numpy(), read_features(output_paths(made, FIRST).features).features)
    assert type(value) is torch.Tensor
    assert zipfile.is_zipfile(path)


def test_parquet_with_pandas_alone(made, tmp_path):
    pandas = pytest.importorskip("pandas", reason="needs the extra `exchange`")
    export_slides(made, tmp_path, "parquet", values=cluster)
    frame = pandas.read_parquet(tmp_path / "patches" / f"{FIRST}.parquet")
    features = read_features(output_paths(made, FIRST).features)
    np.testing.assert_array_equal(np.stack(frame["vector"]), features.features)
    assert frame["cluster"].tolist()[:4] == ["blood", "stroma", "tumour", "blood"]
    slides = pandas.read_parquet(tmp_path / "slides.parquet")
    assert slides["slide"].tolist() == [FIRST, SECOND]
    wanted = read_embedding(output_paths(made, SECOND).embedding).slide_embedding
    np.testing.assert_array_equal(slides["slide_embedding"][1], wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_polars_and_duckdb(made, tmp_path, dtype):
    polars, duckdb = tool("polars"), tool("duckdb")
    pytest.importorskip("pyarrow", reason="needs the extra `exchange`")
    export_slides(made, tmp_path, "parquet", dtype=dtype, values=cluster)
    path = tmp_path / "patches" / f"{FIRST}.parquet"
    features = read_features(output_paths(made, FIRST).features).features.astype(dtype)
    frame = polars.read_parquet(path)
    np.testing.assert_array_equal(frame["vector"].to_numpy(), features)
    assert frame["cluster"].to_list()[:2] == ["blood", "stroma"]
    rows = duckdb.sql(f"select vector from '{path}' order by patch").fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in rows], dtype), features)
    counts = duckdb.sql(f"select slide, count(*) from '{tmp_path}/patches/*.parquet' group by slide").fetchall()
    assert dict(counts)[FIRST] == len(features)
    # What these two write is imported.
    (tmp_path / "theirs").mkdir()
    frame.drop("fragment").write_parquet(tmp_path / "theirs" / "polars.parquet")
    duckdb.sql(f"copy (select x, y, vector from '{path}') to '{tmp_path}/theirs/duck.parquet' (format parquet)")
    for name, stored in (("polars", dtype), ("duck", "float32")):  # DuckDB has no float16
        source = tmp_path / "theirs" / f"{name}.parquet"
        (done,) = import_features(source, tmp_path / name, "parquet", encoder="e", patch_size=128, fragments="grid")
        after = read_features(done.features_path)
        np.testing.assert_array_equal(after.features, features.astype(np.float32))
        assert after.attrs["feature_dtype"] == stored


def test_zarr_alone(made, tmp_path):
    zarr = pytest.importorskip("zarr", reason="needs the extra `exchange`")
    export_slides(made, tmp_path / "all.zarr", "zarr", values=cluster)
    root = zarr.open_group(str(tmp_path / "all.zarr"), mode="r")
    features = read_features(output_paths(made, SECOND).features)
    np.testing.assert_array_equal(root[f"{SECOND}/vectors"][:], features.features)
    assert root[f"{SECOND}/values/cluster"].attrs["categories"] == ["blood", "stroma", "tumour"]
    assert set(json.loads(root.attrs["exaonepath"])["slides"]) == {FIRST, SECOND}
