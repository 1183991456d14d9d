"""Retrieval against an obvious implementation, ties and several rows of a patient included."""

import itertools
import math

import numpy as np
import pytest
import torch

from exaonepath.alignment.metrics.retrieval import (
    PairEmbeddings,
    cross_modal_retrieval,
    rank_queries,
    recall_by_group,
    retrieval,
)
from exaonepath.errors import SettingsError


def brute_force(similarity, query_patients, gallery_patients, k):
    """Recall@k and mean rank of the first own row, over every order of rows that keeps similarities descending."""
    hits, ranks = [], []
    for row, patient in zip(similarity, query_patients, strict=True):
        if patient not in gallery_patients:
            continue
        levels = [np.flatnonzero(np.isclose(row, value, atol=1e-9)) for value in sorted(set(np.round(row, 9)))[::-1]]
        found, total, places = 0, 0, 0
        for order in itertools.product(*(itertools.permutations(level) for level in levels)):
            flat = [gallery_patients[i] for level in order for i in level]
            place = flat.index(patient) + 1
            total += 1
            places += place
            found += place <= k
        hits.append(found / total)
        ranks.append(places / total)
    return np.array(hits), np.array(ranks)


@pytest.mark.parametrize("seed", range(6))
def test_equals_counting_every_order(seed):
    rng = np.random.default_rng(seed)
    # Few distinct directions: many ties. Patients repeat; one query's patient is not in the gallery.
    directions = np.eye(4)
    gallery, queries = directions[rng.integers(0, 4, 7)], directions[rng.integers(0, 4, 5)]
    gallery_patients, query_patients = rng.integers(0, 4, 7).tolist(), [*rng.integers(0, 4, 4).tolist(), 99]
    for k in (1, 2, 5):
        ranks = rank_queries(queries, gallery, query_patients, gallery_patients, recall_at=(k,))
        hits, places = brute_force(queries @ gallery.T, query_patients, gallery_patients, k)
        np.testing.assert_allclose(ranks.hits[k], hits, atol=1e-12)
        np.testing.assert_allclose(ranks.rank, places, atol=1e-12)


def test_perfect_and_reversed():
    x = np.eye(8)
    perfect = retrieval(x, x, range(8), range(8))
    assert perfect.recall[1].value == 1
    assert perfect.median_rank == 1
    assert perfect.chance == {1: pytest.approx(1 / 8), 5: pytest.approx(5 / 8), 10: 1.0}
    assert perfect.chance_rank == 4.5
    reversed_ = retrieval(-x, x, range(8), range(8))
    assert reversed_.recall[1].value == 0
    assert reversed_.median_rank == 8


def test_collapsed_embeddings_score_chance():
    x = torch.ones(50, 6) / 3
    score = retrieval(x, x, range(50), range(50))
    for k in (1, 5, 10):
        assert score.recall[k].value == pytest.approx(score.chance[k])
    assert score.median_rank == score.chance_rank == 25.5


def test_chance_is_what_random_embeddings_reach():
    rng = np.random.default_rng(0)
    patients = np.arange(120) // 3  # three rows each
    hits = [
        rank_queries(rng.normal(size=(120, 5)), rng.normal(size=(120, 5)), patients, patients).hits[5].mean()
        for _ in range(40)
    ]
    expected = retrieval(np.eye(120), np.eye(120), patients, patients).chance[5]
    # 40 runs of 120 queries, each a hit with p of about 0.12: the standard error is at most 0.0047; four of them.
    assert np.mean(hits) == pytest.approx(expected, abs=0.019)
    assert expected == pytest.approx(1 - math.comb(117, 5) / math.comb(120, 5))


def test_intervals_draw_patients_not_rows():
    """Ten equal rows per patient: the interval is that of 30 patients, not of 300 rows."""
    rng = np.random.default_rng(1)
    latent = rng.normal(size=(30, 8))
    noisy = latent + 0.9 * rng.normal(size=(30, 8))
    few = retrieval(noisy, latent, range(30), range(30))
    many = retrieval(np.repeat(noisy, 10, 0), latent, np.repeat(np.arange(30), 10), range(30))
    assert many.recall[1].value == pytest.approx(few.recall[1].value)
    assert (many.recall[1].low, many.recall[1].high) == pytest.approx((few.recall[1].low, few.recall[1].high))
    assert 0 < few.recall[1].low < few.recall[1].value < few.recall[1].high < 1


