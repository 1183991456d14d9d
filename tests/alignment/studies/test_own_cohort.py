"""A run evaluated on what it was trained on: the model carries what its standardizer measured, so no warnings."""

import logging

import numpy as np
import pandas as pd

from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.subject import open_subject
from exaonepath.alignment.training.data import standardizer_of
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings

PATIENTS = [f"p{i:02}" for i in range(24)]


def write_counts(folder, extra=0):
    rng = np.random.default_rng(0)
    genes = [f"gene{i}" for i in range(60 + extra)]
    rates = rng.lognormal(3, 1, len(genes))
    # Many genes that hardly vary in counts per million: top_variance drops them, yet they are of the total.
    rna = rng.poisson(rates * rng.lognormal(0, 1, (len(PATIENTS), 1)) * rng.lognormal(0, 0.3, (24, len(genes))))
    pd.DataFrame(rna, PATIENTS, genes).to_csv(folder / "rna.csv")
    pd.DataFrame(rng.normal(size=(24, 10)), PATIENTS, [f"seg{i}" for i in range(10)]).to_csv(folder / "cnv.csv")
    pd.DataFrame({"patient": PATIENTS, "kind": ["a", "b"] * 12}).to_csv(folder / "labels.csv", index=False)


def settings_of(folder):
    tables = {"rna": {"path": str(folder / "rna.csv"), "scale": "counts"}, "cnv": {"path": str(folder / "cnv.csv")}}
    return build_settings(
        {
            "data": {"tables": tables, "labels": str(folder / "labels.csv"), "top_variance": {"rna": 20}},
            "model": {"projection_dim": 4, "omics": {"embed_dim": 8, "ffn_ratio": 1.0}},
            "run": {"steps": 1, "batch_size": 8, "device": "cpu", "tensorboard": False, "validate_every": 0},
        }
    )


def test_counts_of_the_runs_own_cohort_give_no_warning(tmp_path, caplog):
    write_counts(tmp_path)
    settings = settings_of(tmp_path)
    train(settings, tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="exaonepath"):
        subject = open_subject(tmp_path / "run", device="cpu")
        evaluate(subject, EvaluationSettings(labels=("kind",), missing=False, analyses=()))
    assert [r.getMessage() for r in caplog.records] == []
    found = standardizer_of(subject.model).scalings["rna"]
    assert len(found.features) == 20
    assert sorted(found.measured) == sorted(f"gene{i}" for i in range(60))
    assert found.n_patients == len(subject.parts["train"])

    # Another cohort's totals are still distinguished from its own, and the message states both.
    (tmp_path / "other").mkdir()
    write_counts(tmp_path / "other", extra=60)
    (tmp_path / "other.toml").write_text(
        "[data]\nlabels = 'other/labels.csv'\n[data.tables]\nrna = { path = 'other/rna.csv', scale = 'counts' }\n"
        "cnv = { path = 'other/cnv.csv' }\n"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="exaonepath"):
        other = open_subject(tmp_path / "run", tmp_path / "other.toml", split=tmp_path / "run" / "split.json")
        other.embed(other.held_out)
    messages = [r.getMessage() for r in caplog.records if "counts per million" in r.getMessage()]
    assert messages
    assert "all 120 columns of the table, but over 60 in training" in messages[0]
    assert "top_variance" not in messages[0]
