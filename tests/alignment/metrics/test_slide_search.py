"""Slides that find slides: known answers, chance, ties, and slides of the own patient."""

import numpy as np
import pytest

from exaonepath.alignment.metrics.slide_search import random_precision, search_label, search_patient
from exaonepath.errors import SettingsError


def cohort(patients=20, slides=2, seed=0, label=0.0, patient=0.0):
    """Slides [n, 8] with a direction per label and per patient."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(patients), slides)
    names = np.array([f"class{k % 2}" for k in range(patients)])[owner]
    x = rng.normal(size=(len(owner), 8))
    x += label * rng.normal(size=(2, 8))[owner % 2] + patient * rng.normal(size=(patients, 8))[owner]
    return x, owner, names


def test_a_label_that_decides_is_always_found():
    x, owner, names = cohort(label=50.0)
    found = search_label(x, owner, names)
    scores = found.estimates(owner)
    for name in ("mAP", "hit@1", "vote@1", "vote@3", "vote@5"):
        assert scores[name].value == 1
        assert 0.5 < scores[name].low < 1  # Wilson, of 20 patients
        assert found.chance[name] < 0.9
    assert scores["mAP"].n == 20


def test_the_own_patient_does_not_count():
    """Only the own patient's slides are similar: no evidence for the label, but the other slide is found."""
    x, owner, names = cohort(patient=50.0)
    labels = search_label(x, owner, names)
    assert labels.measures["hit@1"].mean() < 0.8
    other = search_patient(x, owner)
    assert other.measures["mAP"].mean() == 1
    assert other.chance["hit@1"] == pytest.approx(1 / 39)
    assert other.chance["mAP"] == pytest.approx(random_precision(1, 39))


@pytest.mark.parametrize("collapsed", [False, True])
def test_without_a_signal_there_is_chance(collapsed):
    found = {name: [] for name in ("mAP", "hit@1", "hit@3", "vote@1", "vote@3", "vote@5")}
    for seed in range(25):
        x, owner, names = cohort(seed=seed)
        if collapsed:
            x = np.ones_like(x)
        result = search_label(x, owner, names, seed=seed)
        for name, values in found.items():
            values.append(result.measures[name].mean() - result.chance[name])
    for name, values in found.items():
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values)) < 3 * error + 1e-9, name


def test_chance_of_precision_is_the_mean_over_orders():
    rng = np.random.default_rng(0)
    for relevant, of in ((1, 1), (1, 5), (3, 7), (7, 7)):
        values = []
        for _ in range(4000):
            places = np.sort(rng.permutation(of)[:relevant]) + 1
            values.append((np.arange(1, relevant + 1) / places).mean())
        assert random_precision(relevant, of) == pytest.approx(np.mean(values), abs=0.015)


def test_queries_without_anything_to_find_are_left_out():
    x = np.eye(5)
    found = search_label(x, [0, 0, 1, 2, 3], ["a", "a", "b", "b", "only"])
    assert found.query.tolist() == [2, 3]
    assert search_patient(x, [0, 0, 1, 2, 3]).query.tolist() == [0, 1]
    with pytest.raises(SettingsError, match="no label has slides of two patients"):
        search_label(x[:2], [0, 0], ["a", "a"])
    with pytest.raises(SettingsError, match="no patient has two slides"):
        search_patient(x, np.arange(5))
    with pytest.raises(SettingsError, match="one row per sample"):
        search_patient(x, np.arange(4))


def test_a_vote_is_decided_by_the_nearest_of_equals():
    x = np.array([[1.0, 0], [0.99, 0.1], [0.9, 0.4], [0.0, 1.0]])
    found = search_label(x, np.arange(4), ["a", "a", "b", "b"])
    assert found.measures["vote@3"][0] == 0  # b, b, a
    assert found.measures["vote@1"][0] == 1
