"""Spectra and overlaps of planted subspaces."""

import numpy as np
import pytest

from exaonepath.alignment.metrics.projections import direction_reuse, pair_spectrum
from exaonepath.errors import SettingsError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rows(latent, directions):
    return latent @ directions


def test_the_same_directions(rng):
    latent = rng.normal(size=(300, 4))
    basis = np.linalg.qr(rng.normal(size=(32, 4)))[0].T
    found = pair_spectrum("wsi", "rna", rows(latent, basis), rows(latent, basis))
    assert found.overlap == pytest.approx(1)
    assert found.correlation == pytest.approx(1)
    assert found.left_rank == pytest.approx(4, abs=0.1)
    assert found.left_spectrum.sum() == pytest.approx(1)
    assert found.n == 300


def test_unrelated_directions_and_patients(rng):
    basis = np.linalg.qr(rng.normal(size=(32, 8)))[0].T
    u, v = rows(rng.normal(size=(2000, 4)), basis[:4]), rows(rng.normal(size=(2000, 4)), basis[4:])
    found = pair_spectrum("wsi", "rna", u, v)
    assert found.overlap == pytest.approx(0, abs=1e-12)
    assert found.chance == 4 / 32
    # CKA of unrelated rows: about d / n = 4 / 2000; ten times that.
    assert found.correlation < 0.02


def test_chance_is_the_overlap_of_random_subspaces(rng):
    """A subspace of 4 and one of 8 of 32 dimensions share 8 / 32 of the smaller on average."""
    values = []
    for _ in range(200):
        a, b = (np.linalg.qr(rng.normal(size=(32, k)))[0].T for k in (4, 8))
        values.append(pair_spectrum("a", "b", rows(rng.normal(size=(200, 4)), a), rows(rng.normal(size=(200, 8)), b)))
    assert {v.chance for v in values} <= {7 / 32, 8 / 32}  # 90 % of the variance may lie in seven
    # Standard error about 0.06 / sqrt(200) = 0.004; three of them.
    assert np.mean([v.overlap - v.chance for v in values]) == pytest.approx(0, abs=0.013)


def test_a_rotated_partner_correlates_without_sharing_directions(rng):
    latent = rng.normal(size=(500, 4))
    basis = np.linalg.qr(rng.normal(size=(32, 8)))[0].T
    found = pair_spectrum("wsi", "rna", rows(latent, basis[:4]), rows(latent, basis[4:]))
    assert found.overlap < 0.01
    assert found.correlation == pytest.approx(1)


def test_direction_reuse(rng):
    h = rng.normal(size=(1000, 10))
    w = np.zeros((10, 3))
    w[:3] = np.eye(3)
    other = np.zeros((10, 3))
    other[5:8] = np.eye(3)
    reuse = direction_reuse({"rna": w, "snp": w @ np.linalg.qr(rng.normal(size=(3, 3)))[0], "cnv": other}, h)
    assert reuse["rna", "snp"] == pytest.approx(1)
    assert reuse["rna", "cnv"] < 0.02


def test_bad_input():
    with pytest.raises(SettingsError, match="same patients"):
        pair_spectrum("a", "b", np.ones((3, 2)), np.ones((4, 2)))
    flat = pair_spectrum("a", "b", np.ones((3, 2)), np.ones((3, 2)))
    assert flat.left_rank == 0
    assert flat.as_dict()["correlation"] == 0.0
