"""Canonical correlation analysis against its definition, and what chooses its shrinkage."""

import numpy as np
import pytest

from exaonepath.alignment.baselines.cca import (
    USUAL_SHRINKAGE,
    Principal,
    choose_directions,
    choose_weights,
    fit_cca,
    held_out_correlations,
    reciprocal_rank,
    shared_directions,
)
from exaonepath.errors import SettingsError


def cohort(n, seed, width=(30, 20), shared=4, noise=0.7, map_seed=0):
    maps = np.random.default_rng(map_seed)
    loadings = [maps.normal(size=(shared, w)) for w in width]
    rng = np.random.default_rng([seed, 1])
    latent = rng.normal(size=(n, shared))
    return tuple(latent @ w + noise * rng.normal(size=(n, w.shape[1])) * 2 for w in loadings)


@pytest.mark.parametrize("n", [12, 200])
def test_principal_axes_are_those_of_the_standardised_values(n):
    """Fewer patients than features, and more: both products give the singular values of the definition."""
    x = np.random.default_rng(0).normal(size=(n, 25)) * np.arange(1, 26) + 3
    axes = Principal.of(x)
    z = (x - x.mean(0)) / x.std(0)
    expected = np.linalg.svd(z, compute_uv=False) ** 2 / n
    rank = min(n - 1, 25)
    np.testing.assert_allclose(axes.variance, expected[:rank], rtol=1e-8)
    scores = axes.scores(x)
    np.testing.assert_allclose(scores.T @ scores / n, np.diag(axes.variance), atol=1e-8)
    np.testing.assert_allclose(scores @ scores.T, z @ z.T, atol=1e-7)


def test_without_shrinkage_it_is_canonical_correlation_analysis():
    x, y = cohort(300, 0)
    left, right = Principal.of(x), Principal.of(y)
    found = shared_directions(left, right, (left.scores(x), right.scores(y)), (0.0, 0.0))
    qx, qy = (np.linalg.qr(v - v.mean(0))[0] for v in (x, y))
    np.testing.assert_allclose(found.correlations, np.linalg.svd(qx.T @ qy, compute_uv=False), atol=1e-8)
    u, v = left.scores(x) @ found.left, right.scores(y) @ found.right
    for k in range(4):
        assert np.corrcoef(u[:, k], v[:, k])[0, 1] == pytest.approx(found.correlations[k], abs=1e-8)


def test_validation_patients_choose_the_shrinkage():
    """With a few patients and many features, little shrinkage finds nobody, and the choice avoids it."""
    train, validation, test = (cohort(n, s, (80, 60)) for n, s in ((70, 0), (60, 1), (200, 2)))
    left, right = Principal.of(train[0]), Principal.of(train[1])
    chosen = choose_directions(left, right, train, validation)
    assert min(chosen.shrinkage) >= 0.1
    scores = left.scores(train[0]), right.scores(train[1])
    bad = shared_directions(left, right, scores, (0.01, 0.01))

    def rank(directions):
        return reciprocal_rank(left.scores(test[0]) @ directions.left, right.scores(test[1]) @ directions.right)

    assert rank(chosen) > rank(bad) + 0.05
    for nobody in (None, tuple(part[:9] for part in validation)):
        assert choose_directions(left, right, train, nobody).shrinkage == (USUAL_SHRINKAGE, USUAL_SHRINKAGE)


def test_evidence_counts_directions_by_what_they_predict():
    """Two directions are shared; the other correlations of the training patients are chance, and are seen as such."""
    train, validation = cohort(150, 0, (60, 50), shared=2), cohort(80, 1, (60, 50), shared=2)
    left, right = Principal.of(train[0]), Principal.of(train[1])
    directions = choose_directions(left, right, train, None)
    outside = held_out_correlations(left, right, train, directions)
    assert (np.diff(outside) <= 1e-12).all()
    assert outside[:2].min() > 0.5
    assert outside[5] < 0.15 < directions.correlations[5]
    weighted = choose_weights(left, right, train, validation, directions)
    ranks = [
        reciprocal_rank(left.scores(validation[0]) @ d.left, right.scores(validation[1]) @ d.right)
        for d in (directions, weighted)
    ]
    assert ranks[1] >= ranks[0]
    assert choose_weights(left, right, train, None, directions) is directions


def test_a_fit_is_for_other_patients():
    train, test = cohort(150, 0), cohort(100, 1)
    u, v = fit_cca(train)(*test)
    assert reciprocal_rank(u, v) > 0.3
    rng = np.random.default_rng(0)
    shuffled = train[0], train[1][rng.permutation(150)]
    assert reciprocal_rank(*fit_cca(shuffled)(*test)) < 0.12


def test_a_constant_feature_counts_nowhere():
    x, y = cohort(60, 0)
    plain = fit_cca((x, y))(x[:5], y[:5])
    wider = fit_cca((np.c_[x, np.full(60, 7.0)], y))(np.c_[x[:5], np.full(5, 9.0)], y[:5])
    for one, other in zip(plain, wider, strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-8)


def test_what_has_no_directions_is_refused():
    with pytest.raises(SettingsError, match="two patients or more"):
        Principal.of(np.zeros((1, 3)))
    with pytest.raises(SettingsError, match="same values"):
        Principal.of(np.ones((5, 3)))
    one = Principal.of(np.random.default_rng(0).normal(size=(5, 3)))
    with pytest.raises(SettingsError, match="both modalities"):
        choose_directions(one, one, (np.zeros((1, 3)), np.zeros((1, 3))), None)
