"""Few labelled patients: draws that all methods share, and intervals over draws and patients."""

import numpy as np
import pytest

from exaonepath.alignment.metrics.few_shot import draw_shots, few_shot_hits, scaled_by, score_draws


def classes(n=80, d=5, shift=4.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, d))
    x[:, 0] += shift * y
    return x, y


def test_draws_have_k_of_each_class_and_grow():
    y = np.array([0] * 9 + [1] * 5 + [2] * 30)
    small, large = draw_shots(y, 2, 6, 7), draw_shots(y, 5, 6, 7)
    for few, many in zip(small, large, strict=True):
        assert np.bincount(y[few]).tolist() == [2, 2, 2]
        assert np.bincount(y[many]).tolist() == [5, 5, 5]
        assert set(few) <= set(many)
    assert len({tuple(draw) for draw in small}) > 1
    assert all((a == b).all() for a, b in zip(small, draw_shots(y, 2, 6, 7), strict=True))


def test_a_plain_difference_is_learned_and_more_labels_help():
    x, y = classes()
    test, test_y = classes(seed=1)
    x, test = scaled_by(x, (x, test))
    assert np.square(x).sum(1).mean() == pytest.approx(1)
    values = []
    for k in (1, 16):
        hits = few_shot_hits(draw_shots(y, k, 10, 0), x, y, test, test_y)
        assert hits.shape == (10, 80)
        values.append(score_draws(hits, test_y))
    assert 0.6 < values[0].value < values[1].value
    assert values[1].value > 0.93


def test_permuted_labels_give_chance():
    x, y = classes()
    test, test_y = classes(seed=1)
    outside = 0
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(test_y)
        found = score_draws(few_shot_hits(draw_shots(y, 8, 5, seed), x, y, test, mixed), mixed, seed=seed)
        outside += not found.low <= 0.5 <= found.high
    assert outside <= 3


def test_chance_is_in_the_interval_where_hits_are_coins():
    """The interval covers the mean of hits that are random over draws and patients."""
    rng, covered = np.random.default_rng(0), 0
    y = np.arange(60) % 2
    for seed in range(60):
        difficulty = rng.random(60)
        found = score_draws((rng.random((8, 60)) < difficulty).astype(float), y, seed=seed)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 52


def test_certainty_is_not_claimed_at_the_edges():
    y = np.array([0] * 6 + [1] * 6)
    perfect = score_draws(np.ones((4, 12)), y)
    assert perfect.value == perfect.high == 1
    assert perfect.low < 0.8
    same = score_draws(np.zeros((4, 12)), y, shares=False)
    assert same.low < 0 == same.value < same.high
