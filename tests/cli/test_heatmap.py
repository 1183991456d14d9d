"""`exaonepath heatmap`: files, options, errors in one line, several slides."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra `viz`")
pytest.importorskip("tifffile", reason="needs the extra `viz`")

from exaonepath import read_patches
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a", "b ü")):
        make_slide(folder / f"{name}.svs", 1500, 1200, fragments=1, holes=False, seed=seed)
    return folder


@pytest.fixture
def out(run, slides, tmp_path):
    assert run("encode", slides, "--out", tmp_path / "out", "--weights", "random:0", "-q").exit_code == 0
    return tmp_path / "out"


def test_pictures_of_all_slides(run, out):
    done = run("heatmap", out, "--by", "cluster", "--clusters", 3, "--ome-tiff", "--contact-sheet", "--size", 400)
    assert done.exit_code == 0, done.stderr
    names = [f"{slide}-clusters-3{end}" for slide in ("a", "b ü") for end in (".png", ".ome.tif", "-patches.png")]
    assert done.stdout.splitlines() == [str(out / "figures" / name) for name in names]
    assert sorted(path.name for path in (out / "figures").iterdir()) == sorted(names)
    again = run("heatmap", out, "--by", "cluster", "--clusters", 3)
    assert again.exit_code == 1
    assert again.stderr.count("exists already; --overwrite") == 2
    assert "2 of 2 slides failed" in again.stderr
    assert run("heatmap", out, "--by", "cluster", "--clusters", 3, "--overwrite", "-q").stdout == ""


def test_attention_and_columns(run, out, tmp_path):
    done = run("heatmap", out, "--id", "a", "--size", 300, "--to", tmp_path / "to")  # attention is the default
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "to" / "a-attention-mean.png").exists()
    coords = read_patches(out / "patches" / "a.h5").coords
    x, y = coords[2] + 5
    done = run("heatmap", out, "--id", "a", "--at", f"{x},{y}", "--block", 1, "--no-png", "--ome-tiff")
    assert (out / "figures" / "a-attention-2-block-1.ome.tif").exists(), done.stderr
    rows = "".join(f"{n},{'low' if n % 2 else 'high'}\n" for n in range(len(coords)))
    (tmp_path / "t.csv").write_text("patch,grade / level\n" + rows)
    done = run("heatmap", out, "--id", "a", "--column", "grade / level", "--table", tmp_path / "t.csv", "--size", 300)
    assert done.stdout.strip() == str(out / "figures" / "a-column-grade___level.png"), done.stderr


def test_columns_of_a_parquet_file(run, out, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `cohort`")
    from pyarrow import parquet

    coords = read_patches(out / "patches" / "a.h5").coords
    score = np.linspace(0, 1, len(coords)).tolist()
    score[1] = None
    columns = {"x": coords[:, 0], "y": coords[:, 1], "score": score, "vector": [[1.0, 2.0]] * len(coords)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    done = run("heatmap", out, "--id", "a", "--column", "score", "--table", tmp_path / "t.parquet", "--size", 300)
    assert done.exit_code == 0, done.stderr
    done = run("heatmap", out, "--id", "a", "--column", "vector", "--table", tmp_path / "t.parquet")
    assert "has no column vector; it has score" in done.stderr
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:200])
    done = run("heatmap", out, "--id", "a", "--column", "score", "--table", tmp_path / "t.parquet")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "is not a Parquet file" in done.stderr


def test_mistakes_are_one_line(run, out, slides, tmp_path):
    for arguments, code, what in [
        ([tmp_path / "none"], 1, "is not a folder"),
        ([out, "--id", "c"], 1, "has no slide c; it has a, b"),
        ([out, "--patch", "3"], 2, "name it with --id"),
        ([out, "--by", "colour"], 2, "none of attention"),
        ([out, "--at", "3"], 2, "is not X,Y"),
        ([out, "--id", "a", "--by", "similarity"], 1, "similarity is that to a patch"),
        ([out, "--id", "a", "--patch", "99999"], 1, "there is no patch 99999"),
        ([out, "--no-png"], 1, "pictures are png"),
        ([out, "--palette", "jet"], 1, "viridis, cividis, magma"),
        ([out, "--column", "x"], 1, "name the file"),
        ([out, "--column", "x", "--table", tmp_path / "no.csv"], 1, "cannot be read"),
        ([out, "--size", "50"], 1, "100 to 6000"),
    ]:
        done = run("heatmap", *arguments)
        assert done.exit_code == code, (arguments, done.stderr)
        assert what in " ".join(done.stderr.replace("│", " ").split()), (arguments, done.stderr)
        assert done.stdout == ""


def test_a_moved_slide_is_named(run, out, slides, tmp_path):
    moved = tmp_path / "moved"
    slides.rename(moved)
    try:
        done = run("heatmap", out, "--by", "fragment", "--size", 200)
        assert done.exit_code == 1
        assert "2 of 2 slides failed" in done.stderr
        done = run("heatmap", out, moved, "--by", "fragment", "--size", 200)
        assert done.exit_code == 0, done.stderr
    finally:
        moved.rename(slides)
