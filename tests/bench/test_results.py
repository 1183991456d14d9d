"""The results tables: every committed row fits its schema, and a row that does not is refused."""

import json

import pytest
from harness import table
from report import lines

TABLES = sorted(table.RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_every_committed_row_fits_its_table(path):
    rows = path.read_text(encoding="utf-8").splitlines()
    assert rows
    for number, line in enumerate(rows, 1):
        assert not table.problems_of(path.stem, json.loads(line)), f"{path.name}:{number}"


def test_there_are_tables():
    assert TABLES


def test_a_measured_row_fits(measured, encoded):
    assert table.problems_of("attention", measured()) == []
    assert table.problems_of("encoder", encoded()) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ms": "2.0"}, "ms is '2.0'"),
        ({"n": True}, "n is True"),
        ({"speed": 1}, "unknown column speed"),
        ({"status": "great"}, "status is"),
        ({"ms": None}, "only a row that is ok has a time"),
        ({"status": "failed", "reason": "no memory"}, "only a row that is ok has a time"),
        ({"status": "failed", "ms": None}, "says why"),
        ({"ms_p20": 2.5}, "quantiles"),
        ({"device": "cuda", "gpu": None}, "not named"),
    ],
)
def test_a_row_that_does_not_fit_says_why(measured, changes, complaint):
    assert complaint in "; ".join(table.problems_of("attention", measured(**changes)))


def test_a_missing_column_is_named(measured):
    row = measured()
    del row["seed"]
    assert table.problems_of("attention", row) == ["lacks seed"]
    assert "lacks commit" in table.problems_of("pipeline", {"benchmark": "b"})


def test_rows_are_appended_and_read_back(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "new"))
    table.append("attention", measured(run="a"))
    table.append("attention", measured(run="b"))
    with pytest.raises(ValueError, match="status"):
        table.append("attention", measured(status="great"))
    assert [row["run"] for row in table.read("attention", tmp_path / "new")] == ["a", "b"]


def test_the_report_compares_within_a_run_and_names_who_is_missing(measured, encoded):
    none = dict.fromkeys(("ms", "ms_p20", "ms_p80", "rounds", "tflops"))
    rows = [
        ("attention", measured()),
        ("attention", measured(impl="sdpa_loop", rotation="separate", ms=5.0, ms_p80=6.0)),
        ("attention", measured(impl="flex", rotation="none", status="failed", reason="OutOfMemoryError: CUDA", **none)),
        ("encoder", encoded(run="r2")),
    ]
    text = "\n".join(lines(rows))
    assert "2.50x" in text
    assert "flex, rotation none: failed: OutOfMemoryError: CUDA" in text
    assert "attention 100%" in text
    assert text.count("## ") == 2
