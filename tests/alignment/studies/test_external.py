"""An external cohort: the same patients under other ids give the same numbers, and what it lacks is reported."""

import csv
from dataclasses import replace

import mudata
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from exaonepath.alignment.analyses.external import open_external
from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.report_table import table
from exaonepath.alignment.subject import open_subject
from exaonepath.cli.app import app
from exaonepath.errors import ExaonePathError, SettingsError


@pytest.fixture(scope="module")
def subject(run):
    return open_subject(run, device="cpu")


def write_cohort(out, source, patients, *, rename, drop_genes=0, labels=None):
    """Patients of a cohort's folder, with ids `rename(patient)`, without the first genes of RNA."""
    out.mkdir()
    with mudata.set_options(pull_on_update=False):
        found = mudata.read_h5mu(source / "cohort.h5mu")
        tables = {}
        for name, part in found.mod.items():
            part = part[[p for p in part.obs_names if p in patients], drop_genes if name == "rna" else 0 :].copy() if (
                name == "rna"
            ) else part[[p for p in part.obs_names if p in patients]].copy()  # fmt: skip
            part.obs_names = [rename(p) for p in part.obs_names]
            tables[name] = part
        mudata.write_h5mu(out / "cohort.h5mu", mudata.MuData(tables))
    with (source / "slides.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["patient"] in patients]
    with (out / "slides.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "slide", "features"])
        writer.writerows([rename(r["patient"]), r["slide"], str(source / r["features"])] for r in rows)
    known = pd.read_csv(source / "labels.csv")
    known = known[known["patient"].isin(patients)]
    known["patient"] = [rename(p) for p in known["patient"]]
    (known if labels is None else known[labels]).to_csv(out / "labels.csv", index=False)
    return out


@pytest.fixture(scope="module")
def twin(subject, cohort_folder, tmp_path_factory):
    """The test patients under other ids."""
    out = tmp_path_factory.mktemp("external") / "twin"
    return write_cohort(out, cohort_folder, set(subject.data.split["test"]), rename=lambda p: f"X{p}")


@pytest.fixture(scope="module")
def report(subject, twin):
    settings = EvaluationSettings(labels=("subtype",), missing=False, analyses=(), external=str(twin))
    return evaluate(subject, settings)


def test_the_same_patients_have_the_same_numbers(report):
    """Internal and external test patients are the same, so model, probes and baselines score the same."""
    found = report["external"]
    assert found["patients"] == report["parts"]["test"]["patients"]
    assert found["left_out"] == 0
    assert found["not_evaluated"] == []
    for name, score in report["parts"]["test"]["retrieval"].items():
        assert found["retrieval"][name]["recall"]["1"]["value"] == pytest.approx(score["recall"]["1"]["value"])
    for name, score in report["probes"]["subtype"].items():
        outside = found["probes"]["subtype"][name]["linear"]
        assert outside["balanced_accuracy"]["value"] == score["linear"]["balanced_accuracy"]["value"]
    assert set(found["baselines"]["probes"]["subtype"]) == set(report["baselines"]["probes"]["subtype"])
    for method, score in report["baselines"]["probes"]["subtype"].items():
        outside = found["baselines"]["probes"]["subtype"][method]
        assert outside["auroc"]["value"] == pytest.approx(score["auroc"]["value"], abs=1e-6), method
    inside = report["baselines"]["retrieval"]["CCA"]["wsi->rna"]["recall"]["1"]["value"]
    assert found["baselines"]["retrieval"]["CCA"]["wsi->rna"]["recall"]["1"]["value"] == pytest.approx(inside)
    assert found["survival"]["fused"]["c_index"]["value"] == pytest.approx(
        report["survival"]["fused"]["c_index"]["value"]
    )
    assert set(found["baselines"]["survival"]) == set(report["baselines"]["survival"])


def test_one_table_has_both(report):
    text = table(report | {"provenance": {"split_known": True}})
    assert f"## External cohort ({report['external']['patients']} patients)" in text
    assert "| recall@1 | internal: ours | CCA | chance | external: ours | CCA | chance |" in text
    assert "| fused: ours |" in text
    assert "- rna: all 30 features are available." in text
    line = next(line for line in text.split("## External")[1].splitlines() if line.startswith("| attention MIL"))
    assert line.count("(") == 3  # of the name, and two differences


def test_lacking_features_labels_and_follow_up_are_said(subject, cohort_folder, tmp_path, run):
    test = set(subject.data.split["test"])
    other = write_cohort(
        tmp_path / "other", cohort_folder, test, rename=lambda p: f"X{p}", drop_genes=7, labels=["patient", "spatial"]
    )
    settings = EvaluationSettings(
        labels=("subtype", "spatial"), missing=False, analyses=(), baselines=False, external=str(other)
    )
    report = evaluate(subject, settings)
    found = report["external"]
    assert found["features"]["rna"]["missing"] == 7
    assert len(found["features"]["rna"]["examples"]) == 5
    assert found["features"]["cnv"] == {"of": 15, "missing": 0, "examples": [], "totals": None}
    assert "over all 23 columns of the table, but over 30 in training" in found["features"]["rna"]["totals"]
    assert set(found["probes"]) == {"spatial"}
    assert "subtype: not evaluated because the external cohort has no such column" in found["not_evaluated"]
    assert any(n.startswith("survival: not evaluated because the external cohort has no") for n in
               found["not_evaluated"])  # fmt: skip
    text = table(report | {"provenance": {"split_known": True}})
    assert "- rna: 7 of 30 features are missing, and count as the training mean." in text
    assert "- rna: **counts per million are computed over all 23 columns" in text
    assert "- subtype: not evaluated because the external cohort has no such column." in text
    # Missing genes are the training mean, which is 0 after the standardisation.
    external, _ = open_external(subject, other)
    rows = external.data.standardized_rows("rna").rows([0])
    assert (np.count_nonzero(rows == 0, axis=1) >= 7).all()


def test_patients_of_the_own_cohort_are_left_out(subject, cohort_folder, tmp_path, caplog):
    ids = [*subject.data.split["train"][:5], *subject.data.split["test"][:10]]
    own = set(subject.data.split["train"][:5])
    mixed = write_cohort(tmp_path / "mixed", cohort_folder, set(ids), rename=lambda p: p if p in own else f"X{p}")
    external, shared = open_external(subject, mixed)
    assert set(shared) == own
    assert all(p.startswith("X") for p in external.data.split["test"])
    assert "5 patients" in caplog.text
    with pytest.raises(SettingsError, match="all its patients are patients of the cohort of the run"):
        open_external(subject, cohort_folder)


def test_classes_that_the_training_patients_lack_are_said(subject, twin, tmp_path, cohort_folder):
    other = write_cohort(tmp_path / "other", cohort_folder, set(subject.data.split["test"]), rename=lambda p: f"X{p}")
    labels = pd.read_csv(other / "labels.csv")
    labels.loc[:3, "subtype"] = "unheard"
    labels.to_csv(other / "labels.csv", index=False)
    report = evaluate(
        subject,
        EvaluationSettings(labels=("subtype",), missing=False, analyses=(), baselines=False, external=str(other)),
    )
    note = "subtype of 4 external patients: not evaluated because fewer than two training patients are unheard"
    assert note in report["external"]["not_evaluated"]
    n = report["external"]["probes"]["subtype"]["fused"]["linear"]["n"]
    assert n == report["external"]["patients"] - 4


def test_a_run_without_training_patients_says_so(subject, twin):
    split = replace(subject.data.split, parts={"train": (), "val": (), "test": subject.data.split["test"]})
    alone = replace(subject, data=replace(subject.data, split=split))
    settings = EvaluationSettings(labels=("subtype",), missing=False, analyses=(), external=str(twin))
    found = evaluate(alone, settings)["external"]
    assert found["retrieval"]
    assert found["probes"] == {}
    assert "labels, survival and baselines: not evaluated because" in found["not_evaluated"][0]


def test_a_wrong_path_is_an_error_before_any_computation(run, subject, tmp_path):
    done = CliRunner().invoke(app, ["evaluate", str(run), "--external", str(tmp_path / "nowhere"), "--device", "cpu"])
    assert done.exit_code == 1
    assert "nowhere" in done.output
    with pytest.raises(ExaonePathError, match=r"has none of cohort\.h5mu"):
        evaluate(subject, EvaluationSettings(labels=("subtype",), external=str(tmp_path)))


def test_an_unknown_analysis_is_named(run):
    done = CliRunner().invoke(app, ["evaluate", str(run), "--analyses", "genes", "--device", "cpu"])
    assert done.exit_code == 1
    assert "unknown analyses genes" in done.output
