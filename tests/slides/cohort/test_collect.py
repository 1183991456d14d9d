"""The table of slide embeddings: complete, current, and never a mixture of encoders."""

import json
import sys
import threading

import numpy as np
import pytest

from exaonepath.errors import DataFileError, MissingDependencyError, OutputCollisionError, SettingsError
from exaonepath.files import slide_vectors
from exaonepath.files.embeddings import SlideEmbedding, write_embedding
from exaonepath.files.slide_vectors import read_slide_vectors
from exaonepath.slides.cohort import collect
from exaonepath.slides.cohort.collect import collect_slide_vectors
from exaonepath.slides.outputs import choose_layout, output_paths

arrow = pytest.importorskip("pyarrow", reason="needs the extra `cohort`")


@pytest.fixture
def write(tmp_path):
    """Write the embedding of a slide; the vector is full of `value`."""

    def embedding(name, value=1.0, width=6, patient=None, encoder="a", **attrs):
        path = output_paths(tmp_path, name).embedding
        path.parent.mkdir(parents=True, exist_ok=True)
        vector = np.full(width, value, np.float32)
        empty = np.zeros((0, 2), np.int32)
        stated = {
            "n_patches": 3,
            "n_failed": 1,
            "weights": f"weights of {encoder}",
            "weights_fingerprint": f"slide {encoder}",
            "patch_weights_fingerprint": f"patch {encoder}",
            "random_weights": encoder == "random",
            "slide_path": f"/data/{name}.svs",
            "slide_fingerprint": f"of {name}",
            "exaonepath_version": "0",
            **({} if patient is None else {"patient": patient}),
            **attrs,
        }
        stated = {key: value for key, value in stated.items() if value is not None}
        write_embedding(path, SlideEmbedding(vector, None, empty, empty[:, 0]), stated)
        return path

    return embedding


@pytest.fixture
def reads(monkeypatch):
    """Names of the embeddings that are read."""
    seen = []
    read = collect.read_slide_embedding
    monkeypatch.setattr(collect, "read_slide_embedding", lambda path: seen.append(path.stem) or read(path))
    return seen


@pytest.mark.parametrize("layout", ["flat", "hashed"])
def test_a_row_a_slide(write, tmp_path, layout):
    choose_layout(tmp_path, 1, layout)
    write("b", 2.0, patient="P1")
    write("a, with a comma \U0001f52c", 1.0)
    found = collect_slide_vectors(tmp_path, {"a, with a comma \U0001f52c": "P2"})
    assert (found.n_read, found.n_kept, found.n_removed, found.problems) == (2, 0, 0, ())
    assert [(table.path.name, table.n_slides, table.width) for table in found.tables] == [("slides.parquet", 2, 6)]
    vectors = read_slide_vectors(tmp_path)
    assert vectors.ids == ("a, with a comma \U0001f52c", "b")
    assert vectors.vectors.dtype == np.float32
    assert vectors.vectors.tolist() == [[1.0] * 6, [2.0] * 6]
    assert vectors.columns["patient"] == ["P2", "P1"]
    assert vectors.columns["n_patches"] == [3, 3]
    assert vectors.columns["slide_path"][1] == "/data/b.svs"
    assert len(set(vectors.columns["settings_hash"])) == 1
    assert len(vectors) == 2


def test_only_what_changed_is_read(write, tmp_path, reads):
    for name in "abc":
        write(name)
    collect_slide_vectors(tmp_path)
    reads.clear()
    before = (tmp_path / "slides.parquet").stat()
    again = collect_slide_vectors(tmp_path)
    assert (again.n_read, again.n_kept, reads) == (0, 3, [])
    assert (tmp_path / "slides.parquet").stat().st_ino == before.st_ino
    write("b", 7.0)
    write("d", 8.0)
    output_paths(tmp_path, "c").embedding.unlink()
    changed = collect_slide_vectors(tmp_path)
    assert (changed.n_read, changed.n_kept, changed.n_removed, reads) == (2, 1, 1, ["b", "d"])
    assert read_slide_vectors(tmp_path).vectors[:, 0].tolist() == [1.0, 7.0, 8.0]


def test_patients_are_kept_and_replaced(write, tmp_path):
    write("a")
    write("b", patient="stated")
    collect_slide_vectors(tmp_path, {"a": "A"})
    assert read_slide_vectors(tmp_path).columns["patient"] == ["A", "stated"]
    write("a", 2.0)
    collect_slide_vectors(tmp_path)
    assert read_slide_vectors(tmp_path).columns["patient"] == ["A", "stated"]
    collect_slide_vectors(tmp_path, {"b": "B"})
    assert read_slide_vectors(tmp_path).columns["patient"] == ["A", "B"]


def test_encoders_are_never_mixed(write, tmp_path, caplog):
    write("a")
    write("b", encoder="b")
    write("c", width=8)
    write("d", patch_weights_fingerprint="another")
    found = collect_slide_vectors(tmp_path)
    assert len(found.tables) == 4
    assert "cannot be compared" in caplog.text
    assert not (tmp_path / "slides.parquet").exists()
    with pytest.raises(SettingsError, match="weights of a; ") as caught:
        read_slide_vectors(tmp_path)
    assert "weights of b" in str(caught.value)
    assert read_slide_vectors(tmp_path, weights="weights of b").ids == ("b",)
    assert read_slide_vectors(tmp_path, weights="another").ids == ("d",)
    assert read_slide_vectors(found.tables[0].path).ids
    with pytest.raises(SettingsError, match="select 0 tables"):
        read_slide_vectors(tmp_path, weights="nobody's")
    for name in "bcd":
        output_paths(tmp_path, name).embedding.unlink()
    assert [table.path.name for table in collect_slide_vectors(tmp_path).tables] == ["slides.parquet"]
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["slides.parquet"]


