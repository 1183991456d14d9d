"""Fragments of a grid, compared with every pair of patches."""

from __future__ import annotations

import numpy as np
import pytest

from exaonepath.slides.patches.fragments import fragments_of_grid, grid_step


def of_pairs(coords: np.ndarray, reach: int) -> np.ndarray:
    labels = np.arange(len(coords))
    near = (np.abs(coords[:, None].astype(np.int64) - coords[None]) <= reach).all(axis=2)
    while True:
        joined = np.where(near, labels[None], len(coords)).min(axis=1)
        if (joined == labels).all():
            break
        labels = joined
    names = list(dict.fromkeys(labels.tolist()))
    return np.array([names.index(label) for label in labels.tolist()], np.int32)


@pytest.mark.parametrize("seed", range(30))
def test_equals_all_pairs(seed):
    rng = np.random.default_rng(seed)
    count, spread = int(rng.integers(1, 200)), int(rng.integers(50, 4000))
    coords = rng.integers(-spread, spread, (count, 2)).astype(np.int32)
    if seed % 2:  # several grids, as those of contours
        step = int(rng.integers(20, 90))
        grids = [
            np.stack(np.meshgrid(*[np.arange(int(n)) * step for n in rng.integers(1, 8, 2)]), -1).reshape(-1, 2)
            + rng.integers(-spread, spread, 2)
            for _ in range(6)
        ]
        coords = rng.permutation(np.concatenate(grids)).astype(np.int32)
    size = int(rng.integers(1, 120))
    found = fragments_of_grid(coords, size)
    assert found.dtype == np.int32
    assert (found == of_pairs(coords, max(size, grid_step(coords, size)) + 1)).all()


def test_touching_counts_and_a_gap_does_not():
    def fragments(*coords):
        return fragments_of_grid(np.array(coords), 100).tolist()

    assert fragments((0, 0), (100, 0), (300, 0)) == [0, 0, 1]
    assert fragments((0, 0), (100, 100)) == [0, 0]  # at a corner
    assert fragments((0, 0), (101, 101)) == [0, 0]  # rounded
    assert fragments((0, 0), (102, 100)) == [0, 1]
    assert fragments((0, 100), (100, 0)) == [0, 0]
    assert fragments((5, 5), (5, 5)) == [0, 0]
    assert fragments() == []
    assert fragments((7, 7)) == [0]


def test_a_grid_with_gaps_is_connected():
    coords = np.array([(x, y) for x in range(0, 1000, 200) for y in range(0, 1000, 200)])
    assert not fragments_of_grid(coords, 100).any()


def test_many_patches_and_many_in_one_place():
    dense = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1, 2)  # a step of one pixel
    assert not fragments_of_grid(dense, 256).any()
    assert not fragments_of_grid(np.zeros((100_000, 2), np.int32), 256).any()
    wide = np.array([(0, 0), (2**31 - 1, 2**31 - 1)], np.int64)
    assert fragments_of_grid(wide, 1).tolist() == [0, 1]
