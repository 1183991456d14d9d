"""Calibration: probabilities that are right, that are too sure, and that are constant."""

import numpy as np
import pytest

from exaonepath.alignment.metrics.calibration import brier_difference, brier_of, calibration, with_shares
from exaonepath.errors import SettingsError

HALF = np.array([0.5, 0.5])


def drawn(n, seed=0, classes=2):
    """Probabilities [n, K], and classes drawn from them."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n)
    return p, (rng.random((n, 1)) > np.cumsum(p, 1)[:, :-1]).sum(1)


def test_perfect_probabilities_have_no_more_error_than_expected():
    rejected = 0
    for seed in range(30):
        p, y = drawn(150, seed, 3)
        found = calibration(y, p, np.ones(3) / 3, seed=seed)
        rejected += found.p < 0.05
        assert 0 < found.error_if_perfect < 0.2
    assert rejected <= 5


def test_probabilities_that_are_too_sure_are_found():
    p, y = drawn(400)
    sure = np.square(np.square(p))
    found = calibration(y, sure / sure.sum(1, keepdims=True), HALF)
    assert found.p < 0.01
    assert found.error.low > found.error_if_perfect
    assert found.brier.value > calibration(y, p, HALF).brier.value


def test_a_constant_probability_is_one_bin():
    """The order of equal probabilities has no meaning: their error is the distance of one share, whatever the rows."""
    y = np.array([1] * 30 + [0] * 70)
    right = calibration(y, np.tile([0.7, 0.3], (100, 1)), np.array([0.7, 0.3]))
    assert right.error.value == pytest.approx(0, abs=1e-12)
    assert len(right.curve) == 1
    assert right.curve[0]["hits"] == pytest.approx(0.7)
    assert right.brier.value == pytest.approx(right.brier_of_shares)
    wrong = calibration(y, np.tile([0.1, 0.9], (100, 1)), HALF)
    assert wrong.error.value == pytest.approx(0.6)
    assert wrong.p < 0.01
    assert wrong.error.low <= 0.6 <= wrong.error.high


def test_certain_and_right_has_an_interval():
    y = np.arange(20) % 2
    found = calibration(y, np.eye(2)[y], HALF)
    assert found.error.value == found.brier.value == 0
    assert found.error.high > 0.1


def test_differences_where_nobody_is_wrong_claim_no_certainty():
    y = np.arange(30) % 2
    sure = np.where(np.eye(2)[y] > 0, 0.999, 0.001)
    found = brier_difference(y, sure, np.where(sure > 0.5, 0.99, 0.01))
    assert found.low < -0.1 < found.value < 0.1 < found.high
    assert calibration(y, sure, HALF).error.high > 0.1


def test_bins_hold_all_patients_and_few_patients_make_few_bins():
    p, y = drawn(93)
    found = calibration(y, p, HALF)
    assert sum(bin_["patients"] for bin_ in found.curve) == 93
    assert len(found.curve) == 6
    assert len(calibration(y[:11], p[:11], HALF).curve) == 1
    for bin_ in found.curve:
        assert bin_["low"] <= bin_["hits"] <= bin_["high"]


def test_the_interval_covers_the_error_of_many_patients():
    p, y = drawn(10000)
    sure = np.square(p) / np.square(p).sum(1, keepdims=True)
    truth = calibration(y[:4000], sure[:4000], HALF).error.value
    covered = 0
    for at in range(30):
        rows = slice(4000 + 200 * at, 4200 + 200 * at)
        error = calibration(y[rows], sure[rows], HALF, seed=at).error
        covered += error.low <= truth <= error.high
    assert covered >= 24


def test_brier_and_shares():
    p = np.array([[0.75, 0.25], [0.0, 1.0]])
    np.testing.assert_allclose(brier_of(np.array([0, 0]), p), [0.125, 2])
    np.testing.assert_allclose(with_shares(p, np.array([0.9, 0.1])), [[27 / 28, 1 / 28], [0, 1]])


def test_bad_input():
    with pytest.raises(SettingsError, match="sum to 1"):
        calibration(np.zeros(2, int), np.ones((2, 2)), HALF)
    with pytest.raises(SettingsError, match="one row per sample"):
        calibration(np.zeros(3, int), np.ones((2, 2)) / 2, HALF)
    with pytest.raises(SettingsError, match="needs patients"):
        calibration(np.zeros(0, int), np.ones((0, 2)) / 2, HALF)
