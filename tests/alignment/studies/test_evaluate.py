"""Whole evaluations: every figure and number is there, follows from the embeddings, and says what it was made from."""

import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.metrics.retrieval import retrieval
from exaonepath.alignment.probing import read_follow_up
from exaonepath.alignment.report import draw_attention_of, table
from exaonepath.alignment.subject import open_subject
from exaonepath.cli.app import app
from exaonepath.errors import SettingsError
from exaonepath.synthetic.cohort import write_synthetic_cohort

NAMES = ("wsi", "rna", "snp", "cnv", "methylation")


@pytest.fixture(scope="module")
def subject(run):
    return open_subject(run, device="cpu")


@pytest.fixture(scope="module")
def report(subject):
    return evaluate(subject, EvaluationSettings(labels=("subtype",), targets=("rna",), analyses=()))


def test_parts_are_the_runs_own(subject, run):
    split = json.loads((run / "split.json").read_text())["parts"]
    assert {name: list(ids) for name, ids in subject.parts.items()} == split
    assert subject.held_out == tuple(sorted(split["val"] + split["test"]))
    assert subject.seen


def test_retrieval_is_that_of_the_embeddings(subject, report):
    embedded = subject.embed(subject.parts["test"])
    there_w, there_r = embedded.available["wsi"], embedded.available["rna"]
    u, v = subject.shared_spaces(embedded)["wsi", "rna"]
    patients = np.asarray(embedded.patients)
    expected = retrieval(u[there_w], v[there_r], patients[there_w], patients[there_r])
    assert report["parts"]["test"]["retrieval"]["wsi->rna"] == expected.as_dict()
    assert len(report["parts"]["test"]["retrieval"]) == 20


def test_every_measure_is_there(report):
    assert set(report["probes"]["subtype"]) == set(report["survival"]) == {*NAMES, "fused"}
    assert report["probes"]["subtype"]["fused"]["linear"]["chance"] == 0.5
    assert set(report["missing"]["probes"]["subtype"]) == {"refitted", "deployed", "gain_over_single"}
    assert set(report["missing"]["probes"]["subtype"]["gain_over_single"]) == set(NAMES)
    assert "## subtype: all modalities compared with each alone" in table(
        report | {"provenance": {"split_known": True}}
    )
    assert len(report["missing"]["probes"]["subtype"]["refitted"]["subsets"]) == 31
    assert len(report["missing"]["retrieval"]["rna"]["subsets"]) == 15
    assert len(report["projections"]["pairs"]) == 10
    assert set(report["projections"]["reuse"]) == set(NAMES)
    assert report["parts"]["train"]["geometry"]["wsi"]["effective_rank"] > 1
    json.dumps(report, allow_nan=False)


def test_every_number_is_compared_with_baselines(report, subject):
    """Each direction of the test patients, each label and survival: a value, and a paired difference to ours."""
    directions = set(report["parts"]["test"]["retrieval"])
    for method in ("CCA", "ridge", "PLS"):
        assert set(report["baselines"]["retrieval"][method]) == directions
    ours = report["parts"]["test"]["retrieval"]["rna->cnv"]["recall"]["1"]["value"]
    theirs = report["baselines"]["retrieval"]["CCA"]["rna->cnv"]
    assert theirs["difference"]["1"]["value"] == pytest.approx(ours - theirs["recall"]["1"]["value"])
    labels = report["baselines"]["probes"]["subtype"]
    assert {found["compared_with"] for found in labels.values()} == {*NAMES, "fused"}
    assert {"mean patch features + logistic regression", "attention MIL (ABMIL)"} <= set(labels)
    for found in labels.values():
        probe = report["probes"]["subtype"][found["compared_with"]]["linear"]
        gain = found["difference"]["balanced_accuracy"]
        assert gain["value"] == pytest.approx(probe["balanced_accuracy"]["value"] - found["balanced_accuracy"]["value"])
    assert report["baselines"]["survival"]["PCA + Cox (all)"]["difference"]["low"] is not None
    assert report["probe_patients"] == "test"
    assert report["probes"]["subtype"]["fused"]["linear"]["n"] == len(subject.parts["test"])
    text = table(report | {"provenance": {"split_known": True}})
    assert "Retrieval of test patients compared with baselines" in text
    assert "| attention MIL (ABMIL) |" in text


