"""Whole evaluations: every figure and number is there, follows from the embeddings, and says what it was made from."""

import json

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from exaonepath.cli import app
from exaonepath.errors import SettingsError
from exaonepath.evaluation.retrieval import retrieval
from exaonepath.experiments.evaluate import EvaluationSettings, evaluate
from exaonepath.experiments.report import draw_attention_of, table
from exaonepath.experiments.subject import open_subject

NAMES = ("wsi", "rna", "snp", "cnv", "methylation")


@pytest.fixture(scope="module")
def subject(run):
    return open_subject(run, device="cpu")


@pytest.fixture(scope="module")
def report(subject):
    return evaluate(subject, EvaluationSettings(labels=("subtype",), targets=("rna",)))


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
    assert "## subtype: all modalities beside each alone" in table(report | {"provenance": {"split_known": True}})
    assert len(report["missing"]["probes"]["subtype"]["refitted"]["subsets"]) == 31
    assert len(report["missing"]["retrieval"]["rna"]["subsets"]) == 15
    assert len(report["projections"]["pairs"]) == 10
    assert set(report["projections"]["reuse"]) == set(NAMES)
    assert report["parts"]["train"]["geometry"]["wsi"]["effective_rank"] > 1
    json.dumps(report, allow_nan=False)


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
        "--export",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} == {
        "evaluation.json", "evaluation.md", "retrieval-train.png", "retrieval-val.png", "retrieval-test.png",
        "projections.png", "attention.png", "embeddings",
    }  # fmt: skip
    stored = json.loads((out / "evaluation.json").read_text())
    assert len(stored["provenance"]["settings_hash"]) == len(stored["provenance"]["cohort_hash"]) == 64
    assert (out / "evaluation.md").read_text() == table(stored)
    assert "| wsi to rna |" in done.output
    with h5py.File(next((out / "embeddings" / "fused").iterdir())) as file:
        assert file["features"].shape == (1, 80)
    assert {p.name for p in (out / "embeddings").iterdir()} == {*NAMES, "fused"}


def test_another_cohort_is_all_held_out(run, cohort_folder, tmp_path):
    subject = open_subject(run, cohort_folder, device="cpu")
    assert set(subject.parts) == {"test"}
    assert not subject.seen
    with pytest.raises(SettingsError, match=r"holds none of cohort\.h5mu"):
        open_subject(run, tmp_path, device="cpu")
    with pytest.raises(SettingsError, match="name the cohort"):
        open_subject(run / "model", device="cpu")


def test_an_unknown_label_is_named(run):
    done = CliRunner().invoke(app, ["evaluate", str(run), "--label", "grade", "--device", "cpu"])
    assert done.exit_code == 1
    assert "grade" in done.output
    assert "subtype" in done.output
