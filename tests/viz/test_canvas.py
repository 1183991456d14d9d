"""The pixels of the pictures: crop, mask, colour field, gallery."""

from __future__ import annotations

import numpy as np
import pytest

from exaonepath.slides.patches.fragments import grid_step
from exaonepath.viz.canvas import Canvas, color_field, restain, tissue_mask
from exaonepath.viz.gallery import exemplars
from exaonepath.viz.panels import nice_length


def square(x: int, y: int, side: int) -> np.ndarray:
    return np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], np.int32)


@pytest.fixture
def canvas() -> Canvas:
    """100 x 80 pixels that show level-0 pixels 1000 to 2000 and 0 to 800."""
    return Canvas(np.full((80, 100, 3), 200, np.uint8), (1000.0, 0.0), (0.1, 0.1))


def grid(x: int, y: int, columns: int, rows: int, step: int) -> np.ndarray:
    return np.array([(x + step * i, y + step * j) for j in range(rows) for i in range(columns)], np.int32)


def test_mask_has_holes_and_islands_in_them(canvas):
    contours = [square(1100, 100, 600), square(1350, 350, 100)]
    mask = tissue_mask(canvas, contours, [[square(1300, 300, 200)], []])
    assert mask[15, 15] > 0.99  # tissue
    assert mask[31, 31] < 0.2  # hole
    assert mask[40, 40] > 0.99  # island in the hole
    assert mask[75, 90] == 0


def test_step_of_overlapping_single_and_offset_grids():
    assert grid_step(grid(0, 0, 6, 5, 96), 256) == 96
    assert grid_step(np.concatenate([grid(0, 0, 6, 5, 300), grid(131, 5000, 6, 5, 300)]), 256) == 300
    assert grid_step(grid(0, 0, 1, 7, 64), 256) == 64
    assert grid_step(grid(5, 5, 1, 1, 1), 256) == 256
    assert grid_step(np.zeros((0, 2), np.int32), 256) == 256


@pytest.mark.parametrize("step", [25, 50, 100, 400])
def test_field_covers_patches_and_nothing_else(canvas, step):
    coords = grid(1200, 200, max(1, 400 // step), max(1, 400 // step), step)
    lab = np.tile([0.7, 0.1, -0.1], (len(coords), 1))
    field, cover = color_field(canvas, coords + 50, lab, 100, step)
    assert cover[40, 40] > 0.9
    assert cover[78, 98] < 0.05
    np.testing.assert_allclose(
        field[cover > 0.1], np.broadcast_to([0.7, 0.1, -0.1], field[cover > 0.1].shape), atol=2e-3
    )


def test_patch_without_colour_takes_its_neighbours(canvas):
    coords = grid(1200, 200, 4, 4, 100)
    lab = np.tile([0.7, 0.1, 0.0], (16, 1))
    lab[-4:] = np.nan
    field, cover = color_field(canvas, coords + 50, lab, 100, 100)
    assert cover[55, 40] > 0.9
    np.testing.assert_allclose(field[55, 40], [0.7, 0.1, 0.0], atol=2e-3)


def test_colours_lie_where_their_patches_are(canvas):
    coords = grid(1200, 200, 4, 1, 100)
    lab = np.array([[0.7, -0.1, 0]] * 2 + [[0.7, 0.1, 0]] * 2)
    field, _ = color_field(canvas, coords + 50, lab, 100, 100)
    assert field[25, 25, 1] < -0.09
    assert field[25, 55, 1] > 0.09


def test_restained_tissue_keeps_light_and_dark_and_grey_where_uncovered():
    image = np.full((20, 20, 3), 150, np.uint8)
    image[:, ::2] = 110
    field = np.full((20, 20, 3), (0.7, 0.12, 0.0), np.float32)
    cover = np.zeros((20, 20), np.float32)
    cover[10:] = 1
    result = restain(image, field, cover).astype(int)
    assert np.ptp(result[:9], axis=2).max() <= 2
    assert np.ptp(result[11:], axis=2).min() > 30
    assert (result[11:, 1::2].sum(axis=2) > result[11:, ::2].sum(axis=2)).all()


def test_exemplars_are_of_their_group_and_do_not_overlap_where_they_need_not():
    coords = grid(0, 0, 20, 6, 64)
    group = (coords[:, 0] > 600).astype(float)
    scores = np.stack([2 * group - 1, 0 * group, 0 * group], axis=1)
    found = exemplars(scores, coords, 128, groups=5, each=3)
    assert [len(members) for members in found] == [3, 3]
    for members, wanted in zip(found, (-1, 1), strict=True):
        assert (scores[members, 0] == wanted).all()
        gaps = np.abs(coords[members][:, None] - coords[members]).max(axis=2)
        assert gaps[~np.eye(3, dtype=bool)].min() >= 128


@pytest.mark.parametrize("n", [1, 2])
def test_exemplars_of_few_patches(n):
    found = exemplars(np.zeros((n, 3)), np.zeros((n, 2), np.int32), 128, groups=4, each=4)
    assert sorted(np.concatenate(found)) == list(range(n))


@pytest.mark.parametrize(("most", "length"), [(1.0, 1), (4.9, 2), (5, 5), (99, 50), (1999, 1000), (2000, 2000)])
def test_scale_bars_have_round_lengths(most, length):
    assert nice_length(most) == length
