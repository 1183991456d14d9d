"""Pictures of slides: the right pixels, bad tiles, slides that vanish or are replaced, many clients at once."""

from __future__ import annotations

import io
import itertools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import SlideOpenError, SlideReadError
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide
from exaonepath.viewer import slide_pool
from exaonepath.viewer.slide_pool import SlidePool
from exaonepath.viewer.tiles import OVERLAP, TILE, Overviews, Pyramid, tile_pixels
from exaonepath.viz.values.library import Entry


def decoded(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


@pytest.mark.parametrize("size", [(1, 1), (254, 254), (255, 254), (256, 1), (1000, 3), (2220, 2967), (99_999, 70_001)])
def test_the_tiles_of_a_level_cover_it_once(size):
    pyramid = Pyramid(*size)
    assert pyramid.size(pyramid.top) == size
    assert pyramid.size(0) == (1, 1)
    for level in range(pyramid.top + 1):
        width, height = pyramid.size(level)
        for side, axis in ((width, 0), (height, 1)):
            ends, number = [], 0
            while (box := pyramid.box(level, *((number, 0) if axis == 0 else (0, number)))) is not None:
                ends.append((box[axis], box[axis + 2]))
                number += 1
            assert ends[0][0] == 0
            assert ends[-1][1] == side
            for (_, end), (start, _) in itertools.pairwise(ends):
                assert end - start == 2 * OVERLAP
            assert number == -(-side // TILE)


def test_a_tile_of_the_highest_level_is_the_slide_itself(made):
    with SlideImage(next((made / "slides").glob("CMU*"))) as slide:
        pyramid = Pyramid(*slide.dimensions)
        left, top, right, bottom = pyramid.box(pyramid.top, 3, 4)
        expected, _ = slide.read_rgb((left, top), 0, (right - left, bottom - top))
        assert (tile_pixels(slide, "a", Overviews(), pyramid.top, 3, 4) == expected).all()


def test_tiles_of_every_level_show_what_lies_there(made):
    """Each tile, blown up to its place, is close to the slide shrunk to that level; nothing is shifted."""
    with SlideImage(made / "slides" / "second.svs") as slide:
        pyramid, overviews = Pyramid(*slide.dimensions), Overviews()
        whole, _ = slide.read_rgb((0, 0), 0, slide.dimensions)
        for level in range(5, pyramid.top):
            width, height = pyramid.size(level)
            small = np.asarray(Image.fromarray(whole).resize((width, height), Image.Resampling.BOX)).astype(int)
            for column in range(-(-width // TILE)):
                for row in range(-(-height // TILE)):
                    left, top, right, bottom = pyramid.box(level, column, row)
                    tile = tile_pixels(slide, "a", overviews, level, column, row).astype(int)
                    wanted = small[top:bottom, left:right]
                    assert tile.shape == wanted.shape
                    assert np.abs(tile - wanted).mean() < 4, (level, column, row)


def test_a_slide_without_a_pyramid_is_read_once_for_all_low_levels(tmp_path, monkeypatch):
    Image.fromarray(np.full((1500, 2000, 3), 200, np.uint8)).save(tmp_path / "flat.png")
    with SlideImage(tmp_path / "flat.png", mpp=0.5) as slide:
        read = []
        monkeypatch.setattr(
            slide._reader, "read_rgb", lambda *a: read.append(a[2]) or (np.zeros((a[2][1], a[2][0], 3), np.uint8), 0.0)
        )
        overviews = Overviews()
        for level in range(8):
            tile_pixels(slide, "a", overviews, level, 0, 0)
        assert len(slide.level_dimensions) == 1
        assert not read  # all of them from the overview


def test_pixels_outside_the_slide_and_without_data_are_white(made, client):
    slide = client.slide()
    base = f"pixels/{slide['key']}/{slide['slide']['fingerprint']}/patches"
    width, height = slide["slide"]["width"], slide["slide"]["height"]
    status, headers, body = client.get(f"{base}/{width - 10}_{height - 10}_256_128.jpg")
    assert status == 200
    assert headers["content-type"] == "image/jpeg"
    assert decoded(body)[40:, 40:].min() > 240
    assert client.get(f"{base}/{width}_0_256_128.jpg")[0] == 404
    assert client.get(f"{base}/0_0_99999_128.jpg")[0] == 404
    assert client.get(f"{base}/0_0_256_9999.jpg")[0] == 404


def test_pictures_may_be_cached_for_ever_and_their_addresses_name_the_file(client):
    slide = client.slide()
    fingerprint = slide["slide"]["fingerprint"]
    for name in ("tiles/12/0_0.jpg", "tiles/9/0_0.jpg", "thumbnail.jpg", "patches/900_900_256_112.jpg"):
        status, headers, body = client.get(f"pixels/{slide['key']}/{fingerprint}/{name}")
        assert status == 200
        assert "immutable" in headers["cache-control"]
        assert decoded(body).size
        other = fingerprint[:-1] + ("0" if fingerprint[-1] != "0" else "1")
        assert client.get(f"pixels/{slide['key']}/{other}/{name}")[0] in (404, 409)
    assert max(decoded(client.get(f"thumbnails/{slide['key']}.jpg")[2]).shape) == 224


def test_a_bad_tile_is_grey_and_counted(results, view, monkeypatch):
    original = SlideImage.read_rgb

    def read_rgb(self, location, level, size):
        if level == 0 and location[0] < 600 < location[0] + size[0] and location[1] < 300:
            raise SlideReadError("a damaged tile")
        return original(self, location, level, size)

    monkeypatch.setattr(SlideImage, "read_rgb", read_rgb)
    with view(results, [results / "slides"]) as client:
        slide = client.slide()
        base = f"pixels/{slide['key']}/{slide['slide']['fingerprint']}"
        for _ in range(2):  # counted once, however often it is asked for
            status, headers, body = client.get(f"{base}/tiles/12/2_0.jpg")
            assert status == 200
            assert headers["cache-control"] == "no-store"  # it may be readable later
            tile = decoded(body)
            assert np.abs(tile - tile.mean(2, keepdims=True)).max() < 6
        good = client.get(f"{base}/tiles/12/4_4.jpg")
        assert "immutable" in good[1]["cache-control"]
        assert client.json(f"api/slides/{slide['key']}/state")["bad_tiles"] == 1
        assert client.slide()["bad_tiles"] == 1
        status, headers, _ = client.get(f"{base}/patches/550_10_256_64.jpg")
        assert (status, headers["cache-control"]) == (200, "no-store")
        monkeypatch.undo()
        assert "immutable" in client.get(f"{base}/tiles/12/2_0.jpg")[1]["cache-control"]


def test_a_slide_that_vanishes_and_comes_back(results, view, monkeypatch):
    monkeypatch.setattr(slide_pool, "_CHECK_SECONDS", 0.0)
    path = next((results / "slides").glob("CMU*"))
    kept = path.with_name("kept")
    with view(results, [results / "slides"]) as client:
        slide = client.slide()
        base = f"pixels/{slide['key']}/{slide['slide']['fingerprint']}"
        assert client.get(f"{base}/tiles/12/0_0.jpg")[0] == 200
        path.rename(kept)
        status, _, body = client.get(f"{base}/tiles/12/1_1.jpg")
        assert status == 410
        assert b"error" in body
        state = client.json(f"api/slides/{slide['key']}/state")
        assert path.name in state["error"]
        assert state["fingerprint"] is None
        detail = client.slide()  # the page is not dead: the patches are still there
        assert detail["slide"] is None
        assert path.name in detail["slide_error"]
        assert len(client.array("coords", "<i4")) == 2 * detail["patches"]["count"] > 0
        assert client.slide(client.json("api/slides")["slides"][1]["key"])["slide"]  # nor are the others

        kept.rename(path)
        assert client.json(f"api/slides/{slide['key']}/state")["error"] is None
        assert client.get(f"{base}/tiles/12/1_1.jpg")[0] == 200

        shutil.copyfile(results / "slides" / "second.svs", path)
        statuses = [client.get(f"{base}/tiles/12/2_2.jpg")[0] for _ in range(2)]
        assert set(statuses) <= {409, 410}
        assert 200 not in statuses
        state = client.json(f"api/slides/{slide['key']}/state")
        assert state["fingerprint"] not in (None, slide["slide"]["fingerprint"])
        assert [b["kind"] for b in client.slide()["banners"]] == ["random", "slide"]  # results of another file


def test_fifty_clients_at_once(client):
    slide = client.slide()
    base = f"pixels/{slide['key']}/{slide['slide']['fingerprint']}"
    paths = [f"{base}/tiles/12/{x}_{y}.jpg" for x in range(5) for y in range(4)]
    paths += ["api/slides", f"api/slides/{slide['key']}", f"thumbnails/{slide['key']}.jpg", "page/main.js"]
    paths += [f"api/slides/{slide['key']}/{name}?v={slide['version']}" for name in ("coords", "colours", "clusters")]
    alone = {path: client.get(path) for path in paths}
    wrong: list[str] = []

    def visit(number: int) -> None:
        for path in paths[number % len(paths) :] + paths[: number % len(paths)]:
            status, _, body = client.get(path)
            if status != 200 or body != alone[path][2]:
                wrong.append(f"{path}: {status}")

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(visit, range(50)))
    assert not wrong, wrong[:3]


@pytest.fixture(scope="module")
def many_slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    first = make_slide(folder / "0.tif", 300, 260, fragments=1, holes=False)
    paths = [first] + [folder / f"{n}.tif" for n in range(1, 6)]
    for path in paths[1:]:
        shutil.copyfile(first, path)
    return [Entry(f"{n:016x}", str(n), {}, path) for n, path in enumerate(paths)]


def test_the_pool_is_bounded_and_closes_nothing_that_is_used(many_slides):
    pool = SlidePool(limit=2)
    with pool.use(many_slides[0]) as held:
        for entry in many_slides[1:]:
            with pool.use(entry) as slide:
                assert slide.dimensions == (300, 260)
            assert len(pool) <= 3
        held.read_region((0, 0), 0, (8, 8))  # would raise SlideReadError if it had been closed
    for entry in many_slides:
        with pool.use(entry):
            pass
    assert len(pool) <= 2
    with pool.use(many_slides[0]) as held:
        pool.close()
        held.read_region((0, 0), 0, (8, 8))
    with pytest.raises(SlideReadError):
        held.read_region((0, 0), 0, (8, 8))
    assert len(pool) == 0


def test_a_slide_is_opened_once_for_many_threads(many_slides, monkeypatch):
    opened, original = [], SlideImage.__init__

    def counted(self, *args, **kwargs):
        opened.append(args)
        original(self, *args, **kwargs)

    monkeypatch.setattr(SlideImage, "__init__", counted)
    pool, barrier = SlidePool(), threading.Barrier(12)

    def use(_):
        barrier.wait()
        with pool.use(many_slides[0]) as slide:
            return slide.read_region((0, 0), 0, (4, 4)).sum()

    with ThreadPoolExecutor(12) as threads:
        assert len(set(threads.map(use, range(12)))) == 1
    assert len(opened) == 1
    pool.close()


def test_a_slide_that_is_missing_is_an_error_each_time(many_slides, tmp_path):
    pool = SlidePool()
    entry = Entry("0" * 16, "gone", {}, tmp_path / "gone.svs")
    for _ in range(2):
        with pytest.raises(SlideOpenError), pool.use(entry):
            pass
    shutil.copyfile(many_slides[0].given, tmp_path / "gone.svs")
    with pool.use(entry) as slide:
        assert slide.dimensions == (300, 260)
    pool.close()
