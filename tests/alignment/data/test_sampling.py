"""Fewer patches of a slide: whole fragments, or one region of a single large one."""

import numpy as np
import pytest

from exaonepath.alignment.data.sampling import choose_patches, epoch_order, stream
from exaonepath.errors import SettingsError


def slide(sizes):
    """Fragments of the given numbers of patches, each a row of patches far from the others."""
    coords = np.concatenate([np.stack([np.arange(n) * 256, np.full(n, 100_000 * k)], 1) for k, n in enumerate(sizes)])
    return coords, np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("seed", range(20))
def test_fragments_stay_whole(seed):
    sizes = [30, 5, 12, 40, 8, 1]
    coords, contours = slide(sizes)
    rows = choose_patches(coords, contours, 50, stream("t", seed))
    assert 0 < len(rows) <= 50
    assert (np.diff(rows) > 0).all()
    chosen, counts = np.unique(contours[rows], return_counts=True)
    assert [sizes[c] for c in chosen] == counts.tolist()
    left = 50 - len(rows)
    assert all(sizes[c] > left for c in set(range(6)) - set(chosen))  # whatever fits is taken


def test_each_patch_has_the_same_chance_to_bring_its_fragment_first():
    coords, contours = slide([10, 30])
    first = [contours[choose_patches(coords, contours, 30, stream("t", i))[0]] for i in range(400)]
    # The larger one, three quarters of all patches, comes first in 300 of 400: within four deviations (8.7 each).
    assert abs(sum(first) - 300) < 35


@pytest.mark.parametrize("seed", range(5))
def test_of_a_giant_fragment_one_region_is_taken(seed):
    side = 40
    coords = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 256
    contours = np.full(len(coords), 3)
    rows = choose_patches(coords, contours, 100, stream("t", seed))
    assert len(rows) == 100
    taken = {tuple(c) for c in coords[rows] // 256}
    # One piece: every patch is reached from the first over neighbours that were taken too.
    reached, edge = set(), [next(iter(taken))]
    while edge:
        x, y = edge.pop()
        if (x, y) in taken and (x, y) not in reached:
            reached.add((x, y))
            edge += [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
    assert reached == taken
    # A disc of 100 patches is 11.3 wide, a quarter of one in the corner twice that.
    assert np.ptp(coords[rows] // 256, axis=0).max() <= 23


def test_a_slide_within_the_budget_is_left_alone():
    coords, contours = slide([3, 4])
    assert choose_patches(coords, contours, 7, stream("t")).tolist() == list(range(7))
    assert choose_patches(coords[:0], contours[:0], 1, stream("t")).tolist() == []
    with pytest.raises(SettingsError, match="budget is 0"):
        choose_patches(coords, contours, 0, stream("t"))


def test_draws_depend_on_their_key_alone():
    assert stream("a", 1).random() == stream("a", 1).random()
    assert stream("a", 1).random() != stream("a", 2).random()
    assert stream("a", 12).random() != stream("a", "12").random()
    assert stream("a1", "2").random() != stream("a", "12").random()
    assert sorted(epoch_order(50, 0, 3)) == list(range(50))
    assert epoch_order(50, 0, 3).tolist() != epoch_order(50, 0, 4).tolist()
