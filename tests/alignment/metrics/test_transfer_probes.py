"""Probes from training to test patients: who is used for what, scaling, and paired differences."""

import numpy as np
import pytest

from exaonepath.alignment.metrics.transfer_probes import (
    LabelTask,
    linear_prediction,
    nearest_prediction,
    paired_difference,
    pca_prediction,
)
from exaonepath.alignment.metrics.transfer_survival import FollowUp, cox_prediction, risk_difference
from exaonepath.errors import SettingsError


def part(n, seed, width=20, informative=2, strength=2.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n)
    x = rng.normal(size=(n, width))
    x[:, :informative] += strength * np.eye(3, informative)[y]
    return x, np.array([f"class{v}" for v in y], object)


@pytest.fixture(scope="module")
def parts():
    return [part(n, s) for n, s in ((150, 0), (60, 1), (120, 2))]


def predictions(parts, kind):
    task = LabelTask.of(*(y for _, y in parts))
    return kind(task, *(x for x, _ in parts))


@pytest.mark.parametrize("kind", [linear_prediction, nearest_prediction, pca_prediction])
def test_a_signal_is_found_and_none_is_not(parts, kind):
    found = predictions(parts, kind).scores()
    assert found.balanced_accuracy.low > 0.5
    assert found.n == 120
    rng = np.random.default_rng(5)
    noise = [(rng.normal(size=x.shape), y) for x, y in parts]
    nothing = predictions(noise, kind).scores().balanced_accuracy
    assert nothing.low < 1 / 3 < nothing.high


def test_test_labels_have_no_effect_on_predictions(parts):
    flipped = [*parts[:2], (parts[2][0], parts[2][1][::-1])]
    for kind in (linear_prediction, pca_prediction):
        np.testing.assert_array_equal(predictions(parts, kind).probability, predictions(flipped, kind).probability)


def test_a_common_scale_keeps_the_weights_of_directions():
    """Two strong directions carry the classes, two hundred weak ones noise: equal scales drown the classes."""
    parts = []
    for n, seed in ((60, 0), (40, 1), (200, 2)):
        x, y = part(n, seed, width=300)
        x[:, 2:] *= 0.05
        parts.append((x, y))
    assert predictions(parts, linear_prediction).scores().balanced_accuracy.value > 0.75


def test_labels_that_are_missing_rare_or_unknown(parts, caplog):
    train, validation, test = ([x, y.copy()] for x, y in parts)
    train[1][:10] = None
    train[1][10] = "single"
    test[1][:5], test[1][5], test[1][6] = float("nan"), "never seen", "single"
    task = LabelTask.of(train[1], validation[1], test[1])
    assert task.classes.tolist() == ["class0", "class1", "class2"]
    assert len(task.train.rows) == 139
    assert len(task.test.rows) == 113
    assert "are left out: never seen, single" in caplog.text
    with pytest.raises(SettingsError, match="two classes or more"):
        LabelTask.of(np.array(["a"] * 9 + ["b"], object), validation[1], test[1])
    with pytest.raises(SettingsError, match="no test patient"):
        LabelTask.of(train[1], validation[1], np.array(["z"], object))


def test_only_patients_with_the_modality_take_part(parts):
    task = LabelTask.of(*(y for _, y in parts))
    flags = [np.arange(len(y)) % 2 == 0 for _, y in parts]
    own = task.restricted(flags)
    assert len(own.test.rows) == 60
    found = linear_prediction(own, *(x for x, _ in parts))
    assert set(found.rows) == set(range(0, 120, 2))
    with pytest.raises(SettingsError, match="too few"):
        task.restricted([np.zeros(150, bool), *flags[1:]])


def test_a_difference_is_paired_over_patients(parts):
    good = predictions(parts, linear_prediction)
    same = paired_difference(good, good).balanced_accuracy
    assert same.value == 0
    assert 0 < same.high == -same.low < 0.1  # no discordant patient among 120 is no certainty
    rng = np.random.default_rng(5)
    bad = predictions([(rng.normal(size=x.shape), y) for x, y in parts], linear_prediction)
    gain = paired_difference(good, bad)
    assert gain.balanced_accuracy.low > 0.2
    assert gain.auroc.low > 0.2
    value = good.scores().balanced_accuracy.value - bad.scores().balanced_accuracy.value
    assert gain.balanced_accuracy.value == pytest.approx(value)


def survival(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 12))
    time = rng.exponential(np.exp(-1.2 * x[:, 0])) + 0.01
    last = rng.exponential(2, n) + 0.01
    return x, FollowUp(np.minimum(time, last), time < last, rng.random(n) > 0.1)


def test_survival_from_training_to_test_patients():
    parts = [survival(n, s) for n, s in ((200, 0), (80, 1), (150, 2))]
    follow_up, x = [f for _, f in parts], [x for x, _ in parts]
    everyone = [np.ones(len(v), bool) for v in x]
    for pca in (False, True):
        risk = cox_prediction(follow_up, x, everyone, pca=pca)
        assert risk.scores().c_index.low > 0.6
        assert len(risk.rows) == follow_up[2].known.sum()
    rng = np.random.default_rng(0)
    nothing = cox_prediction(follow_up, [rng.normal(size=v.shape) for v in x], everyone, pca=False)
    assert risk_difference(risk, risk).high == 0
    assert risk_difference(risk, nothing).low > 0.05
    with pytest.raises(SettingsError, match="four events"):
        cox_prediction(follow_up, x, [np.zeros(200, bool), *everyone[1:]], pca=False)


def test_a_few_strong_directions_among_many_weak_ones_keep_their_size():
    """Two informative columns and 400 small ones of noise: with one scale for all, the risk is nearly that of the two
    alone. A constant column changes nothing."""
    rng = np.random.default_rng(0)
    parts, follow_up = [], []
    for n in (150, 80, 80):
        signal = rng.standard_normal((n, 2))
        time = rng.exponential(np.exp(-signal[:, 0]))
        follow_up.append(FollowUp(time, rng.random(n) < 0.8, np.ones(n, bool)))
        parts.append(np.concatenate([signal, 0.03 * rng.standard_normal((n, 400)), np.full((n, 1), 7.0)], 1))
    everyone = [np.ones(len(part), bool) for part in parts]
    whole = cox_prediction(follow_up, parts, everyone, pca=False).scores().c_index.value
    alone = cox_prediction(follow_up, [part[:, :2] for part in parts], everyone, pca=False).scores().c_index.value
    assert whole > alone - 0.02
    constant = cox_prediction(follow_up, [np.ones((len(part), 3)) for part in parts], everyone, pca=False)
    assert constant.scores().c_index.value == 0.5
