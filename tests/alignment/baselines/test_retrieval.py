"""Baselines of retrieval: they find a planted signal, learn from training patients alone, and are compared in pairs."""

import numpy as np
import pytest

from exaonepath.alignment.baselines.comparison import recall_difference
from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.baselines.retrieval import METHODS, baseline_pairs
from exaonepath.alignment.metrics.retrieval import PairEmbeddings, cross_modal_retrieval
from exaonepath.errors import SettingsError

PAIRS = [("rna", "methylation")]


def profiles(n, seed, prefix):
    maps = np.random.default_rng(0)
    loadings = maps.normal(size=(6, 40)), maps.normal(size=(6, 30))
    rng = np.random.default_rng([seed, 1])
    latent = rng.normal(size=(n, 6))
    ids = tuple(f"{prefix}{at}" for at in range(n))
    values = [(latent @ w + rng.normal(size=(n, w.shape[1]))).astype(np.float32) for w in loadings]
    return {name: Profiles(ids, x) for name, x in zip(("rna", "methylation"), values, strict=True)}


@pytest.fixture(scope="module")
def parts():
    return profiles(150, 0, "t"), profiles(40, 1, "v"), profiles(60, 2, "p")


@pytest.fixture(scope="module")
def found(parts):
    return baseline_pairs(*parts, PAIRS)


def test_every_method_finds_the_signal_in_both_directions(found):
    assert set(found) == set(METHODS)
    for method, directions in found.items():
        assert set(directions) == {"rna->methylation", "methylation->rna"}
        for direction, pair in directions.items():
            recall = cross_modal_retrieval([pair])[direction].recall[1]
            assert recall.value > 0.5, (method, direction)


def test_a_test_patient_has_no_effect_on_another(parts, found):
    """Other values of half of the test patients: the coordinates of the rest keep their bits."""
    train, validation, test = parts
    other = {
        name: Profiles(p.patients, np.where(np.arange(60)[:, None] < 30, p.values, 5 - 3 * p.values))
        for name, p in test.items()
    }
    again = baseline_pairs(train, validation, other, PAIRS)
    for method in METHODS:
        for direction, pair in found[method].items():
            np.testing.assert_allclose(again[method][direction].u[:30], pair.u[:30], atol=1e-9)
            np.testing.assert_allclose(again[method][direction].v[:30], pair.v[:30], atol=1e-9)


def test_patients_without_a_modality_are_left_out(parts):
    train, validation, test = parts
    train = {**train, "methylation": Profiles(train["methylation"].patients[::-2], train["methylation"].values[::-2])}
    x, y = Profiles.common(train["rna"], train["methylation"])
    assert len(x) == len(y) == 75
    at = train["methylation"].patients.index("t1")
    np.testing.assert_array_equal(y[0], train["methylation"].values[at])
    nobody = {**train, "methylation": Profiles((), np.zeros((0, 30), np.float32))}
    assert baseline_pairs(nobody, validation, test, PAIRS)["CCA"] == {}


def test_a_difference_is_paired(found):
    pair = found["CCA"]["rna->methylation"]
    same = recall_difference(pair, pair)[1]
    assert same.value == 0
    assert -same.low == same.high == pytest.approx(0.0602, abs=1e-4)  # Wilson: none of 60 patients is discordant
    order = np.random.default_rng(0).permutation(60)
    ids = np.asarray(pair.left_patients)
    mixed = PairEmbeddings("rna", "methylation", pair.u[order], pair.v, ids[order], pair.right_patients)
    assert recall_difference(pair, mixed)[1].value == 0  # the order of rows does not count
    wrong = PairEmbeddings("rna", "methylation", pair.u[order], pair.v, ids, pair.right_patients)
    gain = recall_difference(pair, wrong)[1]
    assert gain.low > 0.4
    fewer = PairEmbeddings("rna", "methylation", pair.u[1:], pair.v, ids[1:], pair.right_patients)
    with pytest.raises(SettingsError, match="same query patients"):
        recall_difference(pair, fewer)
