"""Monitors of retrieval, each provoked by a cohort of the generator, and all silent on the default one and on noise."""

import json

import numpy as np
import pytest

from exaonepath.alignment.metrics.retrieval import PairEmbeddings
from exaonepath.alignment.training.monitors import HealthMonitors
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

MOLECULAR = {"wsi": 1.0, "rna": 0.1, "snp": 0.1, "cnv": 0.1, "methylation": 0.1}


def warned(folder, dials, **tables):
    """Kinds of warnings of a short run on a cohort without slides, which are slow to write."""
    cohort = write_synthetic_cohort(folder / "cohort", SyntheticCohortSettings(missing=MOLECULAR, **dials))
    settings = {
        "data": {"mudata": str(cohort / "cohort.h5mu"), "labels": str(cohort / "labels.csv")},
        "model": {"projection_dim": 64, "omics": {"embed_dim": 128}},
        "run": {"steps": 3, "device": "cpu", "tensorboard": False, "log_every": 10},
    }
    for name, table in tables.items():
        settings[name] = {**settings.get(name, {}), **table}
    train(build_settings(settings), folder / "run")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["check"] for row in rows if row["kind"] == "warning"}


@pytest.mark.parametrize(
    ("dials", "expected"),
    [
        ({}, set()),
        ({"noise": 5.0}, set()),
        ({"batch_effect": 2.0}, {"site"}),
        ({"dominant": "rna", "dominance": 8.0}, {"dominant_information"}),
        ({"dominant": "methylation", "dominance": 8.0}, {"dominant_information"}),
    ],
    ids=["default", "noise 5", "batch effect 2", "RNA dominates", "methylation dominates"],
)
def test_cohorts_of_the_generator(tmp_path, dials, expected):
    assert warned(tmp_path, dials) == expected


def test_an_encoder_that_memorises(tmp_path):
    """The published FFN on 150 patients with a weak signal: they are found, and hardly anybody else."""
    found = warned(
        tmp_path,
        {"patients": 240, "noise": 2.5},
        data={"modalities": ["rna", "methylation"], "validation_share": 0.3, "test_share": 0.05},
        model={"preset": "published", "projection_dim": 64, "omics": {"embed_dim": 128, "dropout": 0.0}},
        optimizer={"lr": 5e-3},
        run={"steps": 60, "validate_every": 10},
    )
    assert "memorising" in found


def pairs_of(n, quality, seed):
    """Pairs of three modalities in which a row is more or less that of the patient."""
    rng = np.random.default_rng(seed)
    ids = np.arange(n)
    z = rng.normal(size=(n, 8))
    sides = {name: quality * z + rng.normal(size=(n, 8)) for name in ("rna", "snp", "cnv")}
    return [
        PairEmbeddings(a, b, sides[a], sides[b], ids, ids) for a, b in (("rna", "snp"), ("rna", "cnv"), ("snp", "cnv"))
    ]


def observe(monitors, step, held_out, training=()):
    present = dict.fromkeys(range(120), ("rna", "snp", "cnv"))
    return {w.check for w in monitors.observe_retrieval(step, held_out, present, training=training)}


def test_retrieval_at_chance_is_reported_after_a_while():
    monitors = HealthMonitors()
    assert observe(monitors, 10, pairs_of(120, 0.0, 0)) == set()  # the first validations may be too early
    assert observe(monitors, 20, pairs_of(120, 0.0, 1)) == set()
    assert observe(monitors, 30, pairs_of(120, 0.0, 2)) == {"at_chance"}
    healthy = HealthMonitors()
    for step in range(1, 6):
        assert observe(healthy, step, pairs_of(120, 1.0, step)) == set()


def test_memorising_is_measured_against_a_start_in_closed_form():
    """The same recalls: a fault of a training that began at random or lost the start's, none of a weak signal."""
    weak, strong, known = pairs_of(120, 0.4, 0), pairs_of(120, 1.5, 1), pairs_of(120, 4.0, 2)
    at_random, lost, kept = HealthMonitors(), HealthMonitors(), HealthMonitors()
    observe(lost, 0, strong)
    observe(kept, 0, weak)
    for monitors in (at_random, lost, kept):
        assert observe(monitors, 1, weak, known) == set()
    assert observe(at_random, 2, weak, known) == set()
    assert observe(at_random, 3, weak, known) == {"memorising"}
    assert observe(lost, 2, weak, known) == {"memorising"}  # its third validation, with that of the start
    assert observe(kept, 2, weak, known) == set()
    resumed = HealthMonitors()
    resumed.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    assert observe(resumed, 4, weak, known) == set()
