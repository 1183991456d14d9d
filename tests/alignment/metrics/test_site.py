"""Retrieval by site."""

import numpy as np
import pytest

from exaonepath.alignment.metrics.retrieval import PairEmbeddings
from exaonepath.alignment.metrics.site import site_retrieval


def pair(n, of_patient, of_site, seed=0, sites=4):
    rng = np.random.default_rng(seed)
    ids = np.array([f"P{at}" for at in range(n)])
    site = {str(p): f"S{at % sites}" for at, p in enumerate(ids)}
    centres = 5 * rng.normal(size=(sites, 10))
    z = rng.normal(size=(n, 10))
    u, v = (of_patient * z + of_site * centres[np.arange(n) % sites] + rng.normal(size=(n, 10)) for _ in range(2))
    return PairEmbeddings("wsi", "rna", u, v, ids, ids), site


def test_a_site_that_is_retrieved_is_suspicious():
    found = site_retrieval(*(lambda p, s: ([p], s))(*pair(200, 0.3, 2.0)))
    assert found.is_suspicious
    assert found.wrong_from_own_site.value > 0.98
    assert found.chance == pytest.approx(49 / 199)
    # All of the recall is the site's: within it, little is left over its chance of 1 / 50.
    assert found.within_chance == pytest.approx(1 / 50)
    assert found.recall.value < 0.15
    assert "split_sites" in found.advice()


def test_patients_that_are_retrieved_are_not():
    found = site_retrieval(*(lambda p, s: ([p], s))(*pair(200, 1.5, 0.0)))
    assert not found.is_suspicious
    assert found.wrong_from_own_site.low < found.chance < found.wrong_from_own_site.high
    assert found.within.value > found.recall.value > 0.3


def test_within_the_site_is_the_definition():
    """By a loop: the best of the gallery among patients of the query's site."""
    one, site = pair(40, 0.8, 0.5)
    sites = np.array([site[p] for p in one.left_patients.tolist()])
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one.u, one.v))
    hits = []
    for similarity in (u @ v.T, v @ u.T):
        for at, row in enumerate(similarity):
            same = np.flatnonzero(sites == sites[at])
            hits.append(same[row[same].argmax()] == at)
    assert site_retrieval([one], site).within.value == pytest.approx(np.mean(hits))


def test_patients_without_a_site_are_left_out():
    one, site = pair(60, 1.0, 0.0)
    known = {p: s for p, s in site.items() if int(p[1:]) < 40}
    found = site_retrieval([one], known)
    assert found.recall.n == 40
    assert site_retrieval([one], dict.fromkeys(site, "S0")) is None
    assert site_retrieval([one], {}) is None
    assert site_retrieval([], site) is None
