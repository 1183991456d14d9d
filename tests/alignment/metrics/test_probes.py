"""Probes find what is planted, score chance where nothing is, and never let a patient cross from fit to test."""

import math

import numpy as np
import pytest

from exaonepath.alignment.metrics.intervals import across_runs, bootstrap, bootstrap_mean, bootstrap_weighted
from exaonepath.alignment.metrics.probes import fit_probe, knn_probe, linear_probe, ridge_probe, weighted_auc
from exaonepath.errors import SettingsError

PROBES = [linear_probe, knn_probe]


def planted(seed=0, n=120, classes=3, strength=2.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return rng.normal(size=(n, 10)) + strength * np.eye(10)[y], [f"type {c}" for c in y]


@pytest.mark.parametrize("probe", PROBES)
def test_finds_a_planted_label(probe):
    x, y = planted(strength=4.0)
    score = probe(x, y)
    assert score.chance == pytest.approx(1 / 3)
    assert score.classes == ("type 0", "type 1", "type 2")
    assert score.balanced_accuracy.low > 0.85
    assert score.balanced_accuracy.low <= score.balanced_accuracy.value <= score.balanced_accuracy.high
    assert score.auroc.value > 0.95


@pytest.mark.parametrize("probe", PROBES)
def test_chance_without_a_signal(probe):
    rng = np.random.default_rng(3)
    score = probe(rng.normal(size=(120, 10)), rng.integers(0, 2, 120))
    # 120 fair coins: standard error 0.046; three of them.
    assert score.balanced_accuracy.value == pytest.approx(0.5, abs=0.14)
    assert score.auroc.low < 0.5 < score.auroc.high


@pytest.mark.parametrize("probe", PROBES)
def test_a_patient_never_crosses(probe):
    """Five equal rows per patient with labels of no meaning: a probe that saw a patient's other rows would be right."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 60)), 5, axis=0)
    y = np.repeat(rng.integers(0, 2, 40), 5)
    patients = np.repeat(np.arange(40), 5)
    assert probe(x, y).balanced_accuracy.value > 0.9  # rows as patients: the leak that the groups prevent
    # 40 coins: standard error 0.08; three of them.
    assert probe(x, y, patients).balanced_accuracy.value < 0.74


def test_seeded_and_missing_labels_left_out():
    x, y = planted()
    labels = [None if i % 5 == 0 else label for i, label in enumerate(y)]
    first = linear_probe(x, labels, seed=1)
    assert first.n == 96
    assert linear_probe(x, labels, seed=1) == first
    assert linear_probe(np.concatenate([x, x[:1]]), [*labels, math.nan], seed=1).n == 96


def test_scale_of_a_feature_does_not_matter():
    x, y = planted()
    assert linear_probe(x * np.logspace(-3, 3, 10) + 5, y) == linear_probe(x, y)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("labels", [["a"] * 6, ["a"] * 5 + ["b"]])
def test_too_few_to_probe(probe, labels):
    with pytest.raises(SettingsError, match="two patients each"):
        probe(np.eye(6), labels)


def test_ridge():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 8))
    y = x @ rng.normal(size=8) + 0.1 * rng.normal(size=150)
    score = ridge_probe(x, np.where(np.arange(150) < 10, np.nan, y))
    assert score.n == 140
    assert score.r2.low > 0.95
    assert score.spearman.value > 0.95
    assert ridge_probe(x, rng.normal(size=150)).r2.value < 0.1
    with pytest.raises(SettingsError, match="varies"):
        ridge_probe(x, np.ones(150))


def test_bootstrap_of_a_mean_is_its_standard_error():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    fast = bootstrap_mean(values, range(400))
    slow = bootstrap(lambda rows: float(values[rows].mean()), range(400))
    width = 2 * 1.96 * values.std() / 20
    # The width itself has a relative error of about 1 / sqrt(2 * 1000 * tail share) from 1000 draws: a tenth is three.
    assert fast.high - fast.low == pytest.approx(width, rel=0.1)
    assert slow.high - slow.low == pytest.approx(width, rel=0.1)
    assert fast.value == slow.value == pytest.approx(values.mean())


def test_bootstrap_keeps_strata_and_undefined_statistics_have_no_interval():
    labels = np.array([0] * 30 + [1])
    always = bootstrap(lambda rows: float(len(np.unique(labels[rows])) == 2), range(31), strata=labels)
    assert (always.low, always.high) == (1, 1)
    nothing = bootstrap(lambda rows: math.nan, range(5))
    assert math.isnan(nothing.low)
    assert nothing.as_dict() == {"value": None, "low": None, "high": None, "n": 5}


def test_across_runs():
    # Student's t for 2 degrees of freedom is 4.302653; the standard error of 1, 2, 3 is 1 / sqrt(3).
    estimate = across_runs([1.0, 2.0, 3.0])
    assert estimate.value == 2
    assert estimate.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(across_runs([1.0]).low)


def test_a_probe_fitted_once_is_scored_on_others():
    x, y = planted(strength=4.0)
    probe = fit_probe(x[:80], y[:80])
    score = probe.score(x[80:], y[80:])
    assert score.n == 40
    assert score.balanced_accuracy.value > 0.85
    with pytest.raises(SettingsError, match="type 9"):
        probe.score(x[:1], ["type 9"])


def test_weighted_auc_counts_pairs():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.4
    weights = rng.integers(0, 3, (4, 30)).astype(float)
    for w, found in zip(weights, weighted_auc(score, positive, weights), strict=True):
        pairs = [
            (w[i] * w[j], (score[i] > score[j]) + 0.5 * (score[i] == score[j]))
            for i in np.flatnonzero(positive)
            for j in np.flatnonzero(~positive)
        ]
        assert found == pytest.approx(sum(a * b for a, b in pairs) / sum(a for a, _ in pairs))
    assert np.isnan(weighted_auc(score, np.zeros(30, bool), weights)).all()


def test_weighted_and_plain_bootstrap_agree():
    rng = np.random.default_rng(0)
    values, patients, strata = rng.normal(size=200), np.arange(200) // 2, np.arange(200) // 2 % 3
    plain = bootstrap(lambda rows: float(values[rows].mean()), patients, strata=strata, resamples=4000)
    fast = bootstrap_weighted(lambda w: w @ values / w.sum(1), patients, strata=strata, resamples=4000)
    assert fast.value == pytest.approx(plain.value)
    assert fast.n == plain.n == 100
    # Limits from 4000 draws have a standard error of about 0.04 of the standard error 0.07; three of them, twice.
    assert (fast.low, fast.high) == pytest.approx((plain.low, plain.high), abs=0.012)


@pytest.mark.parametrize("probe", PROBES)
def test_missing_labels_of_every_kind_are_left_out(probe):
    pandas = pytest.importorskip("pandas")
    x, y = planted(n=60)
    missing = [None, math.nan, pandas.NA, pandas.NaT, np.nan]
    assert probe(x, [*missing, *y[5:]]).n == 55
    assert probe(x, pandas.Series([pandas.NA, *y[1:]], dtype="string")).n == 59
    codes = pandas.Series([pandas.NA, *(int(name[-1]) for name in y[1:])], dtype="Int64")
    assert probe(x, codes).classes == ("0", "1", "2")
    assert ridge_probe(x, codes).n == 59


@pytest.mark.parametrize("probe", PROBES)
def test_a_class_of_one_patient_does_not_take_the_probe_away(probe, caplog):
    x, y = planted(strength=4.0, n=60)
    patients = [f"P{i // 2}" for i in range(60)]
    y = [y[i - i % 2] for i in range(60)]
    y[6] = y[7] = "rare"  # two rows, one patient
    score = probe(x, y, patients)
    assert score.classes == ("type 0", "type 1", "type 2")
    assert score.n == 58
    (record,) = caplog.records
    assert "'rare' (patient P3)" in record.getMessage()
    assert probe(x, ["lone" if i == 9 else label for i, label in enumerate(y)]).n == 59
    assert "'lone' (row 9)" in caplog.text
    y[20] = y[21] = y[7]  # now two patients: a class, in two folds
    assert (score.folds, probe(x, y, patients).folds) == (5, 2)
    assert probe(x, y, patients).as_dict()["folds"] == 2


def test_a_fitted_probe_leaves_out_the_classes_it_left_out():
    x, y = planted(strength=4.0)
    probe = fit_probe(x[:80], ["lone", *y[1:80]])
    assert probe.left_out == ("lone",)
    score = probe.score(x[80:], [*y[80:119], "lone"])
    assert (score.n, score.folds) == (39, None)
    with pytest.raises(SettingsError, match="type 9"):
        probe.score(x[:1], ["type 9"])
