"""The slide viewer against what else would do the same job.

Targets: the first picture of the demo's slide within 2 s of the command, a tile within 10 ms, 100,000 patches coloured
again within 100 ms, similarity to 1,000,000 patches within 1 s on two cores.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from urllib.parse import urlsplit

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from exaonepath.memory import available_host_memory
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide
from exaonepath.viewer.tiles import TILE, Overviews, Pyramid, encode_jpeg, tile_pixels
from exaonepath.viz.values.vectors import UnitRows, VectorStore, most_similar

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EXAONEPATH_TEST_DATA", ROOT.parent / "shared" / "data"))
PATCHES, WIDTH = 1_000_000, 768
COLOURED = 100_000


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """The demo's slide, in a folder of its own; a synthetic one of its size where it is absent."""
    folder = tmp_path_factory.mktemp("slides")
    real = DATA / "slides" / "CMU-1-Small-Region.svs"
    if real.is_file():
        return Path(shutil.copy(real, folder))
    return make_slide(folder / "synthetic.svs", 2220, 2967, fragments=2, seed=3)


def first_picture(slide: Path, out: Path) -> float:
    """Seconds from the start of the command to the bytes of a tile that shows the whole slide."""
    began = perf_counter()
    command = [sys.executable, "-m", "exaonepath", "view", str(out), str(slide), "--no-browser"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert program.stdout is not None
        url = urlsplit(program.stdout.readline().strip())

        def get(path: str) -> bytes:
            connection = http.client.HTTPConnection(url.netloc, timeout=30)
            connection.request("GET", url.path + path)
            answer = connection.getresponse()
            assert answer.status == 200, path
            return answer.read()

        get("")
        key = json.loads(get("api/slides"))["slides"][0]["key"]
        detail = json.loads(get(f"api/slides/{key}"))
        assert get(f"pixels/{key}/{detail['slide']['fingerprint']}/tiles/8/0_0.jpg").startswith(b"\xff\xd8")
        return perf_counter() - began
    finally:
        program.terminate()
        program.wait(20)


def test_first_picture(compare, slide, tmp_path):
    """Baseline: a Python that imports OpenSlide and makes a thumbnail, which has no server and reads no results."""
    picture = str(tmp_path / "a.jpg")
    code = f"import openslide; openslide.OpenSlide({str(slide)!r}).get_thumbnail((254, 254)).save({picture!r})"

    def plain() -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    plain()
    compare("viewer: first picture", lambda: first_picture(slide, tmp_path), plain, rounds=5)


def test_tile(compare, slide):
    """All tiles of the three highest levels, read and encoded; baseline: OpenSlide's DeepZoomGenerator and Pillow."""
    with SlideImage(slide) as image, openslide.OpenSlide(str(slide)) as plain:
        pyramid, overviews = Pyramid(*image.dimensions), Overviews()
        generator = DeepZoomGenerator(plain, tile_size=TILE, overlap=1)
        places = [
            (level, column, row)
            for level in range(pyramid.top - 2, pyramid.top + 1)
            for column in range(-(-pyramid.size(level)[0] // TILE))
            for row in range(-(-pyramid.size(level)[1] // TILE))
        ]
        assert generator.level_count == pyramid.top + 1
        level, column, row = places[-5]
        theirs = np.asarray(generator.get_tile(level, (column, row)).convert("RGB"))
        assert (tile_pixels(image, "a", overviews, level, column, row) == theirs).all()
        seconds: list[float] = []

        def ours() -> None:
            for place in places:
                began = perf_counter()
                encode_jpeg(tile_pixels(image, "a", overviews, *place))
                seconds.append(perf_counter() - began)

        def baseline() -> None:
            for level, column, row in places:
                generator.get_tile(level, (column, row)).save(io.BytesIO(), "JPEG", quality=85)

        compare(f"viewer: {len(places)} tiles", ours, baseline, rounds=5)
        print(f"\na tile: median {1e3 * median(seconds):.1f} ms, slowest {1e3 * max(seconds):.1f} ms")


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    """A million random unit vectors, mapped from a file as the viewer maps them."""
    free = available_host_memory()
    if free is not None and free < 3 * 4 * PATCHES * WIDTH:
        pytest.skip("needs 9 GB of memory")
    path = tmp_path_factory.mktemp("vectors") / "unit.f32"
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(PATCHES // 10_000):
            rows = generator.standard_normal((10_000, WIDTH), np.float32)
            file.write((rows / np.linalg.norm(rows, axis=1, keepdims=True)).data)
    yield UnitRows(np.asarray(np.memmap(path, np.float32, "r", shape=(PATCHES, WIDTH))), np.ones(PATCHES, bool))
    path.unlink()


def test_similarity(compare, million):
    """The 20 most similar of a million patches; baseline: one product of NumPy and a full sort."""
    store = VectorStore()
    query = million.rows[12_345]

    def ours() -> list[int]:
        return [match.row for match in most_similar(store, [million], query, 20, (0, 12_345))]

    def baseline() -> list[int]:
        return np.argsort(-(million.rows @ query), kind="stable")[1:21].tolist()

    assert ours() == baseline()
    compare("viewer: similarity", ours, baseline, rounds=5, patches=PATCHES)
    hundred = UnitRows(million.rows[:100_000], million.usable[:100_000])
    seconds = []
    for _ in range(9):
        began = perf_counter()
        most_similar(store, [hundred], query, 20)
        seconds.append(perf_counter() - began)
    print(f"\nthe 20 most similar of 100,000 patches: {1e3 * median(seconds):.0f} ms")
    store.close()


RECOLOUR = """async (n) => {
  const { PatchLayer } = await import(location.pathname + "page/patch-layer.js");
  const { ofNumbers } = await import(location.pathname + "page/colours.js");
  const canvas = document.createElement("canvas");
  canvas.style.width = "1000px"; canvas.style.height = "800px"; canvas.style.position = "fixed";
  document.body.append(canvas);
  const side = Math.ceil(Math.sqrt(n)), corners = new Float32Array(2 * n), values = new Float32Array(n);
  for (let i = 0; i < n; i++) { corners[2 * i] = (i % side) * 256; corners[2 * i + 1] = Math.floor(i / side) * 256; }
  const layer = new PatchLayer(canvas), view = { x: 0, y: 0, scale: 800 / (side * 256) }, pixel = new Uint8Array(4);
  layer.setPatches(corners, 256, 0);
  const times = [], plain = [], paint = document.createElement("canvas").getContext("2d");
  paint.canvas.width = 1000; paint.canvas.height = 800;
  for (let round = 0; round < 7; round++) {
    for (let i = 0; i < n; i++) values[i] = Math.sin(i + round);
    let began = performance.now();
    const colours = ofNumbers(values, -1, 1, "viridis");
    layer.setColours(colours);
    layer.draw(view, true);
    layer.gl.readPixels(9, 9, 1, 1, layer.gl.RGBA, layer.gl.UNSIGNED_BYTE, pixel);  // waits until it is drawn
    times.push(performance.now() - began);
    began = performance.now();
    for (let i = 0; i < n; i++) {
      paint.fillStyle = `rgb(${colours[4 * i]},${colours[4 * i + 1]},${colours[4 * i + 2]})`;
      paint.fillRect(corners[2 * i] * view.scale, corners[2 * i + 1] * view.scale, 256 * view.scale, 256 * view.scale);
    }
    paint.getImageData(9, 9, 1, 1);
    plain.push(performance.now() - began);
  }
  const middle = (list) => list.sort((a, b) => a - b)[list.length >> 1];
  return [middle(times), middle(plain)];
}"""


def test_recolouring(slide, tmp_path):
    """In Chromium with software rendering; baseline: a canvas of two dimensions. Printed only."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("EXAONEPATH_CHROMIUM") or shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--use-angle=swiftshader"]
    command = [sys.executable, "-m", "exaonepath", "view", str(tmp_path), str(slide), "--no-browser"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    began = perf_counter()
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert program.stdout is not None
        url = program.stdout.readline().strip()
        announced = perf_counter() - began
        with playwright.sync_playwright() as browser_program:
            browser = browser_program.chromium.launch(executable_path=found, args=flags)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(url)
            while not (drawn := page.evaluate("document.documentElement.dataset.firstTile")):
                page.wait_for_timeout(20)
            ours, plain = page.evaluate(RECOLOUR, COLOURED)
            browser.close()
    finally:
        program.terminate()
        program.wait(20)
    print(
        f"\nfirst picture: address after {announced:.2f} s, first tile drawn {float(drawn) / 1e3:.2f} s after the page "
        f"was asked for\nrecolouring {COLOURED:,} patches: {ours:.0f} ms; a 2D canvas takes {plain:.0f} ms"
    )