def test_other_settings_have_another_hash(write, tmp_path):
    write("a")
    write("b", preprocessing="{}")
    write("c", feature_dtype="float16")
    collect_slide_vectors(tmp_path)
    assert len(set(read_slide_vectors(tmp_path).columns["settings_hash"])) == 3


def test_random_weights_are_told(write, tmp_path, caplog):
    write("a", encoder="random")
    collect_slide_vectors(tmp_path)
    assert read_slide_vectors(tmp_path).columns["random_weights"] == [True]
    assert "no information about pathology" in caplog.text


def test_a_damaged_embedding_costs_only_its_row(write, tmp_path):
    write("a")
    path = write("b")
    path.write_bytes(path.read_bytes()[:-50])
    (output_paths(tmp_path, "c").embedding).write_bytes(b"no HDF5")
    found = collect_slide_vectors(tmp_path)
    assert len(found.problems) == 2
    assert str(path) in found.problems[0]
    assert read_slide_vectors(tmp_path).ids == ("a",)


def test_the_last_copy_is_not_removed(write, tmp_path):
    path = write("a")
    collect_slide_vectors(tmp_path)
    before = (tmp_path / "slides.parquet").read_bytes()
    path.unlink()
    with pytest.raises(DataFileError, match="no embedding any more"):
        collect_slide_vectors(tmp_path)
    assert (tmp_path / "slides.parquet").read_bytes() == before


def test_files_of_others_are_not_replaced(write, tmp_path):
    write("a")
    target = tmp_path / "slides.parquet"
    table = arrow.table({"id": ["x"]})
    for other in (lambda: arrow.parquet.write_table(table, target), lambda: target.write_text("notes")):
        other()
        before = target.read_bytes()
        with pytest.raises(OutputCollisionError, match="not replaced"):
            collect_slide_vectors(tmp_path)
        assert target.read_bytes() == before
        with pytest.raises(DataFileError):
            read_slide_vectors(tmp_path)


def test_a_damaged_table_is_made_again(write, tmp_path):
    write("a")
    collect_slide_vectors(tmp_path)
    target = tmp_path / "slides.parquet"
    good = target.read_bytes()
    for length in (4, 100, len(good) - 1):
        target.write_bytes(good[:length])
        with pytest.raises(DataFileError, match="makes it again"):
            read_slide_vectors(tmp_path)
        collect_slide_vectors(tmp_path)
        assert read_slide_vectors(tmp_path).ids == ("a",)


def test_a_table_of_a_later_version_is_neither_read_nor_replaced(write, tmp_path, monkeypatch):
    write("a")
    monkeypatch.setattr(slide_vectors, "FORMAT", 2)
    collect_slide_vectors(tmp_path)
    monkeypatch.setattr(slide_vectors, "FORMAT", 1)
    with pytest.raises(DataFileError, match="format 2"):
        read_slide_vectors(tmp_path)
    with pytest.raises(OutputCollisionError, match="format 2"):
        collect_slide_vectors(tmp_path)


def test_nothing_to_collect(tmp_path):
    assert collect_slide_vectors(tmp_path).tables == ()
    with pytest.raises(DataFileError, match="no such folder"):
        collect_slide_vectors(tmp_path / "gone")
    with pytest.raises(DataFileError, match="exaonepath collect"):
        read_slide_vectors(tmp_path)


def test_an_embedding_that_appears_meanwhile_is_not_lost(write, tmp_path, monkeypatch):
    """Another process finishes, and its newer table is replaced by ours: we look again after we have written."""
    write("a")
    write_table, late = collect.write_table, []

    def slow(path, table):
        if not late:
            late.append(True)
            write("b", 2.0)
        write_table(path, table)

    monkeypatch.setattr(collect, "write_table", slow)
    found = collect_slide_vectors(tmp_path)
    assert found.tables[0].n_slides == 2
    assert read_slide_vectors(tmp_path).ids == ("a", "b")


def test_many_at_once(write, tmp_path):
    def work(at):
        write(f"s{at}", float(at))
        collect_slide_vectors(tmp_path)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_slide_vectors(tmp_path).ids == tuple(f"s{at}" for at in range(6))
    assert not list(tmp_path.glob(".*"))


def test_without_pyarrow(write, tmp_path, monkeypatch):
    write("a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (collect_slide_vectors, read_slide_vectors):
        if call is read_slide_vectors:
            (tmp_path / "slides.parquet").write_bytes(b"")
        with pytest.raises(MissingDependencyError, match=r"exaonepath\[cohort\]"):
            call(tmp_path)


def test_the_columns_are_the_documented_ones(write, tmp_path):
    write("a")
    collect_slide_vectors(tmp_path)
    table = arrow.parquet.read_table(tmp_path / "slides.parquet")
    assert table.column_names == [*slide_vectors.COLUMNS, "slide_embedding"]
    assert table.schema.field("slide_embedding").type == arrow.list_(arrow.float32(), 6)
    assert json.loads(table.schema.metadata[b"exaonepath"]) == {"format": 1}
