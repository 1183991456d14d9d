"""Statistics of neighbouring patches: they see an arrangement that no bag of patches shows, and nothing else."""

import numpy as np
import pytest

from exaonepath.alignment.baselines.neighbourhood import RINGS, neighbourhood_statistics, patch_components
from exaonepath.synthetic.cohort_morphology import draw_appearance, draw_slide


@pytest.fixture(scope="module")
def slides():
    """Twenty slides of both arrangements, in turn."""
    rng = np.random.default_rng(0)
    appearance = draw_appearance(3, 1, 8, 0.0, 0)
    found = []
    for at in range(20):
        cloud = draw_slide(rng.standard_normal(3), (3.1623, 10.0)[at % 2], appearance, 0, 120, 1, 1.0, rng)
        found.append((cloud.features, cloud.coords, cloud.contour_index))
    return found


def test_the_arrangement_is_in_the_first_component_at_the_smallest_distance(slides):
    axes = patch_components(slides)
    first = np.array([neighbourhood_statistics(slide, axes)[0] for slide in slides])
    assert first[1::2].min() > first[::2].max()  # nested patches are like their neighbours, intermixed ones are not


def test_moved_mirrored_and_reordered_slides_have_the_same_statistics(slides):
    axes = patch_components(slides)
    features, coords, contours = slides[0]
    expected = neighbourhood_statistics(slides[0], axes)
    order = np.random.default_rng(1).permutation(len(features))
    mirrored = (coords * np.array([-3, 3]) + 777)[order]
    np.testing.assert_allclose(neighbourhood_statistics((features[order], mirrored, contours[order]), axes), expected)
    # Another fragment at the same place is no neighbour.
    apart = neighbourhood_statistics((features, coords % 1000, contours), axes)
    assert len(apart) == len(expected) == axes.shape[1] * (len(RINGS) + 1)


def test_slides_without_neighbours_are_no_error(slides):
    axes = patch_components(slides)
    features, coords, contours = slides[0]
    alone = neighbourhood_statistics((features[:2], coords[:2], contours[:2]), axes)
    assert np.isfinite(alone).all()
    same_place = neighbourhood_statistics((features[:9], np.zeros((9, 2)), np.zeros(9, np.int64)), axes)
    assert np.isfinite(same_place).all()
    constant = neighbourhood_statistics((np.ones((9, 8)), coords[:9], contours[:9]), axes)
    assert np.isfinite(constant).all()
