"""CSV columns: joined by position or number, numbers and texts, several slides, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from exaonepath.errors import SettingsError
from exaonepath.viz.values import table as table_module
from exaonepath.viz.values.table import PatchTable

COORDS = np.array([[0, 0], [256, 0], [0, 256]], np.int32)


def table(tmp_path, text: str, name="t.csv") -> PatchTable:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return PatchTable(path)


def test_by_position_with_missing_values(tmp_path):
    found = table(tmp_path, "\ufeffX, y ,score,label\n0,0,1.5,a\n256.0,0,NA,\n9,9,3,b\n")
    assert found.described() == [{"name": "score", "categories": []}, {"name": "label", "categories": ["a", "b"]}]
    assert np.array_equal(found.column("score", "s", COORDS).values, [1.5, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(found.column("label", "s", COORDS).values, [0, np.nan, np.nan], equal_nan=True)
    assert found.column("other", "s", COORDS) is None


def test_by_number_and_slide_with_tabs(tmp_path):
    found = table(tmp_path, "slide_id\tpatch\tv\na.svs\t2\t7\nb\t0\t1\na\t0\t5\na\t99\t5\na\t-1\t5\na\tx\t5\n", "t.tsv")
    assert np.array_equal(found.column("v", "a", COORDS).values, [5, np.nan, 7], equal_nan=True)
    assert np.array_equal(found.column("v", "b", COORDS).values, [1, np.nan, np.nan], equal_nan=True)
    assert found.column("v", "c", COORDS) is None


def test_a_category_is_the_same_number_on_every_slide(tmp_path):
    found = table(tmp_path, "slide,patch,kind\na,0,z\nb,0,y\nb,1,z\n")
    assert found.column("kind", "a", COORDS).values[0] == found.column("kind", "b", COORDS).values[1] == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no rows"),
        ("x,y,a\n", "no rows"),
        ("a,b\n1,2\n", "which patch"),
        ("x,a\n1,2\n", "which patch"),
        ("x,y\n1,2\n", "no column besides"),
        ("x,y,a\n1,2\n", "row 2 has 2 columns"),
        ("x,y,a,A\n1,2,3,4\n", "several columns"),
        ("x,y,a\n" + "".join(f"{n},0,t{n}\n" for n in range(50)), "50 different texts"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, what):
    with pytest.raises(SettingsError, match=what):
        table(tmp_path, text)


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        PatchTable(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"x,y,a\n\xff\xfe\x00,1,2\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        PatchTable(tmp_path / "b.csv")


def test_a_large_parquet_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `cohort`")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"patch": [0, 1, 2], "score": [1.5, None, 3.5]}), tmp_path / "t.parquet")
    found = PatchTable(tmp_path / "t.parquet").column("score", "s", COORDS).values
    assert found[[0, 2]].tolist() == [1.5, 3.5]
    assert np.isnan(found[1])
    monkeypatch.setattr(table_module, "_MOST_CELLS", 5)
    with pytest.raises(SettingsError, match="3 rows of 2 columns"):
        PatchTable(tmp_path / "t.parquet")
    monkeypatch.setattr(table_module, "_MOST_CELLS", 6)
    parquet.write_table(pyarrow.table({"patch": [], "score": []}), tmp_path / "e.parquet")
    with pytest.raises(SettingsError, match="no rows"):
        PatchTable(tmp_path / "e.parquet")
