"""Patching: the grid against one pointPolygonTest per patch, segmentation against the whole level at once.

Baselines are the algorithm as EXAONE Path's patching is described to run it, written plainly. Both sides run in one
process, their results are compared before anything is timed, and segmentation opens the slide afresh each time.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from exaonepath.patches import SegmentationSettings, SlideImage, segment_tissue
from exaonepath.patches.grid import patch_grid
from exaonepath.synthetic import make_slide

SCALE = 16  # downsample of the level the outlines below come from


def tissue(seed: int, width: int, height: int, fragments: int) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Rough-edged outlines with holes, dense as findContours gives them, for a slide of width x height pixels."""
    rng = np.random.default_rng(seed)
    w, h = width // SCALE, height // SCALE
    field = np.full((h, w), -1.0, np.float32)
    for i in range(fragments):
        centre = (int((i + 0.5) * w / fragments), h // 2)
        cv2.ellipse(field, centre, (int(0.46 * w / fragments), int(0.44 * h)), 0, 0, 360, 1.0, -1)
    field = cv2.GaussianBlur(field, (0, 0), 40)
    for sigma, weight in ((60, 0.45), (12, 0.35), (2.5, 0.32)):
        noise = cv2.GaussianBlur(rng.standard_normal((h, w), dtype=np.float32), (0, 0), sigma)
        field += weight * noise / noise.std()
    outlines, hierarchy = cv2.findContours((field > 0).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    big = [i for i, outline in enumerate(outlines) if cv2.contourArea(outline) > (512 / SCALE) ** 2]
    scaled = {i: outlines[i].reshape(-1, 2) * SCALE for i in big}
    outer = [i for i in big if hierarchy[0, i, 3] < 0]
    return [scaled[i] for i in outer], [[scaled[j] for j in big if hierarchy[0, j, 3] == i] for i in outer]


def grid_patch_by_patch(contours, holes, patch, step):
    coords, owners = [], []
    half = patch // 2
    shift = int(half * 0.5)
    for index, contour in enumerate(contours):
        x0, y0, w, h = cv2.boundingRect(contour)
        for y in np.arange(y0, y0 + h, step):
            for x in np.arange(x0, x0 + w, step):
                cx, cy = float(x + half), float(y + half)
                probes = (
                    (cx + a, cy + b) for a, b in ((shift, shift), (-shift, -shift), (shift, -shift), (-shift, shift))
                )
                if not any(cv2.pointPolygonTest(contour, probe, False) >= 0 for probe in probes):
                    continue
                centre = (float(x + patch / 2), float(y + patch / 2))
                if any(cv2.pointPolygonTest(hole, centre, False) > 0 for hole in holes[index]):
                    continue
                coords.append((x, y))
                owners.append(index)
    return np.array(coords, np.int32), np.array(owners, np.int32)


# Slides that give about 57,000 and 30,000 patches; the second has longer outlines for each patch.
@pytest.mark.parametrize(
    ("patches", "size", "fragments"), [(57_000, (104_000, 57_000), 3), (30_000, (73_000, 42_000), 1)]
)
def test_grid(compare, patches, size, fragments):
    contours, holes = tissue(patches, *size, fragments)
    expected, owners = grid_patch_by_patch(contours, holes, 256, 256)
    assert 0.9 * patches < len(expected) < 1.1 * patches

    def ours():
        return patch_grid(contours, holes, 256, (256, 256))

    coords, contour_index = ours()
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(contour_index, owners)
    compare(
        f"grid of {patches} patches",
        ours,
        lambda: grid_patch_by_patch(contours, holes, 256, 256),
        rounds=2,
        patches=len(coords),
        contours=len(contours),
        vertices=sum(map(len, contours)),
    )


def segment_at_once(path: Path) -> list[np.ndarray]:
    """The level read whole, every intermediate image kept whole, the Laplacian in float64."""
    with openslide.OpenSlide(path) as slide:
        level = slide.get_best_level_for_downsample(64)
        size, (w0, h0) = slide.level_dimensions[level], slide.dimensions
        image = np.array(slide.read_region((0, 0), level, size))
    w, h = size
    rgb = image[..., :3].copy()
    for a, b in (((0, 0), (w, 20)), ((0, h - 20), (w, h)), ((0, 0), (20, h)), ((w - 20, 0), (w, h))):
        cv2.rectangle(rgb, a, b, (255, 255, 255), -1)
    laplacian = cv2.convertScaleAbs(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGBA2GRAY), cv2.CV_64F))
    rgb[laplacian <= 15] = 255
    blurred = cv2.medianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1], 7)
    _, mask = cv2.threshold(blurred, 8, 255, cv2.THRESH_BINARY)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8))
    outlines, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    unit = max(1, int(512**2 / (w0 / w * h0 / h)))
    areas = [cv2.contourArea(outline) for outline in outlines]
    for i, parent in enumerate(hierarchy[0, :, 3]):
        if parent >= 0:
            areas[parent] -= areas[i]
    kept = [o for o, area, p in zip(outlines, areas, hierarchy[0, :, 3], strict=True) if p < 0 and area >= unit]
    return [(outline[:, 0] * (w0 / w, h0 / h)).astype(np.int32) for outline in kept]


@pytest.mark.parametrize(("size", "factor"), [((60_000, 40_000), 16), ((12_000, 8_000), 3.19)], ids=["16x", "3.19x"])
def test_segmentation(benchmark, compare, tmp_path, size, factor):
    """Levels of 9.4 Mpx. At 3.19x a whole cell of OpenSlide's must be held to get the same pixels: the worst case."""
    path = make_slide(tmp_path / "slide.svs", *size, fragments=1, levels=(1, factor))

    def ours() -> list[np.ndarray]:
        with SlideImage(path) as slide:
            return segment_tissue(slide, SegmentationSettings()).contours

    def theirs() -> list[np.ndarray]:
        return segment_at_once(path)

    assert all(np.array_equal(one, two) for one, two in zip(ours(), theirs(), strict=True))
    with SlideImage(path) as slide:
        pixels = int(np.prod(slide.level_dimensions[1]))
    group = f"segmentation of a {size[0]} x {size[1]} slide, {factor}x"
    compare(group, ours, theirs, rounds=5, megapixels=round(pixels / 1e6, 2))
    peak = benchmark.extra_info["peak_mb"]
    if peak is not None:
        benchmark.extra_info.update(bytes_per_pixel=round(peak * 1e6 / pixels, 2))
        assert peak * 1e6 <= 8 * pixels
