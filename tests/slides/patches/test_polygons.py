"""The row-wise grid against one cv2.pointPolygonTest per point."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaonepath.errors import SettingsError
from exaonepath.reference.patches import grid_by_points
from exaonepath.slides.patches import grid as grid_module
from exaonepath.slides.patches import polygons as polygons_module
from exaonepath.slides.patches.grid import patch_grid
from exaonepath.slides.patches.polygons import Grids, Polygons, locate

# Few distinct values: vertices coincide, edges are horizontal or vertical, outlines touch and cross themselves, and
# test points fall on them.
COORDINATE = st.one_of(st.integers(-12, 12), st.integers(-60, 60))
OUTLINE = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=14).map(lambda v: np.array(v, np.int32))


@settings(max_examples=250, deadline=None)
@given(
    pieces=st.lists(st.tuples(OUTLINE, st.lists(OUTLINE, max_size=3)), max_size=4),
    patch=st.integers(1, 30),
    step=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    chunk=st.sampled_from([1, 3, 1 << 18]),
)
def test_grid_equals_point_by_point(pieces, patch, step, chunk):
    contours, holes = [c for c, _ in pieces], [h for _, h in pieces]
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(polygons_module, "_CHUNK", chunk)
        patcher.setattr(grid_module, "_GROUP_VERTICES", chunk)
        coords, owners = patch_grid(contours, holes, patch, step)
    expected, expected_owners = grid_by_points(contours, holes, patch, step)
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(owners, expected_owners)
    assert coords.dtype == owners.dtype == np.int32


@settings(max_examples=120, deadline=None)
@given(outline=OUTLINE, x=st.integers(-30, 5), y=st.integers(-30, 5), step=st.integers(1, 4))
def test_locate_equals_point_polygon_test(outline, x, y, step):
    grids = Grids(*(np.array([v]) for v in (x, y, 30, 30)), step, step)
    (location,) = locate(Polygons(outline, np.array([len(outline)])), grids)
    points = [(float(x + i * step), float(y + j * step)) for j in range(30) for i in range(30)]
    signs = np.sign([cv2.pointPolygonTest(outline, point, False) for point in points])
    np.testing.assert_array_equal(location.covered, signs >= 0)
    np.testing.assert_array_equal(location.strictly_inside, signs > 0)


def blob(rng, centre, radius, points=4000):
    """A dense, bumpy outline as findContours would give it."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    edge = 1 + sum(rng.normal(0, 0.15 / k) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(2, 30))
    outline = np.array(centre) + radius * edge[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return outline.astype(np.int32)


@pytest.mark.parametrize(("patch", "step"), [(256, (256, 256)), (259, (101, 97)), (2, (150, 150))])
def test_grid_on_dense_outlines_far_from_the_origin(patch, step):
    rng = np.random.default_rng(patch)
    contours = [blob(rng, centre, 3000) for centre in ((150_000, 90_000), (158_000, 91_000))]
    contours.append(np.array([[7, 7]], np.int32))
    holes = [
        [blob(rng, (150_300, 90_200), 700), blob(rng, (149_000, 89_000), 400)],
        [blob(rng, (158_000, 91_000), 900)],
        [],
    ]
    coords, owners = patch_grid(contours, holes, patch, step)
    expected, expected_owners = grid_by_points(contours, holes, patch, step)
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(owners, expected_owners)


def test_many_small_contours():
    rng = np.random.default_rng(0)
    contours = [rng.integers(0, 40, (5, 2)).astype(np.int32) + int(40 * i) for i in range(3000)]
    coords, owners = patch_grid(contours, [[] for _ in contours], 16, (16, 16))
    expected, expected_owners = grid_by_points(contours, [[] for _ in contours], 16, (16, 16))
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(owners, expected_owners)


def test_no_contours():
    coords, owners = patch_grid([], [], 256, (256, 256))
    assert coords.shape == (0, 2)
    assert owners.shape == (0,)


@pytest.mark.parametrize(("patch", "step"), [(0, (1, 1)), (1, (0, 1)), (1, (1, -1))])
def test_impossible_sizes(patch, step):
    with pytest.raises(SettingsError, match="positive"):
        patch_grid([], [], patch, step)


def test_holes_must_belong_to_contours():
    with pytest.raises(SettingsError, match="holes"):
        patch_grid([np.zeros((1, 2), np.int32)], [], 1, (1, 1))
