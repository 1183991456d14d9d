"""Errors in the header of a table are reported by the command before torch is imported."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("mudata", reason="needs the extra `train`")

from exaonepath.alignment.early_checks import check_headers, tables_of_evaluation
from exaonepath.alignment.training.settings_file import read_tables
from exaonepath.errors import ExaonePathError

HEAVY = ("torch", "transformers", "pandas", "anndata")
# The command as its script starts it, then what had been imported by the time it ended.
AS_SCRIPT = f"""
import sys
sys.argv = ["exaonepath", *sys.argv[1:]]
from exaonepath.cli.app import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.fixture
def call(tmp_path):
    """`call(arguments)`: (exit status, standard error, what heavy was imported)."""

    def run(*arguments):
        command = [sys.executable, "-c", AS_SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        return done.returncode, done.stderr, done.stdout.splitlines()[-1]

    return run


@pytest.fixture
def files(tmp_path):
    """A cohort whose labels call their ids in a way of their own."""
    (tmp_path / "rna.tsv").write_text("gene\tp1\tp2\nTP53\t1\t2\n")
    (tmp_path / "labels.csv").write_text("Kennung;age\np1;60\np2;61\n")
    (tmp_path / "slides.csv").write_text("patient,features\np1,a.h5\n")
    (tmp_path / "s.toml").write_text(
        "[data]\nlabels = 'labels.csv'\nslides = 'slides.csv'\n[data.tables]\nrna = { path = 'rna.tsv' }\n"
    )
    return tmp_path


def test_a_wrong_id_column_is_told_before_anything_heavy_is_imported(call, files):
    status, stderr, imported = call("train", files / "s.toml", "--out", files / "run")
    assert status == 1
    assert stderr.splitlines()[0] == "error: the cohort cannot be used:"
    assert "labels.csv lacks the column patient; it has 'Kennung', 'age'" in stderr
    assert "--patient-column" in stderr
    assert imported == "[]"
    assert not (files / "run").exists()


@pytest.mark.parametrize("cohort", ["folder", "settings", "run"])
def test_evaluate_looks_as_well(call, files, cohort):
    (files / "run").mkdir()
    data = {"labels": str(files / "labels.csv"), "slides": None}
    (files / "run" / "settings.json").write_text(json.dumps({"settings": {"data": data}}))
    arguments = {"folder": [files], "settings": [files / "s.toml"], "run": []}[cohort]
    status, stderr, imported = call("evaluate", files / "run", *arguments)
    assert (status, imported) == (1, "[]")
    assert "'Kennung'" in stderr


def test_every_problem_is_told_on_its_line(call, files):
    (files / "labels.csv").write_bytes("patient\tage\np1\t60\n".encode("utf-16"))
    (files / "slides.csv").write_text("patient,file\np1,a.h5\n")
    status, stderr, imported = call("train", files / "s.toml", "--set", "data.tables.cnv.path=nowhere\x1b.tsv")
    assert (status, imported) == (1, "[]")
    assert stderr.splitlines()[0] == "error: the cohort cannot be used, for 3 reasons:"
    assert "slides: " in stderr
    assert "lacks the column features" in stderr
    assert "UTF-16" in stderr
    assert "nowhere\\x1b.tsv: no such file" in stderr


def test_settings_that_cannot_be_read_are_told_as_early(call):
    status, stderr, imported = call("train", "nowhere.toml")
    assert status == 1
    assert "error: settings file nowhere.toml cannot be read" in stderr
    assert imported == "[]"


@pytest.mark.parametrize("data", [None, 3, {}, {"labels": 3}, {"tables": 3}, {"tables": {"rna": 3}}, {"id_column": 3}])
def test_settings_of_another_type_are_left_to_their_own_checks(data):
    check_headers(data)


def test_the_option_names_the_column(files):
    def refused(*overrides):
        try:
            check_headers(read_tables(files / "s.toml", overrides)["data"])
        except ExaonePathError:
            return True
        return False

    assert refused()
    assert not refused("data.id_column=Kennung")
    assert not refused("data.id_column=kennung")
    assert refused("data.id_column=Nummer")


def test_what_an_evaluation_reads(files):
    assert tables_of_evaluation(files / "nothing", None, None) is None
    assert tables_of_evaluation(files / "run", files, "Kennung")["id_column"] == "Kennung"
    assert tables_of_evaluation(files / "run", files / "s.toml", None)["labels"] == str(files / "labels.csv")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "s.toml", "--set", "run.epoch=3", "--patient-column", "Kennung"), "did you mean 'epochs'"),
        (("train", "s.toml", "--batch-size", "1", "--patient-column", "Kennung"), "no negatives"),
        (("train", "s.toml", "--set", "run.select=best", "--patient-column", "Kennung"), "run.select must be"),
        (("evaluate", "nosuch"), "nosuch: no such folder"),
        (("evaluate", "."), "holds neither a run"),
    ],
)
def test_settings_and_folders_are_checked_before_torch_is_imported(call, files, arguments, named):
    """One message each, and no wait of seconds for it."""
    status, stderr, imported = call(*arguments)
    assert status == 1
    assert named in stderr
    assert len(stderr.splitlines()) == 1
    assert "torch" not in imported
    assert "transformers" not in imported


def test_a_label_that_the_table_lacks_is_reported_early(files):
    with pytest.raises(ExaonePathError, match=r"labels\.csv has no column grade; it has Kennung, age"):
        check_headers({"labels": str(files / "labels.csv"), "id_column": "Kennung"}, ["age", "grade"])


def test_the_patient_column_counts_for_slides_that_have_it(files):
    """A table of slides with the same name for its ids, and one with a usual name."""
    data = {"slides": str(files / "slides.csv"), "labels": str(files / "labels.csv"), "id_column": "Kennung"}
    check_headers(data)
    (files / "slides.csv").write_text("Kennung,features\np1,a.h5\n")
    check_headers(data)
    with pytest.raises(ExaonePathError, match=r"slides\.csv lacks the column patient"):
        check_headers({**data, "labels": None, "id_column": None})