def test_site_is_told(report, subject):
    """The generator's centres are in the column `batch`: retrieval within a centre, and a probe of it."""
    found = report["site"]["retrieval"]
    assert found["sites"] == 3
    assert not found["suspicious"]
    assert set(report["site"]["probes"]) == {*NAMES, "fused"}
    assert report["site"]["probes"]["fused"]["chance"] == pytest.approx(1 / 3)
    text = table(report | {"provenance": {"split_known": True}})
    assert "## Site (3 sites of the patients asked for)" in text
    settings = EvaluationSettings(
        labels=("subtype",), targets=("rna",), missing=False, baselines=False, site="ward", analyses=()
    )
    with pytest.raises(SettingsError, match="no column 'ward'"):
        evaluate(subject, settings)


def test_training_is_seen(report):
    """Twenty steps are enough for patients that were trained on to be found more often than by chance."""
    found = report["parts"]["train"]["retrieval"]["rna->methylation"]
    assert found["recall"]["1"]["low"] > found["chance"]["1"]


def test_fused_of_a_subset_leaves_the_others_out(subject):
    embedded = subject.embed(subject.held_out[:5])
    np.testing.assert_allclose(subject.fuse(embedded, NAMES), embedded.fused, atol=1e-6)
    alone = subject.fuse(embedded, ("rna",))
    pairs = [i for i, pair in enumerate(subject.model.trained_pairs) if "rna" in pair]
    used = np.abs(alone.reshape(5, 10, 8)).sum(-1) > 0
    assert (used[embedded.available["rna"]] == np.isin(np.arange(10), pairs)).all()


def test_attention_crosses_fragments_in_no_rope_block(subject, tmp_path):
    maps = draw_attention_of(subject, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes()[:4] == b"\x89PNG"
    patient = subject.held_out[0]
    _, batch = next(subject.data.evaluation_batches([patient], [0], 1))
    crossing = {found.block: found.crossing(batch.slides.contour_index) for found in maps}
    assert (crossing[1] == 0).all()
    assert (crossing[0] > 0.1).all()


def test_command_writes_everything_and_patho_bench_reads_it(run, tmp_path):
    out = tmp_path / "evaluation"
    command = [
        "evaluate",
        str(run),
        "-o",
        str(out),
        "--label",
        "subtype",
        "--no-missing",
        "--analyses",
        "few-shot,calibration",
        "--export",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} == {
        "evaluation.json", "evaluation.md", "retrieval-train.png", "retrieval-val.png", "retrieval-test.png",
        "projections.png", "attention.png", "embeddings", "few-shot.png", "calibration.png",
    }  # fmt: skip
    stored = json.loads((out / "evaluation.json").read_text())
    assert len(stored["provenance"]["settings_hash"]) == len(stored["provenance"]["cohort_hash"]) == 64
    assert (out / "evaluation.md").read_text() == table(stored)
    assert "| wsi to rna |" in done.output
    with h5py.File(next((out / "embeddings" / "fused").iterdir())) as file:
        assert file["features"].shape == (1, 80)
    assert {p.name for p in (out / "embeddings").iterdir()} == {*NAMES, "fused"}


def test_another_cohort_is_all_held_out(run, cohort_dials, tmp_path, caplog):
    other = write_synthetic_cohort(tmp_path / "other", replace(cohort_dials, patients=20, seed=5))
    for name in ("labels.csv", "slides.csv"):
        (other / name).write_text((other / name).read_text().replace("\nP000", "\nQ000"))
    import mudata

    with mudata.set_options(pull_on_update=False):
        found = mudata.read_h5mu(other / "cohort.h5mu")
        for table_ in found.mod.values():
            table_.obs_names = [f"Q{name[1:]}" for name in table_.obs_names]
        mudata.write_h5mu(other / "cohort.h5mu", mudata.MuData(dict(found.mod)))
    for model in (run, run / "model"):
        subject = open_subject(model, other, device="cpu")
        assert set(subject.parts) == {"test"}
        assert not subject.seen
        assert len(subject.held_out) == 20
    assert not [record for record in caplog.records if "trained" in record.message]


def test_who_trained_the_model_is_not_held_out(run, cohort_folder, tmp_path, caplog):
    """The cohort named by hand is the one that the run was trained on, in part."""
    trained = set(json.loads((run / "split.json").read_text())["parts"]["train"])
    subject = open_subject(run, cohort_folder, device="cpu")
    assert set(subject.parts["train"]) == trained
    assert not trained & set(subject.held_out)
    assert f"{len(trained)} of the cohort's patients were used for training" in caplog.text
    # A model alone does not know who trained it, but knows its cohort.
    caplog.clear()
    assert not open_subject(run / "model", cohort_folder, device="cpu").seen
    assert "trained on this cohort" in caplog.text
    (tmp_path / "split.json").write_text(json.dumps({"parts": {"test": ["nobody"]}}))
    with pytest.raises(SettingsError, match="nobody; none of them is in the cohort"):
        open_subject(run, cohort_folder, split=tmp_path / "split.json", device="cpu")


def test_a_cohort_that_changed_under_its_run_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    stored = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps({**stored, "cohort_hash": "0" * 64}))
    with pytest.raises(SettingsError, match="the cohort has changed"):
        open_subject(copy, device="cpu")


