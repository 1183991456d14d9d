"""`exaonepath export` and `exaonepath import`."""

import json

import h5py
import numpy as np
import pytest

from exaonepath.files.features import read_features
from exaonepath.slides.outputs import output_paths
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """An output folder, filled by the first test that runs the command."""
    folder = tmp_path_factory.mktemp("export")
    make_slide(folder / "a.svs", 2000, 1500, fragments=2, holes=False, seed=1)
    return folder


@pytest.fixture
def out(run, encoded):
    if not (encoded / "out").exists():
        assert run("encode", encoded / "a.svs", "--out", encoded / "out", "--weights", "random:0").exit_code == 0
    return encoded / "out"


def test_there_and_back(run, out, tmp_path):
    done = run("export", out, "--to", tmp_path / "t", "--format", "trident")
    assert done.exit_code == 0, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    base = tmp_path / "t" / "20x_256px_0px_overlap"
    assert lines == [
        str(base / "patches" / "a_patches.h5"),
        str(base / "features_random-0" / "a.h5"),
        str(base / "slide_features_random-0" / "a.h5"),
    ]
    done = run("import", tmp_path / "t", "--out", tmp_path / "back", "--format", "trident")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: TRIDENT's files do not state which patches belong to one fragment")
    assert len(done.stderr.splitlines()) == 1
    done = run("import", tmp_path / "t", "--out", tmp_path / "back", "-f", "trident", "--fragments", "grid")
    assert done.exit_code == 0, done.stderr
    path = output_paths(tmp_path / "back", "a").features
    n = len(read_features(path).features)
    assert done.stdout == f"{path}  {n} patches, 1 fragment\n"
    np.testing.assert_array_equal(read_features(path).features, read_features(output_paths(out, "a").features).features)
    # The stages that follow.
    done = run("slide", path, "--out", tmp_path / "e.h5", "--weights", "random:0")
    assert done.exit_code == 0, done.stderr
    assert "were made by random-0 and imported from TRIDENT" in done.stderr


def test_values(run, out, tmp_path):
    (tmp_path / "scores.csv").write_text("patch,score,kind\n0,0.5,tumour\n1,,stroma\n")
    to = tmp_path / "a.geojson"
    options = (
        "--values",
        "pca",
        "--values",
        "clusters:3",
        "--values",
        "similarity:0",
        "--table",
        tmp_path / "scores.csv",
    )
    done = run("export", out, "--to", to, "--format", "qupath", *options, "--classify", "cluster")
    assert done.exit_code == 0, done.stderr
    features = json.loads(to.read_text())["features"]
    first, second = (item["properties"] for item in features[:2])
    assert set(first["measurements"]) == {
        *("Patch", "Fragment", "PCA 1", "PCA 2", "cluster", "similarity", "score", "kind"),
    }
    assert first["measurements"]["similarity"] == pytest.approx(1)
    assert first["measurements"]["score"] == 0.5
    assert "score" not in second["measurements"]
    names = {item["properties"]["classification"]["name"] for item in features}
    assert names <= {"cluster 0", "cluster 1", "cluster 2"}
    assert len(names) > 1
    done = run(
        "export", out, "--to", tmp_path / "b", "-f", "qupath", "--table", tmp_path / "scores.csv", "--classify", "kind"
    )
    assert done.exit_code == 0, done.stderr
    properties = [item["properties"] for item in json.loads((tmp_path / "b/a.geojson").read_text())["features"]]
    assert [p.get("classification", {}).get("name") for p in properties[:3]] == ["tumour", "stroma", None]


def test_single_files_and_types(run, out, tmp_path):
    features = output_paths(out, "a").features
    done = run("export", features, "--to", tmp_path / "c", "-f", "clam", "--dtype", "float16", "--batch-axis", "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    with h5py.File(tmp_path / "c" / "h5_files" / "a.h5") as file:
        assert (file["features"].shape[0], file["features"].dtype) == (1, np.float16)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--format", "mp3"), 2, "none of qupath, anndata"),
        (("--format", "clam", "--vectors", "x"), 2, "none of features, embeddings"),
        (("--format", "clam", "--values", "umap"), 2, "none of pca, clusters"),
        (("--format", "clam", "--values", "clusters:1"), 2, "2 to 12 clusters"),
        (("--format", "clam", "--patch-size", "0"), 2, "--patch-size"),
        (("--format", "clam", "--slide", "b"), 1, "no results of a slide 'b'"),
        (("--format", "clam", "--dtype", "int8"), 1, "float32 or float16"),
        (("--format", "qupath", "--classify", "kind"), 1, "no value 'kind'"),
        (("--format", "qupath", "--values", "similarity:100000"), 1, "has no patch 100000"),
        (("--format", "qupath", "--table", "nowhere.csv"), 1, "nowhere.csv cannot be read"),
    ],
)
def test_wrong_usage(run, out, tmp_path, arguments, code, message):
    done = run("export", out, "--to", tmp_path / "x", *arguments)
    assert done.exit_code == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_existing_outputs(run, out, tmp_path):
    export = ("export", out, "--to", tmp_path / "x", "--format", "patho-bench")
    assert run(*export).exit_code == 0
    done = run(*export)
    assert done.exit_code == 1
    assert "exist already; name another output, or ask to overwrite" in done.stderr
    assert run(*export, "--overwrite").exit_code == 0


def test_a_missing_library(run, out, tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def refuse(name, *rest):
        if name.split(".")[0] in ("anndata", "spatialdata"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    for format, extra in (("anndata", "exchange"), ("spatialdata", "spatialdata")):
        done = run("export", out, "--to", tmp_path / "x", "--format", format)
        assert done.exit_code == 1
        assert f"pip install 'exaonepath[{extra}]'" in done.stderr
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_slides_that_have_moved(run, out, encoded, tmp_path):
    """For their pictures: named on the command line; another slide of that name is not shown."""
    pytest.importorskip("anndata", reason="needs the extra `exchange`")
    moved = tmp_path / "moved"
    moved.mkdir()
    make_slide(moved / "a.svs", 2000, 1500, fragments=1, holes=False, seed=9)
    done = run("export", out, moved, "--to", tmp_path / "x.h5ad", "--format", "anndata")
    assert done.exit_code == 0, done.stderr
    assert "is another slide than the one" in done.stderr
    with h5py.File(tmp_path / "x.h5ad") as file:
        assert "images" not in file["uns/spatial/a"]
    done = run("export", out, encoded / "a.svs", "--to", tmp_path / "y.h5ad", "--format", "anndata")
    assert done.exit_code == 0, done.stderr
    with h5py.File(tmp_path / "y.h5ad") as file:
        assert file["uns/spatial/a/images/hires"].shape[2] == 3


def test_ctrl_c_says_what_has_to_be_done(run, tmp_path, monkeypatch):
    """Neither command resumes: what is there is refused without --overwrite."""
    from exaonepath.slides import exporting, importing

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "export_slides", interrupted)
    monkeypatch.setattr(importing, "import_features", interrupted)
    for command in (
        ("export", tmp_path, "--to", tmp_path / "to", "-f", "clam"),
        ("import", tmp_path, "--out", tmp_path / "to", "-f", "clam"),
    ):
        done = run(*command)
        assert done.exit_code == 130
        assert "interrupted; files that were finished are whole" in done.stderr
        assert "--overwrite" in done.stderr
        assert "resumes" not in done.stderr
