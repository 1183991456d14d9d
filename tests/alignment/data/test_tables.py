"""Matrices with ids, from text and Parquet, either way round."""

import gzip
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest

from exaonepath.alignment.data import tables
from exaonepath.alignment.data.formats import read_dense
from exaonepath.alignment.data.frames import read_frame
from exaonepath.alignment.data.matrices import read_matrix as read_raw
from exaonepath.alignment.data.orientation import orient
from exaonepath.alignment.data.report import CohortReport
from exaonepath.errors import DataFileError

VALUES = np.array([[1.5, 0, 3], [0.25, np.nan, 6]], np.float32)  # 2 patients, 3 genes
PATIENTS, GENES = ("0012", "0034"), ("TP53", "EGFR", "KRAS")


def read_matrix(path, orientation, patients=()):
    """The table of a file, and what is said of the way it lies."""
    report = CohortReport()
    tables = orient({"rna": read_raw(path)}, {"rna": orientation}, report, patients=patients)
    return tables.get("rna"), report.findings[0].message


def frame():
    return pd.DataFrame(VALUES, index=list(PATIENTS), columns=list(GENES))


WRITERS = {
    "csv": lambda f, p: f.to_csv(p),
    "tsv": lambda f, p: f.to_csv(p, sep="\t"),
    "csv.gz": lambda f, p: f.to_csv(p),
    "parquet": lambda f, p: f.to_parquet(p),
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_is_read_either_way_round(tmp_path, ending, turned):
    path = tmp_path / f"m.{ending}"
    WRITERS[ending](frame().T if turned else frame(), path)
    for orientation in ("auto", "features_by_patients" if turned else "patients_by_features"):
        table, reported = read_matrix(path, orientation, PATIENTS)
        assert table.patients == PATIENTS  # leading zeros kept: ids are text
        assert table.features == GENES
        np.testing.assert_array_equal(table.values, VALUES)
        assert table.values.dtype == np.float32
        assert ("columns" if turned else "rows") in reported


def test_a_parquet_file_whose_first_column_holds_the_ids(tmp_path):
    frame().reset_index(names="patient").to_parquet(tmp_path / "m.parquet", index=False)
    table, _ = read_matrix(tmp_path / "m.parquet", "patients_by_features")
    assert table.patients == PATIENTS
    np.testing.assert_array_equal(table.values, VALUES)


def test_blocks_join_to_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_VALUES", 6)  # two rows a block
    values = np.random.default_rng(0).random((7, 3)).astype(np.float32)
    big = pd.DataFrame(values, index=[f"p{i}" for i in range(7)], columns=list(GENES))
    for ending, write in WRITERS.items():
        write(big, tmp_path / f"m.{ending}")
        table, _ = read_matrix(tmp_path / f"m.{ending}", "patients_by_features")
        np.testing.assert_array_equal(table.values, values)
        assert [rows.stop - rows.start for rows, _ in table.row_blocks()] == [2, 2, 2, 1]


def test_a_header_without_the_corner_as_r_writes_it(tmp_path):
    (tmp_path / "m.tsv").write_text("A\tB\np1\t1\t2\np2\t3\t4\n")
    table, _ = read_matrix(tmp_path / "m.tsv", "patients_by_features")
    assert table.features == ("A", "B")
    assert table.patients == ("p1", "p2")


def test_equal_names_in_a_header_stay_equal(tmp_path):
    (tmp_path / "m.csv").write_text("id,p1,p1\nA,1,2\n")
    table, _ = read_matrix(tmp_path / "m.csv", "features_by_patients")
    assert table.patients == ("p1", "p1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,A\np1,1\np2,high\n", "'high'.*'p2'.*'A'"),
        ("id\np1\n", "1 column"),
        ("id,A\n", "0 column"),
        ("", "column"),
        ("id,A,B,C\np1,1\n", "4 names"),
        ("id,A\np1,1,2,3\n", "names in the header"),
    ],
)
def test_what_is_no_matrix_is_said(tmp_path, text, said):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataFileError, match=said):
        read_matrix(tmp_path / "m.csv", "auto")


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        read_matrix(tmp_path / "none.csv", "auto")
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    for read in (lambda p: read_matrix(p, "auto"), read_frame):
        with pytest.raises(DataFileError, match="cannot be read"):
            read(tmp_path / "m.parquet")
    with gzip.open(tmp_path / "m.csv.gz", "wb") as file:
        file.write(b"\xff\xfe\x00binary")
    with pytest.raises(DataFileError, match="cannot be read"):
        read_matrix(tmp_path / "m.csv.gz", "auto")


def test_a_table_of_text_leaves_ids_alone(tmp_path):
    (tmp_path / "t.csv").write_text("\ufeffpatient,site\n007,NA\n", encoding="utf-8")
    read = read_frame(tmp_path / "t.csv")
    assert list(read.columns) == ["patient", "site"]
    assert read.iloc[0].tolist() == ["007", "NA"]


def test_a_wide_matrix_is_never_held_in_float64(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("X", (200, 60_000), "<f8", fillvalue=0.5, chunks=(10, 60_000))
        tracemalloc.start()
        values = read_dense(file["X"])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (values == 0.5).all()
    # The table in float32, and one block as it is stored; in float64 it would be 96 MB more.
    assert peak <= values.nbytes + 8 * tables.BLOCK_VALUES + (1 << 20)


@pytest.mark.parametrize("ending", ["csv.gz", "tsv.gz"])
def test_cut_off_and_damaged_gzip_are_typed_errors(tmp_path, ending):
    values = np.random.default_rng(0).random((300, 20)).astype(np.float32)
    WRITERS[ending.removesuffix(".gz")](pd.DataFrame(values, [f"p{i}" for i in range(300)]), tmp_path / f"m.{ending}")
    whole = (tmp_path / f"m.{ending}").read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:100] + b"\xff" * 40 + whole[140:], whole[:12]):
        (tmp_path / f"m.{ending}").write_bytes(broken)
        for read in (read_raw, read_frame):
            with pytest.raises(DataFileError, match="cannot be read as"):
                read(tmp_path / f"m.{ending}")


def test_a_quote_that_swallows_rows_is_said(tmp_path):
    (tmp_path / "m.tsv").write_text('id\tA\np1\t1\n"p2\t2\np3\t3\n"p4\t4\n')
    with pytest.raises(DataFileError, match=r"double quote.*p2.*not closed"):
        read_raw(tmp_path / "m.tsv")
    (tmp_path / "l.tsv").write_text('patient\tnote\np1\tx\np2\t"5 prime\np3\t"3 prime\np4\ty\n')
    with pytest.raises(DataFileError, match=r"double quote.*5 prime.*not closed"):
        read_frame(tmp_path / "l.tsv")
    (tmp_path / "r.tsv").write_text('"A"\t"B"\n"p1"\t1\t2\n')  # as R writes it
    assert read_raw(tmp_path / "r.tsv").rows == ("p1",)
