"""Patching: the grid against one pointPolygonTest per patch, segmentation against the whole level at once.

Baselines are the algorithm as EXAONE Path's patching is described to run it, written plainly. Both sides run in one
process, their results are compared before anything is timed, and segmentation opens the slide afresh each time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from exaonepath.files.outlines import Excluded
from exaonepath.files.patches import read_contours
from exaonepath.reference.patches import grid_by_points, segment_at_once
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.exclusion import region_of_patches
from exaonepath.slides.patches.grid import patch_grid
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
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


# Slides that give about 57,000 and 30,000 patches; the second has longer outlines for each patch.
@pytest.mark.parametrize(
    ("patches", "size", "fragments"), [(57_000, (104_000, 57_000), 3), (30_000, (73_000, 42_000), 1)]
)
def test_grid(compare, full, patches, size, fragments):
    if patches > 30_000 and not full:
        pytest.skip("EXAONEPATH_BENCH=full runs this size")
    contours, holes = tissue(patches, *size, fragments)
    expected, owners = grid_by_points(contours, holes, 256, (256, 256))
    assert 0.9 * patches < len(expected) < 1.1 * patches

    def ours():
        return patch_grid(contours, holes, 256, (256, 256))

    coords, contour_index = ours()
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(contour_index, owners)
    compare(
        f"grid of {patches} patches",
        ours,
        lambda: grid_by_points(contours, holes, 256, (256, 256)),
        rounds=2,
        patches=len(coords),
        contours=len(contours),
        vertices=sum(map(len, contours)),
    )


@pytest.mark.parametrize(("size", "factor"), [((60_000, 40_000), 16), ((12_000, 8_000), 3.19)], ids=["16x", "3.19x"])
def test_segmentation(benchmark, compare, tmp_path, size, factor):
    """Levels of 9.4 Mpx. At 3.19x a whole cell of OpenSlide's must be held to get the same pixels: the worst case."""
    path = make_slide(tmp_path / "slide.svs", *size, fragments=1, levels=(1, factor))

    def ours() -> list[np.ndarray]:
        with SlideImage(path) as slide:
            return segment_tissue(slide, SegmentationSettings()).contours

    def theirs() -> list[np.ndarray]:
        with openslide.OpenSlide(path) as slide:
            level = slide.get_best_level_for_downsample(64)
            (w, h), (w0, h0) = slide.level_dimensions[level], slide.dimensions
            image = np.array(slide.read_region((0, 0), level, (w, h)))
        return segment_at_once(image, (w0 / w, h0 / h), SegmentationSettings())[0]

    assert all(np.array_equal(one, two) for one, two in zip(ours(), theirs(), strict=True))
    with SlideImage(path) as slide:
        pixels = int(np.prod(slide.level_dimensions[1]))
    group = f"segmentation of a {size[0]} x {size[1]} slide, {factor}x"
    compare(group, ours, theirs, rounds=5, megapixels=round(pixels / 1e6, 2))
    # In a process of its own: in this one, what earlier benchmarks left in allocators weighs as much as segmentation.
    peaks = {name: fresh_peak_mb(path, call) for name, call in (("peak_mb", OURS), ("baseline_peak_mb", THEIRS))}
    benchmark.extra_info.update(peaks)
    if peaks["peak_mb"] is not None:
        benchmark.extra_info.update(bytes_per_pixel=round(peaks["peak_mb"] * 1e6 / pixels, 2))
        assert peaks["peak_mb"] * 1e6 <= 8 * pixels


def test_storing_contours(compare, tmp_path):
    """What it costs that the contours are stored, in the patches file and as GeoJSON."""
    path = make_slide(tmp_path / "slide.svs", 60_000, 40_000, fragments=4)
    with SlideImage(path) as slide:

        def run(stored: bool) -> int:
            out = tmp_path / str(stored)
            return len(patchfy(slide, out, save_mask=False, overwrite=True, save_contours=stored)[1])

        patches = run(True)
        points = sum(map(len, read_contours(tmp_path / "True" / "patches" / "slide.h5").contours))
        compare(
            "patchfy with the contours stored, against without",
            lambda: run(True),
            lambda: run(False),
            rounds=5,
            patches=patches,
            points=points,
        )


def test_exclusion(compare):
    """Which of 60,000 patches lie in 200 regions, against one pointPolygonTest for each pair whose boxes meet."""
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(0, 76_800, 256), np.arange(0, 51_200, 256)), axis=-1).reshape(-1, 2)
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    excluded = []
    for centre in rng.uniform((0, 0), (76_800, 51_200), (200, 2)):
        radius = rng.uniform(300, 4000) * (1 + 0.2 * np.sin(rng.integers(3, 9) * angles))
        ring = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        excluded.append(Excluded([ring.astype(np.int32)], "excluded"))

    def theirs() -> np.ndarray:
        centres = coords + 128.0
        result = np.full(len(coords), -1)
        for index, region in enumerate(excluded):
            low, high = region.rings[0].min(0), region.rings[0].max(0)
            for at in np.flatnonzero((result < 0) & ((centres >= low) & (centres <= high)).all(1)):
                if cv2.pointPolygonTest(region.rings[0], tuple(centres[at]), False) > 0:
                    result[at] = index
        return result

    np.testing.assert_array_equal(region_of_patches(coords, 256, excluded), theirs())
    compare(
        "patches in 200 excluded regions",
        lambda: region_of_patches(coords, 256, excluded),
        theirs,
        rounds=3,
        patches=len(coords),
        left_out=int((theirs() >= 0).sum()),
    )


PREPARE = """
import re, sys
import subprocess
import sys
from pathlib import Path
import numpy as np, openslide
from exaonepath.patches import SegmentationSettings, SlideImage, segment_tissue
from exaonepath.reference.patches import segment_at_once
"""
OURS = """
with SlideImage(sys.argv[1]) as slide:
    segment_tissue(slide, SegmentationSettings())
"""
THEIRS = """
with openslide.OpenSlide(sys.argv[1]) as slide:
    level = slide.get_best_level_for_downsample(64)
    image = np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]))
segment_at_once(image, slide_scale, SegmentationSettings())
""".replace("slide_scale", "(16.0, 16.0)")
MEASURE = """
status = Path("/proc/self/status")
Path("/proc/self/clear_refs").write_text("5")
before = int(re.search(r"VmRSS:\\s+(\\d+)", status.read_text())[1])
{work}
print((int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) - before) * 1024 / 1e6)
"""


def fresh_peak_mb(path: Path, work: str) -> float | None:
    """Growth of resident memory in MB while a new process runs `work`; None where /proc does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    code = PREPARE + MEASURE.format(work=work)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 1)
