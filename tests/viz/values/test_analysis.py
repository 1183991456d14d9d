"""Unit vectors, exact search, principal components and clusters, attacked with values that break naive code."""

from __future__ import annotations

import numpy as np
import pytest

from exaonepath.files.hdf5_output import atomic_h5
from exaonepath.viz.values import analysis
from exaonepath.viz.values.analysis import clusters, components
from exaonepath.viz.values.results import VectorSource
from exaonepath.viz.values.vectors import UnitRows, VectorStore, most_similar, top_rows, unit_rows


@pytest.fixture
def store():
    store = VectorStore()
    yield store
    store.close()


def unit(values) -> UnitRows:
    return UnitRows(*unit_rows(np.asarray(values)))


def test_unit_rows_of_every_size_of_numbers():
    rows = np.array([[3, 4], [3e-30, 4e-30], [3e30, 4e30], [0, 0], [np.nan, 1], [np.inf, 1], [-5, 0]], np.float32)
    found, usable = unit_rows(rows)
    assert usable.tolist() == [True, True, True, False, False, False, True]
    assert found[:3] == pytest.approx(np.array([[0.6, 0.8]] * 3), abs=1e-6)
    assert (found[3:6] == 0).all()
    assert unit_rows(np.empty((0, 5)))[0].shape == (0, 5)
    assert unit_rows(rows[:1].astype(np.float16))[0].dtype == np.float32


def test_top_rows_with_ties_and_few_rows():
    values = np.array([1, 5, 5, 3, 5, 0], np.float32)
    assert top_rows(values, 2).tolist() == [1, 2]
    assert top_rows(values, 4).tolist() == [1, 2, 4, 3]
    assert top_rows(values, 99).tolist() == [1, 2, 4, 3, 0, 5]
    assert top_rows(values[:0], 3).tolist() == []
    assert top_rows(np.full(5, -np.inf, np.float32), 2).tolist() == [0, 1]


def test_stored_vectors_are_searched_exactly(tmp_path, store):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40_001, 48)).astype(np.float32)
    values[[5, 77]] = 0
    values[9] = np.nan
    with atomic_h5(tmp_path / "a.h5") as file:
        file.array("x", values)
    found = store.get("a", VectorSource(tmp_path / "a.h5", "x", (16, 48)))
    assert store.has("a")
    assert not store.has("b")
    assert store.get("a", VectorSource(tmp_path / "none.h5", "x", (0, 1))) is found  # made once
    part = values[:, 16:].astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = (part / np.linalg.norm(part, axis=1, keepdims=True)) @ (part[3] / np.linalg.norm(part[3]))
    cosine = store.cosine(found, found.rows[3])
    assert np.isnan(cosine[[5, 9, 77]]).all()
    good = np.isfinite(expected)
    assert np.abs(cosine - expected)[good].max() < 32 * np.finfo(np.float32).eps
    best = most_similar(store, [found], found.rows[3], 6, (0, 3))
    order = np.argsort(-np.where(good & (np.arange(len(values)) != 3), expected, -2), kind="stable")[:6]
    assert [match.row for match in best] == order.tolist()


def test_search_over_several_slides_and_odd_ones(store):
    slides = [unit([[1, 0], [0, 1]]), unit(np.empty((0, 2))), unit([[1, 0, 0]]), unit([[0, 0], [2, 0.1], [-1, 0]])]
    best = most_similar(store, slides, slides[0].rows[0], 10, (0, 0))
    assert [(m.slide, m.row) for m in best] == [(3, 1), (0, 1), (3, 2)]
    assert most_similar(store, [], slides[0].rows[0], 3) == []


def test_the_temporary_files_are_removed(tmp_path):
    store = VectorStore(folder=tmp_path)
    with atomic_h5(tmp_path / "a.h5") as file:
        file.array("x", np.ones((3, 2), np.float32))
    rows = store.get("a", VectorSource(tmp_path / "a.h5", "x", (0, 2))).rows
    assert len(list(tmp_path.iterdir())) == 2
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert rows.sum() == pytest.approx(3 * 2**0.5)  # still mapped


def planted(rng, counts, width=64):
    centres = rng.normal(size=(len(counts), width))
    labels = np.repeat(np.arange(len(counts)), counts)
    order = rng.permutation(len(labels))
    return (centres[labels] + 0.05 * rng.normal(size=(len(labels), width)))[order], labels[order]


@pytest.mark.parametrize("sample", [50, 20_000])
def test_planted_clusters_are_found(monkeypatch, sample):
    monkeypatch.setattr(analysis, "_SAMPLE", max(sample, 200))
    monkeypatch.setattr(analysis, "_CLUSTER_SAMPLE", max(sample, 200))
    values, labels = planted(np.random.default_rng(1), [300, 200, 100, 50])
    found = clusters(unit(values), 4)
    assert (found == labels).all()  # numbered by size
    assert (clusters(unit(values), 4) == found).all()


def test_clusters_of_odd_input():
    assert clusters(unit(np.empty((0, 4))), 3).shape == (0,)
    assert clusters(unit(np.zeros((5, 4))), 3).tolist() == [255] * 5
    assert set(clusters(unit(np.ones((5, 4))), 3).tolist()) == {0}  # one distinct vector
    assert clusters(unit([[1, 2], [np.nan, 1], [1, 2.1], [-3, 1]]), 2).tolist() == [0, 255, 0, 1]
    assert sorted(clusters(unit(np.eye(3)), 12).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 700])
def test_components_of_any_number_of_patches(n):
    values = np.random.default_rng(0).normal(size=(n, 40))
    found = components(unit(values))
    assert found.points.shape == (n, 2)
    assert found.colours.shape == (n, 3)
    assert np.isfinite(found.points).all()


@pytest.mark.parametrize("width", [64, 20, 3])
def test_components_of_many_patches_are_those_of_all(monkeypatch, width):
    """Above the sample size the axes come from a sample; the picture stays the same."""
    values, labels = planted(np.random.default_rng(2), [500, 500, 500], width)
    values[7] = 0
    exact = components(unit(values))
    monkeypatch.setattr(analysis, "_SAMPLE", 600)
    sampled = components(unit(values))
    for column in range(2):
        both = [found.points[labels >= 0, column] for found in (exact, sampled)]
        good = np.isfinite(both[0])
        assert abs(np.corrcoef(both[0][good], both[1][good])[0, 1]) > 0.999
    assert np.isnan(sampled.points[7]).all()
    assert (sampled.colours[7] == 176).all()
    assert np.abs(sampled.colours.astype(int) - exact.colours).mean() < 8
