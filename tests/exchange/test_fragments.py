"""Fragments of patches that touch, against the same by brute force."""

import numpy as np
import pytest

from exaonepath.errors import SettingsError
from exaonepath.exchange.fragments import connected_fragments


def by_brute_force(coords, size):
    n = len(coords)
    labels = np.arange(n)
    touches = np.abs(coords[:, None] - coords[None]).max(axis=-1) <= size + 1  # one pixel for the rounding of grids
    while True:
        smallest = np.where(touches, labels[None], n).min(axis=1)
        if np.array_equal(smallest, labels):
            break
        labels = smallest
    order = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()])


@pytest.mark.parametrize("seed", range(60))
def test_random_positions(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 40))
    coords = random.integers(-150, 300, (int(random.integers(1, 150)), 2))
    np.testing.assert_array_equal(connected_fragments(coords, size), by_brute_force(coords, size))


def test_two_grids_that_do_not_align():
    first = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 256
    second = first + np.array([5 * 256 + 258, 37])
    found = connected_fragments(np.concatenate([first, second]), 256)
    assert found.tolist() == [0] * 20 + [1] * 20
    assert not connected_fragments(np.concatenate([first, first + np.array([5 * 256, 37])]), 256).any()


def test_a_long_way_round():
    """One spiral: labels have to travel along all of it."""
    at, step, path = np.array([0, 0]), np.array([1, 0]), []
    for length in range(1, 60):
        for _ in range(2):
            for _ in range(2 * length):
                at = at + step
                path.append(at)
            step = np.array([-step[1], step[0]])
    coords = np.random.default_rng(0).permutation(np.array(path) * 224)
    assert connected_fragments(coords, 224).max() == 0


def test_none_and_one():
    assert connected_fragments(np.empty((0, 2), np.int32), 256).shape == (0,)
    assert connected_fragments(np.array([[5, -7]]), 256).tolist() == [0]


def test_small_patches_far_apart_are_refused():
    limits = np.iinfo(np.int32)
    with pytest.raises(SettingsError, match="too small"):
        connected_fragments(np.array([[limits.min, limits.min], [limits.max, limits.max]]), 1)
    assert connected_fragments(np.array([[limits.min, limits.min], [limits.max, limits.max]]), 256).tolist() == [0, 1]
