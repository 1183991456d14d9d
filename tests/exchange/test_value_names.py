"""Values of patches with any name: of a table that a user made, and of this package itself."""

import json

import h5py
import numpy as np
import pytest

from exaonepath.errors import SettingsError
from exaonepath.exchange.slide_patches import Values
from exaonepath.exchange.value_names import stored_names
from exaonepath.log_once import forget
from exaonepath.slides.exporting import export_slides

from .conftest import FIRST, tool
from .test_round_trips import needs

# Characters that one format or another refuses, names that differ in one of them or in case only, and names of columns
# that the formats have themselves.
NAMES = (
    *("PCA 1", "T/N ratio", "T_N ratio", "T:N ratio", "tumor %", "tumor_%", "Größe", "größe", ".hidden", "..", "a\nb"),
    *("slide", "patch", "x", "y", "fragment", "Fragment", "fragment_value", "Patch", "patient", "vector", "region"),
    *("_index", "zarr.json", ".zattrs", "__x"),
)


def values(slide):
    return {name: Values(np.full(len(slide), at, np.float32)) for at, name in enumerate(NAMES)}


def numbers(columns):
    """What each column holds, by its place in NAMES."""
    found = {int(np.asarray(column)[0]): name for name, column in columns.items()}
    assert sorted(found) == list(range(len(NAMES)))  # none is lost, and none took the name of another
    return {NAMES[at]: name for at, name in found.items()}


def test_names_that_are_refused_are_changed_and_stay_different(caplog):
    forget()
    found = stored_names(["a/b", "a_b", "x", "x_value", ""], "some files", reserved=("x",), unsafe="/")
    assert found == {"a/b": "a_b-2", "a_b": "a_b", "x": "x_value-2", "x_value": "x_value", "": "value"}
    assert "values have other names in some files: 'a/b' is 'a_b-2', 'x' is 'x_value-2', '' is 'value'" in caplog.text
    caplog.clear()
    assert list(stored_names(["b", "A", "a"], "files", ignore_case=True).items()) == [
        ("b", "b"),
        ("A", "A"),
        ("a", "a-2"),
    ]
    assert stored_names(["PCA 1"], "files") == {"PCA 1": "PCA 1"}
    assert caplog.text.count("files") == 1


def test_qupath(made, tmp_path):
    (path,) = export_slides(made, tmp_path / "a.geojson", "qupath", slides=[FIRST], values=values)
    measured = json.loads(path.read_text())["features"][3]["properties"]["measurements"]
    assert measured.pop("Patch") == 3
    assert measured.pop("Fragment") in (0, 1)
    found = numbers({name: [value] for name, value in measured.items()})
    assert (found["Patch"], found["Fragment"], found["T/N ratio"]) == ("Patch_value", "Fragment_value", "T/N ratio")


@pytest.mark.filterwarnings("error::FutureWarning")  # of names that the library will refuse
def test_anndata(made, tmp_path):
    needs("anndata")
    anndata = pytest.importorskip("anndata")
    (path,) = export_slides(made, tmp_path / "a.h5ad", "anndata", slides=[FIRST], values=values)
    obs = anndata.read_h5ad(path).obs
    found = numbers(obs.drop(columns=["slide", "patch", "x", "y", "fragment", "patient"]))
    assert (found["T/N ratio"], found["T_N ratio"], found["x"]) == ("T_N ratio-2", "T_N ratio", "x_value")
    assert (found["fragment"], found["fragment_value"]) == ("fragment_value-2", "fragment_value")


def test_parquet(made, tmp_path):
    needs("parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    (path,) = export_slides(made, tmp_path / "a.parquet", "parquet", slides=[FIRST], values=values)
    table = parquet.read_table(path)
    own = ("slide", "patch", "x", "y", "fragment", "patient", "vector")
    found = numbers({name: table[name].to_numpy() for name in table.column_names if name not in own})
    assert (found["x"], found["T/N ratio"], found["fragment"]) == ("x_value", "T/N ratio", "fragment_value-2")


def test_zarr(made, tmp_path):
    needs("zarr")
    zarr = pytest.importorskip("zarr")
    (path,) = export_slides(made, tmp_path / "a.zarr", "zarr", slides=[FIRST], values=values)
    group = zarr.open_group(str(path), mode="r")[f"{FIRST}/values"]
    found = numbers({name: array[:] for name, array in group.arrays()})
    for name, stored in found.items():
        assert group[stored].attrs.get("name", stored) == name
    assert len({stored.casefold() for stored in found.values()}) == len(NAMES)
    assert not [stored for stored in found.values() if stored.startswith(".") or set(stored) & set('/\\<>:"|?*')]


@pytest.mark.filterwarnings("ignore")
def test_spatialdata(made, tmp_path):
    spatialdata = tool("spatialdata")
    (path,) = export_slides(made, tmp_path / "a.zarr", "spatialdata", slides=[FIRST], values=values)
    table = spatialdata.read_zarr(path).tables["patches"]
    found = numbers(table.obs.drop(columns=["slide", "patch", "x", "y", "fragment", "patient", "region"]))
    assert (found["PCA 1"], found["region"]) == ("PCA_1", "region_value")
    assert set(table.obs["region"]) == {f"{FIRST}_patches"}


def test_columns_of_another_name_are_not_imported(made, tmp_path):
    """What is read back of an export with such names: the same features, and the fragments, not a value."""
    from exaonepath.slides.importing import import_features

    for format, to in (("parquet", "a.parquet"), ("anndata", "a.h5ad"), ("zarr", "a.zarr")):
        needs(format)
        export_slides(made, tmp_path / to, format, slides=[FIRST], values=values)
        (done,) = import_features(tmp_path / to, tmp_path / format, format)
        with h5py.File(done.features_path) as back, h5py.File(made / "patches" / f"{FIRST}_features.h5") as before:
            for name in ("features", "coords", "contour_index"):
                np.testing.assert_array_equal(back[name][:], before[name][:])


@pytest.mark.parametrize("text", ["a\nb", "a\rb", ":", "a:", ": b", "a:: b", " : b"])
def test_classes_that_qupath_refuses(made, tmp_path, text):
    """PathClass of QuPath: no line break, no part without text; one such class and the whole file is not opened."""

    def kinds(slide):
        return {"kind": Values((np.arange(len(slide)) % 2).astype(np.float32), ("Tumor: Positive", text))}

    with pytest.raises(SettingsError, match="does not open files with the class"):
        export_slides(made, tmp_path / "x", "qupath", slides=[FIRST], values=kinds, classify="kind")
    assert not list((tmp_path / "x").iterdir())
    (path,) = export_slides(made, tmp_path / "y", "qupath", slides=[FIRST], values=kinds)  # no class, no harm
    assert json.loads(path.read_text())["features"][1]["properties"]["measurements"]["kind"] == 1


def test_values_of_a_slide_without_patches(tmp_path):
    """One of many, perhaps: no value that is asked for stops the others."""
    from exaonepath.cli.exported_values import values_of
    from exaonepath.files.features import write_features

    source = tmp_path / "none_features.h5"
    write_features(source, [], np.empty((0, 2)), np.empty(0), 5, (), {"patch_size": 256, "weights": "e"})
    (tmp_path / "t.csv").write_text("slide,patch,kind\nother,0,stroma\n")
    values = values_of(["pca", "clusters:3", "similarity:4"], tmp_path / "t.csv")
    (path,) = export_slides(source, tmp_path / "q", "qupath", values=values, classify="kind")
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": []}
    for format in ("anndata", "parquet", "zarr"):
        needs(format)
        assert export_slides(source, tmp_path / format, format, values=values)