def test_every_pair_in_both_directions():
    rng = np.random.default_rng(0)
    rows = {"wsi": [0, 0, 1, 2], "rna": [0, 1, 3], "snp": [7, 8]}
    x = {m: rng.normal(size=(len(p), 4)) for m, p in rows.items()}
    pairs = [PairEmbeddings(a, b, x[a], x[b], rows[a], rows[b]) for a, b in (("wsi", "rna"), ("wsi", "snp"))]
    scores = cross_modal_retrieval(pairs)
    assert set(scores) == {"wsi->rna", "rna->wsi"}  # no patient has wsi and snp
    assert (scores["wsi->rna"].n_queries, scores["wsi->rna"].n_gallery) == (3, 3)
    assert (scores["rna->wsi"].n_queries, scores["rna->wsi"].n_gallery) == (2, 4)
    assert scores["wsi->rna"].as_dict()["recall"]["1"]["n"] == 2


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(30, 6))
    whole = rank_queries(x, y, np.arange(40) % 30, range(30))
    monkeypatch.setattr("exaonepath.alignment.metrics.retrieval._CHUNK_ENTRIES", 70)
    np.testing.assert_array_equal(rank_queries(x, y, np.arange(40) % 30, range(30)).rank, whole.rank)


def test_recall_by_group():
    x = np.eye(6)
    y = x.copy()
    y[3:] = -x[3:]
    pair = PairEmbeddings("wsi", "rna", x, y, list("abcdef"), list("abcdef"))
    result = recall_by_group([pair], dict(zip("abcdef", (5, 5, 5, 2, 2, 2), strict=True)))
    assert result[5].recall.value == 1
    assert result[2].recall.value == 0
    assert result[5].excess.value == 0.5
    assert result[2].excess.value == -0.5
    assert list(result) == [2, 5]


@pytest.mark.parametrize(
    ("queries", "gallery", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "3 wide, the gallery is 4"),
        (np.ones(3), np.ones((2, 3)), "matrix"),
        (np.array([[1.0, np.nan], [1, 1]]), np.ones((2, 2)), "row 0"),
        (np.ones((3, 2)), np.ones((2, 2)), "one row per sample"),
    ],
)
def test_bad_input(queries, gallery, message):
    with pytest.raises(SettingsError, match=message):
        retrieval(queries, gallery, [0, 1], [0, 1])


def test_nothing_in_common():
    score = retrieval(np.eye(2), np.eye(2), ["a", "b"], ["c", "d"])
    assert score.n_queries == 0
    assert math.isnan(score.median_rank)
    assert score.as_dict()["recall"]["1"]["value"] is None


def test_no_hit_and_all_hits_are_not_certain():
    """Wilson's interval at the edges, for the number of patients and not of rows."""
    n = 40
    patients = np.arange(n)
    circle = np.stack([np.cos(2 * np.pi * patients / n), np.sin(2 * np.pi * patients / n)], 1)
    none = retrieval(circle, -circle, patients, patients).recall[1]
    everyone = retrieval(circle, circle, patients, patients).recall[1]
    z = 1.959964
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(z * z / n / (1 + z * z / n), abs=1e-6)
    assert (everyone.low, everyone.high) == (pytest.approx(1 - none.high), 1)
    twice = retrieval(np.tile(circle, (2, 1)), -circle, np.tile(patients, 2), patients).recall[1]
    assert (twice.n, twice.high) == (n, pytest.approx(none.high))


def test_a_group_without_a_hit_is_not_certainly_worse():
    """Fifteen patients who are not found among others of whom few are: the interval has to reach them."""
    rng = np.random.default_rng(0)
    patients = np.arange(75)
    u = rng.normal(size=(75, 5))
    v = rng.normal(size=(75, 5))
    pair = PairEmbeddings("a", "b", u, v, patients, patients)
    ranks = rank_queries(u, v, patients, patients).hits[1]
    missed = np.flatnonzero(ranks == 0)[:15]
    group = {p: "few" if p in set(missed.tolist()) else "most" for p in patients.tolist()}
    found = recall_by_group([pair], group)
    assert found["few"].recall.value == 0 or found["few"].recall.low < found["few"].recall.high
    assert found["few"].excess.high > found["few"].excess.value + 0.1
