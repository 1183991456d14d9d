"""Files of unknown origin: damaged, misleading, or built to do harm. Each is an error of ours that names the file."""

import json
import os
import pickle
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import torch

from exaonepath.errors import DataFileError, ExaonePathError, ForeignFileError, SettingsError, SlideListError
from exaonepath.exchange.torch_files import read_tensor
from exaonepath.log_once import forget
from exaonepath.slides.exporting import export_slides
from exaonepath.slides.importing import import_features

from .conftest import FIRST
from .test_round_trips import needs


class Runs:
    """Pickled, this creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def import_(source, format, **options):
    return import_features(source, source.parent / "back", format, **{"encoder": "e", "fragments": "one", **options})


@pytest.fixture
def clam(made, tmp_path):
    export_slides(made, tmp_path / "c", "clam", slides=[FIRST])
    shutil.rmtree(tmp_path / "c" / "h5_files")
    return tmp_path / "c"


def test_pt_files_run_nothing(clam, tmp_path):
    path = clam / "pt_files" / f"{FIRST}.pt"
    trap = tmp_path / "trap"
    good = path.read_bytes()
    n = len(torch.load(path))
    torch.save({"features": torch.zeros(n, 3), "x": Runs(trap)}, path)
    with pytest.raises(ForeignFileError, match="other objects than tensors"):
        import_(clam, "clam")
    path.write_bytes(pickle.dumps(Runs(trap)))
    with pytest.raises(DataFileError):
        import_(clam, "clam")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs(trap)))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(DataFileError):
        import_(clam, "clam")
    assert not trap.exists()
    path.write_bytes(good)
    assert import_(clam, "clam")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"features": torch.zeros(3, 2)}, "holds a dict"),
        ([torch.zeros(3, 2)], "holds a list"),
        (torch.zeros(3, 2, dtype=torch.int64), "not of floating-point numbers"),
        (torch.zeros(1, 1).expand(1_000_000, 1_000_000), "more numbers than its"),
        (torch.zeros(3, 2).to_sparse(), "not of floating-point numbers"),
        (torch.zeros(3), r"holds a tensor \[3\], not features"),
        (torch.zeros(2, 3, 4), "not features"),
        (torch.zeros(3, 2), "3 rows of features for"),
    ],
)
def test_pt_files_with_something_else(clam, value, message):
    torch.save(value, clam / "pt_files" / f"{FIRST}.pt")
    with pytest.raises(DataFileError, match=message):
        import_(clam, "clam")


def test_damaged_pt_files(clam):
    path = clam / "pt_files" / f"{FIRST}.pt"
    good = path.read_bytes()
    for data in (b"", b"hello", good[:100], good[:-30], good[: len(good) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataFileError, match=str(path)):
            import_(clam, "clam")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    with pytest.raises(ForeignFileError, match="compressed archive"):
        read_tensor(path)


def test_other_types_of_numbers(clam):
    path = clam / "pt_files" / f"{FIRST}.pt"
    shape = torch.load(path).shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype, stored in ((torch.float64, "float32"), (torch.bfloat16, "float32"), (torch.float16, "float16")):
        torch.save(values.to(dtype)[None], path)
        (done,) = import_(clam, "clam", overwrite=True)
        with h5py.File(done.features_path) as file:
            assert file["features"].dtype == stored
            np.testing.assert_array_equal(file["features"][:], values.to(dtype).float().numpy().astype(stored))
    for bad in (torch.full(shape, torch.nan), torch.full(shape, 1e300, dtype=torch.float64)):
        torch.save(bad, path)
        with pytest.raises(DataFileError, match=r"NaN|cannot"):
            import_(clam, "clam", overwrite=True)


def test_zarr_codecs_run_nothing(made, tmp_path):
    pytest.importorskip("zarr", reason="needs the extra `exchange`")
    store = tmp_path / "s.zarr"
    export_slides(made, store, "zarr", slides=[FIRST])
    about = store / FIRST / "vectors" / ".zarray"
    value = json.loads(about.read_text())
    trap = tmp_path / "trap"
    (chunk,) = (path for path in about.parent.iterdir() if not path.name.startswith("."))
    plain = chunk.read_bytes()
    chunk.write_bytes(pickle.dumps(Runs(trap)))
    for change in ({"filters": [{"id": "pickle"}], "compressor": None}, {"compressor": {"id": "pickle"}}):
        about.write_text(json.dumps({**value, **change}))
        with pytest.raises(ForeignFileError, match="'pickle', which is not read"):
            import_(store, "zarr")
    third = {"zarr_format": 3, "node_type": "array", "shape": value["shape"], "codecs": [{"name": "numcodecs.pickle"}]}
    about.unlink()
    (about.parent / "zarr.json").write_text(json.dumps(third))
    with pytest.raises(ForeignFileError, match=r"'numcodecs\.pickle', which is not read"):
        import_(store, "zarr")
    assert not trap.exists()
    (about.parent / "zarr.json").unlink()
    about.write_text(json.dumps(value))
    chunk.write_bytes(plain)
    assert import_(store, "zarr")


def test_zarr_stores_that_are_damaged(made, tmp_path):
    pytest.importorskip("zarr", reason="needs the extra `exchange`")
    good = tmp_path / "good.zarr"
    export_slides(made, good, "zarr", slides=[FIRST])
    (chunk,) = (path.relative_to(good) for path in (good / FIRST / "vectors").iterdir() if path.name[0] != ".")

    def damage(name, change, message, error=DataFileError):
        store = tmp_path / f"{name}.zarr"
        shutil.copytree(good, store)
        change(store)
        with pytest.raises(error, match=message):
            import_(store, "zarr")

    def metadata(array, **values):
        def change(store):
            path = store / FIRST / array / ".zarray"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return change

    def link(store):
        (tmp_path / "outside").write_bytes((store / chunk).read_bytes())
        (store / chunk).unlink()
        (store / chunk).symlink_to(tmp_path / "outside")

    damage("missing", lambda store: (store / chunk).unlink(), "has 0 of 1 chunks")
    damage("cut", lambda store: (store / chunk).write_bytes((store / chunk).read_bytes()[:-9]), "cannot be read")
    damage("link", link, "is a link", ForeignFileError)
    damage("bomb", metadata("coords", shape=[10**12, 2], chunks=[10**12, 2]), "declares", ForeignFileError)
    damage("long", metadata("coords", shape=[3, 2]), "different lengths")
    damage("sizes", metadata("vectors", chunks=[0, 3]), "no shape and chunks")
    damage("type", metadata("coords", dtype="<f4"), "must be integers")
    damage("json", lambda store: (store / FIRST / "coords" / ".zarray").write_text("{"), "not valid JSON")
    damage("none", lambda store: shutil.rmtree(store / FIRST / "vectors"), "has no array vectors")


def test_hdf5_files_that_mislead(made, tmp_path):
    export_slides(made, tmp_path / "t", "trident", slides=[FIRST])
    (good,) = (tmp_path / "t").rglob("features_*/*.h5")
    with h5py.File(good) as file:
        n, width = file["features"].shape

    def damage(change, message, **options):
        path = tmp_path / "bad" / "features_e" / "s.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(good, path)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(ExaonePathError, match=message):
            import_(path, "trident", **options)

    def replace(name, values):
        def change(file):
            attrs = dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values).attrs.update(attrs)

        return change

    def link(file):
        del file["features"]
        file["features"] = h5py.ExternalLink("other.h5", "features")

    damage(replace("features", np.zeros((2, n, width), "f4")), "must be floating point")
    damage(replace("features", np.zeros((n - 1, width), "f4")), "rows of features for")
    damage(replace("features", np.zeros((n, width), "i4")), "must be floating point")
    damage(replace("features", np.full((n, width), np.inf, "f4")), "NaN or infinity")
    damage(replace("coords", np.zeros((n, 2), "f4")), "must be integers")
    damage(replace("coords", np.full((n, 2), 2**40)), "beyond 32 bits")
    damage(link, "is a link")
    damage(lambda file: file["coords"].attrs.pop("patch_size_level0"), "--patch-size")
    damage(lambda file: file["coords"].attrs.update(patch_size_level0=0.5), "not a positive whole number")
    truncated = tmp_path / "features_e" / "s.h5"
    truncated.parent.mkdir()
    truncated.write_bytes(good.read_bytes()[:-200])
    with pytest.raises(DataFileError, match=r"s\.h5"):
        import_(truncated, "trident")


def test_features_of_several_encoders(made, tmp_path):
    for name in ("uni", "conch"):
        export_slides(made, tmp_path / "t", "trident", encoder=name, overwrite=True)
    with pytest.raises(SettingsError, match="several encoders"):
        import_(tmp_path / "t", "trident", encoder=None)
    folder = tmp_path / "t" / "20x_128px_0px_overlap" / "features_conch"
    done = import_features(folder, tmp_path / "back", "trident", fragments="one")
    assert len(done) == 2


def test_trident_writes_an_empty_list_of_coordinates(tmp_path):
    path = tmp_path / "s_patches.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=np.array([])).attrs["patch_size_level0"] = 512
    (done,) = import_(path, "trident", encoder=None)
    assert done.n_patches == 0


@pytest.mark.parametrize("name", ["../evil", "/abs", "a/b", "a\\b", "..", "", "nul", "a\nb", "x" * 300, ".hidden"])
def test_ids_cannot_leave_the_folder(made, tmp_path, name):
    arrow = pytest.importorskip("pyarrow", reason="needs the extra `exchange`")
    import pyarrow.parquet as parquet

    table = arrow.table({"slide": [name], "x": [0], "y": [0], "vector": [[1.0, 2.0]]})
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in" / "t.parquet")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SlideListError, match="cannot be used as ids"):
        import_features(tmp_path / "in", tmp_path / "out", "parquet", encoder="e", fragments="one", patch_size=256)
    assert set(tmp_path.rglob("*")) == before


def test_ids_that_would_write_one_file(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs the extra `exchange`")
    import pyarrow.parquet as parquet

    for names in (["a", "a_features"], ["Slide", "slide"]):
        table = arrow.table({"slide": names, "x": [0, 0], "y": [0, 0], "vector": [[1.0], [2.0]]})
        parquet.write_table(table, tmp_path / "t.parquet")
        with pytest.raises(SlideListError, match="cannot be used as ids"):
            import_(tmp_path / "t.parquet", "parquet", patch_size=256)


def test_parquet_tables_of_others(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs the extra `exchange`")
    import pyarrow.parquet as parquet

    path = tmp_path / "s.parquet"
    good = {"x": [0, 256], "y": [0, 0], "vector": [[1.0, 2.0], [3.0, 4.0]]}
    parquet.write_table(arrow.table(good), path)  # lists of no fixed length, as pandas writes them
    (done,) = import_(path, "parquet", patch_size=256, fragments="grid")
    assert (done.id, done.n_patches, done.n_fragments) == ("s", 2, 1)
    for change, message in (
        ({"vector": [[1.0, 2.0], [3.0]]}, "differ in length"),
        ({"vector": [[1.0, 2.0], None]}, "missing"),
        ({"vector": [["a"], ["b"]]}, "floating-point"),
        ({"vector": [1.0, 2.0]}, "vector"),
        ({"x": [0.5, 1.0]}, "must be integers"),
        ({"x": [0, None]}, "missing"),
        ({"fragment": [0.5, 1.0]}, "whole numbers"),
        ({"fragment": [-1, 0]}, "number -1"),
        ({"slide": ["a", None]}, "missing"),
    ):
        parquet.write_table(arrow.table({**good, **change}), path)
        with pytest.raises(DataFileError, match=message):
            import_(path, "parquet", patch_size=256, overwrite=True)
    parquet.write_table(arrow.table({"x": [1]}), path)
    with pytest.raises(DataFileError, match="lacks y, vector"):
        import_(path, "parquet")
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataFileError, match="cannot be read as a table"):
        import_(path, "parquet")


def test_anndata_of_others(tmp_path):
    anndata = pytest.importorskip("anndata", reason="needs the extra `exchange`")
    pandas = pytest.importorskip("pandas", reason="needs the extra `exchange`")
    from scipy import sparse

    path = tmp_path / "s.h5ad"
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    obs = pandas.DataFrame({"x": [0, 256, 900], "y": [0, 0, 0]}, index=list("abc"))
    anndata.AnnData(x, obs=obs).write_h5ad(path)
    (done,) = import_(path, "anndata", patch_size=256, fragments="grid")
    assert (done.id, done.n_patches, done.n_fragments) == ("s", 3, 2)
    # Rows of several slides, mixed.
    obs["slide"] = ["p", "q", "p"]
    anndata.AnnData(x, obs=obs).write_h5ad(path)
    done = import_(path, "anndata", patch_size=256)
    with h5py.File(done[0].features_path) as file:
        np.testing.assert_array_equal(file["features"][:], x[[0, 2]])
    for data, message in (
        (anndata.AnnData(x, obs=obs[["slide"]]), "no columns x and y"),
        (anndata.AnnData(sparse.csr_matrix(x), obs=obs), "must be a dense matrix"),
        (anndata.AnnData(x.astype(int), obs=obs), "must be a dense matrix"),
        (anndata.AnnData(obs=obs), "must be a dense matrix"),
        (anndata.AnnData(x, obs=obs.assign(x=[0.5, 1, 2])), "must be integers"),
        (anndata.AnnData(x, obs=obs.assign(fragment=["a", "b", "c"])), "not whole numbers"),
    ):
        data.write_h5ad(path)
        with pytest.raises(ExaonePathError, match=message):
            import_(path, "anndata", patch_size=256, overwrite=True)
    with h5py.File(path, "w") as file:
        file["nothing"] = 1
    with pytest.raises(ForeignFileError, match="no AnnData file"):
        import_(path, "anndata")
    with h5py.File(path, "w") as file:
        file["X"], file["obs"] = h5py.ExternalLink("a", "b"), 1
    with pytest.raises(ForeignFileError, match="is a link"):
        import_(path, "anndata")


def test_what_own_files_state_is_checked(made, tmp_path):
    zarr = pytest.importorskip("zarr", reason="needs the extra `exchange`")
    store = tmp_path / "s.zarr"
    export_slides(made, store, "zarr", slides=[FIRST])
    text = json.loads(zarr.open_group(str(store), mode="r").attrs["exaonepath"])
    for change, message in (
        (lambda value: value["slides"][FIRST].update(patch_size="big"), "patch_size of first"),
        (lambda value: value["slides"][FIRST].update(patch_size=-5), "patch_size of first"),
        (lambda value: value["slides"][FIRST].update(mpp=True), "mpp of first"),
        (lambda value: value["slides"][FIRST].pop("encoder"), "--encoder"),
        (lambda value: value.update(format=9), "later version"),
        (lambda value: value.update(slides=[1]), "damaged"),
    ):
        value = json.loads(json.dumps(text))
        change(value)
        zarr.open_group(str(store), mode="a").attrs["exaonepath"] = json.dumps(value)
        with pytest.raises(ExaonePathError, match=message):
            import_features(store, tmp_path / "back", "zarr")


def test_slide2vec_files_that_are_damaged(made, tmp_path):
    good = tmp_path / "good"
    export_slides(made, good, "slide2vec", slides=[FIRST])

    def damage(name, change, message):
        source = tmp_path / name
        shutil.copytree(good, source)
        change(source)
        with pytest.raises(ExaonePathError, match=message):
            import_(source, "slide2vec")

    def about(path, **values):
        return lambda source: (source / path).write_text(
            json.dumps({**json.loads((source / path).read_text()), **values})
        )

    def arrays(**values):
        return lambda source: np.savez(source / "tiles" / f"{FIRST}.coordinates.npz", **values)

    meta = f"tile_embeddings/{FIRST}.meta.json"
    n = len(torch.load(good / "tile_embeddings" / f"{FIRST}.pt"))
    damage("objects", arrays(x=np.array([Runs(tmp_path / "trap")] * n, object), y=np.zeros(n, int)), "cannot be read")
    assert not (tmp_path / "trap").exists()
    damage("lacks", arrays(x=np.zeros(n, int)), "lacks y")
    damage("short", arrays(x=np.zeros(3, int), y=np.zeros(3, int)), "for 3 tiles")
    damage("shapes", arrays(x=np.zeros((n, 2), int), y=np.zeros((n, 2), int)), "one length")
    damage("size", about(meta, tile_size_lv0="many"), "positive number")
    damage("sizes", about(meta, tile_size_lv0=77), "different sizes")
    damage("json", lambda source: (source / meta).write_text("[1]"), "no JSON object")
    damage("no tiles", lambda source: shutil.rmtree(source / "tiles"), "no such file")
    damage("no features", lambda source: (source / f"tile_embeddings/{FIRST}.pt").unlink(), "no such file")


@pytest.mark.parametrize("format", ["trident", "clam", "slide2vec", "anndata", "parquet", "zarr"])
def test_empty_folders(tmp_path, format):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataFileError, match="holds no"):
        import_(tmp_path / "in", format)
    with pytest.raises(SettingsError, match="does not exist"):
        import_(tmp_path / "nowhere", format)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("format", ["trident", "clam", "slide2vec", "anndata", "parquet", "zarr"])
def test_hidden_files_are_no_slides(made, tmp_path, format):
    """macOS writes ._<name> next to each file of a disk that has no place for its attributes."""
    needs(format)
    source = tmp_path / "in"
    export_slides(made, source, format, slides=[FIRST])
    for path in list(source.rglob("*")):
        if path.is_dir() and path.suffix == ".zarr":
            (path.parent / f"._{path.name}").mkdir()
            (path.parent / f"._{path.name}" / ".zgroup").write_text("{}")
        elif path.is_file() and ".zarr" not in str(path):
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7junk")
    (done,) = import_(source, format, fragments="one")
    assert done.id == FIRST


def test_a_folder_without_features(tmp_path):
    (tmp_path / "job" / "features_uni").mkdir(parents=True)
    with pytest.raises(DataFileError, match="holds no slides"):
        import_(tmp_path / "job", "trident")
    assert not (tmp_path / "back").exists()


def test_fragments_beyond_32_bits(made, tmp_path):
    """They would wrap around, and two fragments become one."""
    arrow = pytest.importorskip("pyarrow", reason="needs the extra `exchange`")
    import pyarrow.parquet as parquet

    path = tmp_path / "s.parquet"
    for last in (2**31, 2**32, 2**63 - 1):
        table = {"x": [0, 256], "y": [0, 0], "fragment": [0, last], "vector": [[1.0], [2.0]]}
        parquet.write_table(arrow.table(table), path)
        with pytest.raises(DataFileError, match=f"a fragment has the number {last}"):
            import_(path, "parquet", patch_size=256)
    needs("zarr")
    store = tmp_path / "s.zarr"
    export_slides(made, store, "zarr", slides=[FIRST])
    about = store / FIRST / "fragments" / ".zarray"
    value = json.loads(about.read_text())
    about.write_text(json.dumps({**value, "dtype": "<i8", "compressor": None}))
    (about.parent / "0").write_bytes(np.linspace(0, 2**32, value["shape"][0]).astype("<i8").tobytes())
    with pytest.raises(DataFileError, match="a fragment has the number 4294967296"):
        import_(store, "zarr")


def test_patches_of_one_position(tmp_path, caplog):
    """What a file looks like to which a program appended its second run."""
    path = tmp_path / "features_e" / "s.h5"
    path.parent.mkdir()
    coords = np.array([[0, 0], [256, 0]])
    for times, twice in ((1, False), (2, True)):
        with h5py.File(path, "w") as file:
            file["features"] = np.ones((2 * times, 3), np.float32)
            file.create_dataset("coords", data=np.tile(coords, (times, 1))).attrs["patch_size_level0"] = 256
        (done,) = import_(path, "trident", overwrite=True)
        assert done.n_patches == 2 * times
        assert ("2 of 4 patches of s have the position of another one" in caplog.text) == twice


def test_fragments_that_the_file_states(made, tmp_path, caplog):
    needs("parquet")
    export_slides(made, tmp_path / "p", "parquet")
    forget()
    import_features(tmp_path / "p", tmp_path / "a", "parquet")
    assert "is not used" not in caplog.text
    import_features(tmp_path / "p", tmp_path / "b", "parquet", fragments="one")
    assert caplog.text.count("Parquet's files state the fragments of patches; --fragments one is not used") == 1


def test_columns_of_coordinates_of_different_types(tmp_path):
    """Unsigned and signed, which numpy joins as floating-point numbers; truth values are no coordinates."""
    arrow = pytest.importorskip("pyarrow", reason="needs the extra `exchange`")
    import pyarrow.parquet as parquet

    path = tmp_path / "s.parquet"
    x, y = arrow.array([0, 2**31 - 1], arrow.uint64()), arrow.array([-7, 0], arrow.int16())
    parquet.write_table(arrow.table({"x": x, "y": y, "vector": [[1.0], [2.0]]}), path)
    (done,) = import_(path, "parquet", patch_size=256)
    with h5py.File(done.features_path) as file:
        assert file["coords"][:].tolist() == [[0, -7], [2**31 - 1, 0]]
    for bad in ([True, False], [0.0, 1.0], ["0", "1"]):
        parquet.write_table(arrow.table({"x": bad, "y": y, "vector": [[1.0], [2.0]]}), path)
        with pytest.raises(DataFileError, match="must be integers"):
            import_(path, "parquet", patch_size=256, overwrite=True)


def test_values_that_are_missing_name_the_file(tmp_path):
    path = tmp_path / "features_e" / "s.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["features"] = np.array([[1.0], [np.nan]], np.float32)
        file.create_dataset("coords", data=np.array([[0, 0], [256, 0]])).attrs["patch_size_level0"] = 256
    with pytest.raises(DataFileError, match=rf"{path}: features of s: NaN or infinity in 1 patches \(number 1\)"):
        import_(path, "trident")
