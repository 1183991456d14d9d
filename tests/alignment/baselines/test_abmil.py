"""Attention MIL: it finds what a mean of patches does not show, and the same again."""

import numpy as np
import pytest

from exaonepath.alignment.baselines.abmil import AbmilSettings, fit_abmil
from exaonepath.errors import SettingsError

QUICK = AbmilSettings(hidden=32, epochs=25, lr=3e-3, dropout=0.0)


def bags(n, seed):
    """Two patches among thirty have the sign of the class; a random offset of the bag covers it in the mean."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    out = []
    for label in y:
        bag = rng.normal(size=(30, 8)).astype(np.float32)
        bag[:, 0] = 0.2 * bag[:, 0]
        bag[:2, 0] += 4 * (2 * label - 1)
        bag[:2, 1] += 4
        out.append(bag)
    return out, y


def test_a_few_patches_are_found():
    train, test = bags(80, 0), bags(60, 1)
    probability = fit_abmil(*train, None, 2, QUICK)(test[0])
    np.testing.assert_allclose(probability.sum(1), 1)
    assert (probability.argmax(1) == test[1]).mean() > 0.9


def test_validation_patients_choose_the_epoch_and_the_result_is_reproducible():
    train, validation, test = bags(24, 0), bags(16, 1), bags(10, 2)
    first = fit_abmil(*train, validation, 2, QUICK)(test[0])
    np.testing.assert_array_equal(first, fit_abmil(*train, validation, 2, QUICK)(test[0]))
    wrong = fit_abmil(*train, (validation[0], 1 - validation[1]), 2, QUICK)(test[0])
    assert not np.array_equal(first, wrong)  # another epoch is kept


def test_bags_of_any_size_but_none_empty():
    train = bags(12, 0)
    train[0][0] = train[0][0][:1]
    few = AbmilSettings(hidden=8, epochs=1, patches=5)
    assert fit_abmil(*train, None, 3, few)(train[0]).shape == (12, 3)
    train[0][0] = train[0][0][:0]
    with pytest.raises(SettingsError, match="at least one patch"):
        fit_abmil(*train, None, 2, few)