def with_labels(subject, **columns):
    """The subject with other columns added to its own, by patient."""
    new = {name: pd.Series(values, subject.cohort.patients) for name, values in columns.items()}
    labels = subject.cohort.labels.assign(**new)
    data = replace(subject.data, cohort=replace(subject.cohort, labels=labels))
    return replace(subject, data=data)


def test_words_of_survival_are_read_and_others_refused(subject):
    patients = subject.cohort.patients
    flags = subject.cohort.labels["event"].reindex(patients).to_numpy()
    settings = EvaluationSettings(
        labels=("subtype",), targets=("rna",), missing=False, baselines=False, probes="held-out", analyses=()
    )
    plain = read_follow_up(subject, patients, "time", "event")
    assert plain.known.all()
    for yes, no in (("DECEASED", "LIVING"), (True, False), ("1:DECEASED", "0:LIVING")):
        words = with_labels(subject, event=[yes if flag else no for flag in flags])
        found = read_follow_up(words, patients, "time", "event")
        for name in ("time", "event", "known"):
            np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    # Who is unknown is left out, and not taken for alive.
    some_unknown = with_labels(subject, event=[None if i % 3 == 0 else flag for i, flag in enumerate(flags)])
    held = [i for i, p in enumerate(patients) if p in set(subject.held_out)]
    found = evaluate(some_unknown, settings)["survival"]["fused"]
    assert found["n"] == sum(i % 3 > 0 for i in held) < len(held)
    with pytest.raises(SettingsError, match=r"must state whether the event was observed.*got maybe"):
        evaluate(with_labels(subject, event=["maybe"] * len(patients)), settings)
    with pytest.raises(SettingsError, match="must hold times, got long"):
        evaluate(with_labels(subject, time=["long"] * len(patients)), settings)


def test_labels_that_may_be_missing_as_pandas_writes_it(subject):
    patients = subject.cohort.patients
    smoker = pd.array([None if i % 5 == 0 else bool(i % 2) for i in range(len(patients))], dtype="boolean")
    report = evaluate(
        with_labels(subject, smoker=smoker),
        EvaluationSettings(
            labels=("smoker",), targets=("rna",), missing=True, baselines=False, probes="held-out", analyses=()
        ),
    )
    assert report["probes"]["smoker"]["fused"]["linear"]["n"] < len(subject.held_out)


def test_somewhere_to_evaluate_on_is_needed(run, tmp_path):
    with pytest.raises(SettingsError, match=r"has none of cohort\.h5mu"):
        open_subject(run, tmp_path, device="cpu")
    with pytest.raises(SettingsError, match="name the cohort"):
        open_subject(run / "model", device="cpu")


def test_an_unknown_label_is_named(run):
    done = CliRunner().invoke(app, ["evaluate", str(run), "--label", "grade", "--device", "cpu"])
    assert done.exit_code == 1
    assert "grade" in done.output
    assert "subtype" in done.output
