"""Harrell's C against counting pairs one by one, and a Cox fit against its definition."""

import math
import warnings

import numpy as np
import pytest

from exaonepath.alignment.metrics.survival import concordance_index, cox_probe, fit_cox
from exaonepath.errors import SettingsError


def brute_force(risk, time, event, groups):
    concordant = comparable = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            earlier = time[i] < time[j] or (time[i] == time[j] and not event[j])
            if i != j and event[i] and earlier and groups[i] == groups[j]:
                comparable += 1
                concordant += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return concordant / comparable if comparable else math.nan


@pytest.mark.parametrize("seed", range(5))
def test_equals_counting_pairs(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    # Few values: ties of time and of risk.
    risk, time, event = rng.integers(0, 5, 40), rng.integers(1, 9, 40), rng.random(40) < 0.6
    groups = rng.integers(0, 2, 40)
    monkeypatch.setattr("exaonepath.alignment.metrics.survival._CHUNK_ENTRIES", 100)
    assert concordance_index(risk, time, event, groups) == pytest.approx(brute_force(risk, time, event, groups))
    assert concordance_index(risk, time, event) == pytest.approx(brute_force(risk, time, event, [0] * 40))


def test_known_values():
    time, event = [1, 2, 3, 4], [True] * 4
    assert concordance_index([4, 3, 2, 1], time, event) == 1
    assert concordance_index([1, 2, 3, 4], time, event) == 0
    assert concordance_index([1, 1, 1, 1], time, event) == 0.5
    assert math.isnan(concordance_index([1, 2], [1, 2], [False, False]))
    # Died at 2 and censored at 2: the death came first.
    assert concordance_index([2, 1], [2, 2], [True, False]) == 1


def negative_log_likelihood(b, x, time, event):
    """Breslow's partial likelihood, written out."""
    total = 0.0
    for i in np.flatnonzero(event):
        total -= x[i] @ b - np.log(np.exp(x[time >= time[i]] @ b).sum())
    return total


def test_cox_is_at_the_minimum_of_its_likelihood():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    time = np.ceil(rng.exponential(np.exp(-x @ [1.0, -1.0, 0.0])) * 10)  # whole numbers: ties
    event = rng.random(60) < 0.7
    b = fit_cox(x, time, event, 0.5)

    def objective(at):
        return negative_log_likelihood(at, x, time, event) + 0.25 * at @ at

    assert b[0] > 0.5
    assert b[1] < -0.5
    for direction in np.eye(3):
        slope = (objective(b + 1e-5 * direction) - objective(b - 1e-5 * direction)) / 2e-5
        # L-BFGS stops at a projected gradient of 1e-5, or a relative change of 2e-9 of a loss of about 100.
        assert abs(slope) < 1e-2


def survival(seed, n=200, strength=1.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    time = rng.exponential(np.exp(-strength * x[:, 0]))
    censor = rng.exponential(2.0, n)
    return x, np.minimum(time, censor), time <= censor


def test_probe_finds_a_planted_hazard():
    x, time, event = survival(0)
    score = cox_probe(x, np.where(np.arange(200) < 5, np.nan, time), event)
    assert score.n == 195
    assert score.events == int(event[5:].sum())
    assert score.c_index.low > 0.65
    assert score.c_index.low < score.c_index.value < score.c_index.high


def test_probe_without_a_hazard_is_at_chance():
    x, time, event = survival(1, strength=0.0)
    score = cox_probe(x, time, event)
    assert score.c_index.low < 0.5 < score.c_index.high


def test_bad_input():
    x, time, event = survival(0, n=30)
    with pytest.raises(SettingsError, match="four events"):
        cox_probe(x, time, np.zeros(30, bool))
    with pytest.raises(SettingsError, match="must be positive"):
        cox_probe(x, time * 0, event)
    with pytest.raises(SettingsError, match="finite"):
        concordance_index([math.nan, 1], [1, 2], [True, True])


@pytest.mark.parametrize("censored", [0, 1, 2, 4])
def test_few_censored_patients_are_no_reason_to_warn_or_to_fail(censored):
    x, time, _ = survival(0, n=60)
    event = np.arange(60) >= censored
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = cox_probe(x, time, event)
    assert (score.n, score.events) == (60, 60 - censored)
    assert score.c_index.value > 0.65


def test_missing_times_and_events_of_every_kind_are_left_out():
    pandas = pytest.importorskip("pandas")
    x, time, event = survival(0, n=60)
    times = pandas.Series([pandas.NA, *time[1:]], dtype="Float64")
    events = pandas.Series([*event[:58], pandas.NA, pandas.NA], dtype="boolean")
    assert cox_probe(x, times, events).n == 57
