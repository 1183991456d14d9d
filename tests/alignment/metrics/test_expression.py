"""Genes predicted one by one: planted genes are found, noise is not, and numbers are those of scipy."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, pearsonr, spearmanr

from exaonepath.alignment.metrics.expression import adjusted, fit_ridge_map, score_genes
from exaonepath.errors import SettingsError


def planted(n=160, genes=60, signal=20, seed=0):
    """Inputs [n, 6] and genes [n, genes], of which the first `signal` follow from the inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    y = rng.normal(size=(n, genes))
    y[:, :signal] += x @ rng.normal(size=(6, signal))
    return x, y


def test_planted_genes_are_found_and_others_are_not():
    x, y = planted(240)
    predict = fit_ridge_map((x[:100], y[:100]), (x[100:140], y[100:140]))
    (found,), _ = score_genes([predict(x[140:])], y[140:], [f"g{k}" for k in range(60)])
    assert found.significant[:20].all()
    assert found.significant[20:].sum() <= 3  # 5 % of 23 are about one
    assert found.mean_pearson.low < found.mean_pearson.value < found.mean_pearson.high
    assert (found.low[:20] > 0).all()
    assert found.false[0] < 0.5
    assert found.as_dict()["significant"] == found.significant.sum()


def test_numbers_are_those_of_scipy():
    x, y = planted(80, 5, 3)
    guess = x @ np.ones((6, 5)) + np.random.default_rng(1).normal(size=(80, 5))
    y[:20, 1] = np.nan
    (found,), _ = score_genes([guess], y, list("abcde"))
    for column in range(5):
        known = np.isfinite(y[:, column])
        r = pearsonr(guess[known, column], y[known, column], alternative="greater")
        assert found.pearson[column] == pytest.approx(r.statistic, abs=1e-6)
        assert found.p[column] == pytest.approx(r.pvalue, rel=1e-4)
        assert found.spearman[column] == pytest.approx(spearmanr(guess[known, column], y[known, column]).statistic)
        assert found.n[column] == known.sum()
        assert found.low[column] < found.pearson[column] < found.high[column]
        assert found.spearman_low[column] < found.spearman[column] < found.spearman_high[column]
    np.testing.assert_allclose(adjusted(found.p), false_discovery_control(found.p))
    np.testing.assert_allclose(adjusted(np.array([0.04, np.nan, 0.01])), [0.04, np.nan, 0.02])


def test_intervals_cover_the_truth():
    """200 genes with correlation 0.5 to their prediction: about 95 % of the intervals hold it."""
    rng = np.random.default_rng(3)
    guess = rng.normal(size=(100, 200))
    y = 0.5 * guess + np.sqrt(0.75) * rng.normal(size=(100, 200))
    (found,), _ = score_genes([guess], y, [str(k) for k in range(200)])
    for low, high, middle in (
        (found.low, found.high, 0.5),
        (found.spearman_low, found.spearman_high, 6 / np.pi * np.arcsin(0.25)),
    ):
        assert ((low < middle) & (middle < high)).mean() > 0.88


def test_permuted_patients_give_nothing():
    x, y = planted(200)
    predict = fit_ridge_map((x[:100], y[:100]), None)
    outside = 0
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(100) + 100
        (found,), _ = score_genes([predict(x[mixed])], y[100:], [str(k) for k in range(60)], seed=seed)
        outside += not found.mean_pearson.low < 0 < found.mean_pearson.high
        assert found.significant.sum() <= 2
    assert outside <= 3  # about one of twenty


def test_a_constant_gene_and_the_mean_predictor_have_no_correlation():
    y = planted(60, 4, 4)[1]
    y[:, 2] = 7.25
    guess = y + 0.1
    constant = np.full_like(y, 0.3)
    (ours, mean), (difference,) = score_genes([guess, constant], y, list("abcd"))
    assert np.isnan([ours.pearson[2], ours.spearman[2], ours.p[2], ours.q[2], ours.low[2]]).all()
    assert ours.pearson[0] == pytest.approx(1)
    assert ours.as_dict()["not_defined"] == 1
    assert np.isnan(mean.pearson).all()
    assert mean.mean_pearson.as_dict()["value"] is None
    assert mean.explained.value < 0 < ours.explained.value
    assert mean.significant.sum() == 0
    assert np.isnan(difference.value)


def test_differences_are_paired():
    """Two predictions that share their errors: the interval of the difference is narrower than of either."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(80, 10))
    shared = y[:, :1] + rng.normal(size=(80, 10))
    (ours, theirs), (difference,) = score_genes(
        [shared, shared + 0.3 * rng.normal(size=(80, 10))], y, [str(k) for k in range(10)]
    )
    assert difference.value == pytest.approx(ours.mean_pearson.value - theirs.mean_pearson.value, abs=1e-6)
    assert difference.high - difference.low < ours.mean_pearson.high - ours.mean_pearson.low


def test_the_same_seed_gives_the_same_numbers():
    x, y = planted(50, 3, 2)
    found = [score_genes([x[:, :3]], y, list("abc"), seed=s)[0][0] for s in (1, 1, 2)]
    np.testing.assert_array_equal(found[0].low, found[1].low)
    assert (found[0].low != found[2].low).any()


def test_missing_values_train_as_the_mean():
    x, y = planted(100, 2, 2)
    whole = fit_ridge_map((x, y), None)(x)
    y[:10, 0] = np.nan
    part = fit_ridge_map((x, y), None)(x)
    np.testing.assert_allclose(part[:, 1], whole[:, 1])
    assert np.isfinite(part).all()


def test_bad_input():
    x, y = planted(20, 2, 2)
    with pytest.raises(SettingsError, match="two training patients"):
        fit_ridge_map((x[:1], y[:1]), None)
    with pytest.raises(SettingsError, match="same inputs"):
        fit_ridge_map((np.ones((5, 3)), y[:5]), None)
    with pytest.raises(SettingsError, match="4 test patients"):
        score_genes([y[:3]], y[:3], ["a", "b"])
    with pytest.raises(SettingsError, match="must be"):
        score_genes([y[:, :1]], y, ["a", "b"])
