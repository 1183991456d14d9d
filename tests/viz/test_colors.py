"""Properties of the colours of embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaonepath.errors import SettingsError
from exaonepath.viz import embedding_colors
from exaonepath.viz.colors import project, to_oklab, to_srgb


def clusters(n: int, width: int, seed: int = 0) -> np.ndarray:
    """Skewed data with clearly different variances along its axes."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(10, 0.01, width)
    return rng.gamma(2.0, size=(n, width)) * scales @ np.linalg.qr(rng.normal(size=(width, width)))[0]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 200])
@pytest.mark.parametrize("width", [1, 2, 3, 48])
def test_any_shape_gives_colours(n, width):
    colors = embedding_colors(clusters(n, width))
    assert colors.shape == (n, 3)
    assert colors.dtype == np.uint8


@pytest.mark.parametrize(("n", "width"), [(60, 8), (8, 60)])
def test_only_distances_between_patches_count(n, width):
    x = clusters(n, width)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))[0]
    rotation[:, 0] *= -1  # a mirroring too
    expected = embedding_colors(x).astype(int)
    for other in (x @ rotation, 1000 * x, x + 7.0, np.pad(x, ((0, 0), (0, 5)))):
        assert np.abs(embedding_colors(other).astype(int) - expected).max() <= 2


def test_same_input_same_colours_in_any_float_type():
    x = clusters(100, 16)
    assert np.array_equal(embedding_colors(x), embedding_colors(x.copy()))
    difference = embedding_colors(x.astype(np.float32)).astype(int) - embedding_colors(x)
    assert np.abs(difference).max() <= 1


def test_order_of_patches_does_not_matter():
    x = clusters(100, 16)
    order = np.random.default_rng(2).permutation(100)
    assert np.abs(embedding_colors(x[order]).astype(int) - embedding_colors(x)[order]).max() <= 1


@pytest.mark.parametrize("value", [0.0, 3.7, -1e6])
def test_constant_embeddings_get_one_colour(value):
    noise = np.random.default_rng(0).normal(size=(50, 12)) * 1e-9 * abs(value)
    assert len(np.unique(embedding_colors(value + noise), axis=0)) == 1


def test_alike_patches_get_alike_colours_and_groups_different_ones():
    rng = np.random.default_rng(3)
    group = np.repeat([0, 1, 2], 40)
    x = rng.normal(size=(3, 64))[group] + 0.02 * rng.normal(size=(120, 64))
    lab = to_oklab(embedding_colors(x))
    centres = np.array([lab[group == k].mean(axis=0) for k in range(3)])
    within = max(np.linalg.norm(lab[group == k] - centres[k], axis=1).mean() for k in range(3))
    between = min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert between > 3 * within
    assert between > 0.1


def test_one_outlier_does_not_take_the_colours_of_the_others():
    x = clusters(300, 16)
    spoiled = np.concatenate([x, x[:1] + 1e4 * np.ones(16)])
    lab = to_oklab(embedding_colors(spoiled)[:-1])
    assert np.linalg.norm(lab - lab.mean(axis=0), axis=1).mean() > 0.04


def test_two_different_patches_differ_and_the_minority_of_many_too():
    two = to_oklab(embedding_colors(np.eye(2, 10)))
    assert np.linalg.norm(two[0] - two[1]) > 0.1
    x = np.zeros((500, 10))
    x[:3, 4] = 1
    many = to_oklab(embedding_colors(x))
    assert np.linalg.norm(many[0] - many[-1]) > 0.1


def test_broken_rows_are_grey_and_leave_the_others_alone():
    x = clusters(50, 8)
    broken = np.concatenate([x, np.full((1, 8), np.nan), np.full((1, 8), np.inf)])
    colors = embedding_colors(broken)
    assert np.array_equal(colors[:50], embedding_colors(x))
    assert (np.ptp(colors[50:].astype(int), axis=1) == 0).all()


def test_explained_shares_fall_and_stay_below_one():
    explained = project(clusters(80, 20)).explained
    assert explained[0] >= explained[1] >= explained[2] > 0
    assert explained.sum() <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_lightness_is_bounded(n, width, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) * 10.0 ** rng.integers(-8, 8)
    lightness = to_oklab(embedding_colors(x))[:, 0]
    assert ((lightness > 0.45) & (lightness < 0.92)).all()


def test_oklab_round_trip_and_known_values():
    rgb = np.random.default_rng(0).integers(0, 256, (100, 3)).astype(np.uint8)
    assert np.abs(to_srgb(to_oklab(rgb)).astype(int) - rgb).max() <= 1
    white, red = to_oklab(np.array([[255, 255, 255], [255, 0, 0]], np.uint8))
    np.testing.assert_allclose(white, [1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(red, [0.62796, 0.22486, 0.12585], atol=1e-3)  # Ottosson's table


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((2, 2, 2)), np.array([["a"]])])
def test_what_is_no_matrix_of_numbers_is_refused(wrong):
    with pytest.raises(SettingsError, match=r"\[N, E\]"):
        embedding_colors(wrong)
