"""The overview picture on slides of many shapes."""

from __future__ import annotations

import builtins
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import BackendError, ExaonePathError, OutputError, SettingsError
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.grid import patch_grid
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.synthetic import make_slide
from exaonepath.viz import draw_overview
from exaonepath.viz.layout import arrange

DPI = 50


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> dict[str, SlideImage]:
    folder = tmp_path_factory.mktemp("slides")
    make_slide(folder / "usual.svs", 2400, 1600, fragments=2, seed=1, levels=(1, 8))
    make_slide(folder / "wide.svs", 8000, 600, fragments=3, holes=False, seed=2, levels=(1, 4))
    make_slide(
        folder / "tall.tif", 600, 8000, fragments=3, holes=False, seed=2, levels=(1, 4), mpp=None, vendor="generic"
    )
    make_slide(folder / "empty.svs", 700, 500, fragments=0)
    return {path.stem: SlideImage(path) for path in sorted(folder.iterdir())}


def patches(slide: SlideImage, step: int) -> tuple:
    tissue = segment_tissue(slide)
    coords = patch_grid(tissue.contours, tissue.holes, 128, (step, step)).coords
    phase = coords @ np.random.default_rng(0).normal(size=(2, 12)) / 300
    return tissue, coords, np.sin(phase).astype(np.float32)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(("name", "step"), [("usual", 128), ("usual", 40), ("wide", 128), ("tall", 200)])
def test_picture_shows_slide_and_colours(slides, tmp_path, name, step):
    tissue, coords, embedding = patches(slides[name], step)
    assert len(coords) > 5
    path = draw_overview(slides[name], tissue, coords, 128, embedding, tmp_path / "o.png", caption="x " * 90, dpi=DPI)
    assert path == tmp_path / "o.png"
    shown = pixels(path)
    assert 350 < shown.shape[0] < 900
    assert 400 < shown.shape[1] < 900
    # H&E alone has no green; the colours of the embeddings do.
    assert (shown[..., 1] > shown[..., 0] + 15).sum() > 300
    assert list(tmp_path.iterdir()) == [path]


def test_no_tissue_is_a_picture_too(slides, tmp_path):
    none = np.zeros((0, 2), np.int32)
    path = draw_overview(slides["empty"], ([], []), none, 128, np.zeros((0, 12)), tmp_path / "o.png", dpi=DPI)
    shown = pixels(path)
    assert shown.shape[0] < 0.8 * shown.shape[1]
    assert (shown.sum(axis=2) < 200).sum() > 50  # the text
    path = draw_overview(slides["tall"], ([], []), none, 128, np.zeros((0, 12)), tmp_path / "t.png", dpi=DPI)
    assert pixels(path).std() > 5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_patches_and_equal_ones(slides, tmp_path, n):
    tissue, coords, embedding = patches(slides["usual"], 300)
    draw_overview(slides["usual"], tissue, coords[:n], 128, embedding[:n], tmp_path / "a.png", dpi=DPI)
    draw_overview(slides["usual"], tissue, coords[:n], 128, embedding[:n] * 0, tmp_path / "b.png", dpi=DPI)


def test_patches_beyond_the_slide_and_broken_embeddings(slides, tmp_path):
    tissue, coords, embedding = patches(slides["usual"], 200)
    coords, embedding = coords.copy(), embedding.copy()
    coords[0], coords[1] = (-100, -100), (2390, 1590)
    embedding[2] = np.nan
    draw_overview(slides["usual"], tissue, coords, 128, embedding, tmp_path / "a.png", dpi=DPI)
    draw_overview(slides["usual"], tissue, coords, 128, embedding * np.nan, tmp_path / "b.png", dpi=DPI)
    draw_overview(slides["usual"], tissue, coords[:2], 128, embedding[:2], tmp_path / "c.png", dpi=DPI)


def test_given_colours_are_used(slides, tmp_path):
    tissue, coords, embedding = patches(slides["usual"], 128)
    green = np.tile(np.array([0, 200, 0], np.uint8), (len(coords), 1))
    path = draw_overview(
        slides["usual"], tissue, coords, 128, embedding, tmp_path / "o.png", colors=green, title="a $b_", dpi=DPI
    )
    shown = pixels(path)
    assert ((shown[..., 1] > shown[..., 0] + 40) & (shown[..., 1] > shown[..., 2] + 40)).sum() > 3000


def test_same_input_same_file_and_threads_do_not_disturb_each_other(slides, tmp_path):
    tissue, coords, embedding = patches(slides["usual"], 200)
    paths = [tmp_path / f"{i}.png" for i in range(3)]

    def draw(path: Path) -> None:
        draw_overview(slides["usual"], tissue, coords, 128, embedding, path, title="one", dpi=DPI)

    draw(paths[0])
    threads = [threading.Thread(target=draw, args=(path,)) for path in paths[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1


def test_failure_leaves_what_was_there(slides, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    tissue, coords, embedding = patches(slides["usual"], 300)
    target = tmp_path / "o.png"
    target.write_bytes(b"before")

    def full_disk(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        draw_overview(slides["usual"], tissue, coords, 128, embedding, target, dpi=DPI)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_arrays_that_do_not_fit_are_refused(slides, tmp_path):
    slide, out = slides["usual"], tmp_path / "o.png"
    tissue, coords, embedding = patches(slide, 300)
    with pytest.raises(SettingsError, match="embedding must be"):
        draw_overview(slide, tissue, coords, 128, embedding[1:], out)
    with pytest.raises(SettingsError, match="coords must be"):
        draw_overview(slide, tissue, coords[:, :1], 128, embedding, out)
    with pytest.raises(SettingsError, match="colors must be"):
        draw_overview(slide, tissue, coords, 128, embedding, out, colors=np.zeros((1, 3), np.uint8))
    with pytest.raises(SettingsError, match="patch_size_level0"):
        draw_overview(slide, tissue, coords, 0, embedding, out)
    with pytest.raises(SettingsError, match="contours"):
        draw_overview(slide, (tissue.contours, []), coords, 128, embedding, out)
    assert not out.exists()


def test_without_matplotlib_the_error_says_what_to_install(slides, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ExaonePathError, match=r"pip install \"exaonepath\[viz\]\"") as caught:
        draw_overview(slides["empty"], ([], []), np.zeros((0, 2)), 128, np.zeros((0, 4)), tmp_path / "o.png")
    assert isinstance(caught.value, BackendError)


@pytest.mark.parametrize("aspect", [0.01, 0.3, 0.7, 1.09, 1.11, 2.0, 3.0, 9.0, 100.0])
@pytest.mark.parametrize("details", [True, False])
def test_panels_lie_inside_the_figure_and_apart(aspect, details):
    layout = arrange(aspect, 3, details)
    boxes = [layout.slide, layout.embedding]
    if details:
        boxes += [layout.scatter, *(box for group in layout.tiles for box in group)]
    for box in boxes:
        assert min(box.left, box.top, box.width, box.height) > 0
        assert box.left + box.width <= layout.size[0] + 1e-9
        assert box.top + box.height <= layout.caption + 1e-9
    assert layout.caption < layout.size[1] < 16
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            apart_x = a.left + a.width <= b.left or b.left + b.width <= a.left
            assert apart_x or a.top + a.height <= b.top or b.top + b.height <= a.top
