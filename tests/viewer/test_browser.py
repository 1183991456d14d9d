"""The page in a real browser: headless Chromium on the real slide of the demo.

Needs the package `playwright` and a Chromium: EXAONEPATH_CHROMIUM, or one on the path. Without them, this file says
what it skipped. Chromium resolves no name and reaches no address but this machine's, and every request is checked.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exaonepath.encoders import loading
from exaonepath.files.annotations import read_polygons
from exaonepath.files.embeddings import SlideEmbedding, write_embedding

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("EXAONEPATH_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: the page was not tested in a browser (install chromium, or set EXAONEPATH_CHROMIUM)")
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """The page, open in the browser; notes every request and every error."""

    def __init__(self, page, client) -> None:
        self.page, self.client = page, client
        self.base = f"http://127.0.0.1:{client.port}/{client.token}/"
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    def open(self, rest: str = "") -> Visit:
        self.page.goto(self.base + rest)
        return self.ready()

    def ready(self) -> Visit:
        self.until(
            "app.panes.every((p) => p.slide && p.legend && p.view())"
            "&& document.documentElement.dataset.firstTile && document.title.startsWith(pane.slide.id)"
        )
        return self

    def js(self, expression: str):
        """The value of an expression, in which `app` is the page's object and `pane` its active pane."""
        return self.page.evaluate(
            f"(() => {{ const app = window.exaonepath; const pane = app?.active; return {expression}; }})()"
        )

    def until(self, expression: str, seconds: float = 20) -> None:
        for _ in range(int(seconds * 25)):
            try:
                if self.js(expression):
                    return
            except playwright.Error as exc:  # before the page has loaded
                if "undefined" not in str(exc) and "navigation" not in str(exc):
                    raise
            self.page.wait_for_timeout(40)
        raise AssertionError(f"never true: {expression}; message: {self.page.inner_text('#message')}; {self.errors}")

    def choose(self, mode: str) -> None:
        """Colour patches in this way, and wait for it."""
        self.js("void (pane.legend = null)")
        self.page.select_option("#mode", mode)
        self.until("pane.legend && pane.legend.text !== 'Computing …'")

    def drag(self, points) -> None:
        mouse = self.page.mouse
        mouse.move(*points[0])
        mouse.down()
        for point in points[1:]:
            mouse.move(*point, steps=4)
        mouse.up()

    def on_screen(self, index: int) -> tuple[float, float]:
        """Where the centre of a patch is on the screen."""
        return tuple(
            self.js(
                "(() => { const view = pane.view(), box = pane.osdHost.getBoundingClientRect();"
                "const half = pane.slide.patches.size / 2;"
                f"return [box.left + (pane.coords[{2 * index}] + half - view.x) * view.scale,"
                f"box.top + (pane.coords[{2 * index + 1}] + half - view.y) * view.scale]; }})()"
            )
        )

    def drawn(self, index: int) -> list[int]:
        """The colour that WebGL draws at the centre of a patch, and the one that it was given, as RGB."""
        return self.js(
            "(() => { const layer = pane.layer, gl = layer.gl, keep = layer.opacity; layer.opacity = 1; pane.drawNow();"
            "const view = pane.view(), half = pane.slide.patches.size / 2, found = new Uint8Array(4);"
            f"const x = Math.floor((pane.coords[{2 * index}] + half - view.x) * view.scale);"
            f"const y = Math.floor((pane.coords[{2 * index + 1}] + half - view.y) * view.scale);"
            "gl.readPixels(x, layer.canvas.height - 1 - y, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, found);"
            "layer.opacity = keep;"
            f"return [...found.slice(0, 3), ...pane.colours.slice({4 * index}, {4 * index + 3})]; }})()"
        )


@pytest.fixture(scope="module")
def visiting(browser):
    """`with visiting(client) as visit`: the page in a new window. At its end, nothing may have left the machine."""

    @contextmanager
    def visiting(client, width=1280, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        visit = Visit(context.new_page(), client)
        visit.page.set_default_timeout(20_000)
        try:
            yield visit
            left = [
                url
                for url in visit.requests
                if not url.startswith((visit.base, f"blob:http://127.0.0.1:{client.port}", "data:"))
            ]
            assert not left, left
            assert len(visit.requests) > 10
            assert not visit.errors, visit.errors
        finally:
            context.close()

    return visiting


def test_open_zoom_and_keys(visiting, client):
    with visiting(client) as visit:
        page = visit.open().page
        assert page.title() == "CMU-1-Small-Region – exaonepath"
        assert "Random weights" in page.inner_text(".pane .top")
        assert page.locator("#list button").count() == 2
        visit.until("[...document.querySelectorAll('#list img')].every((image) => image.naturalWidth > 0)")
        assert re.search(r"\d+ µm", page.inner_text(".scale-bar"))
        low = visit.js("pane.magnification()")
        page.mouse.move(600, 400)
        for _ in range(6):
            page.mouse.wheel(0, -200)
        visit.until(f"pane.magnification() > {2 * low}")
        visit.until("pane.osd.world.getItemAt(0).getFullyLoaded()")
        assert any("/tiles/12/" in url for url in visit.requests)
        page.keyboard.press("4")
        visit.until("Math.abs(pane.magnification() - 10) < 0.05")
        assert "10×" in page.inner_text(".scale-bar")
        before = visit.js("pane.place().x")
        page.keyboard.press("ArrowRight")
        visit.until(f"pane.place().x > {before} + 10")
        page.keyboard.press("0")
        visit.until(f"Math.abs(pane.magnification() - {low}) < 0.1 * {low}")
        page.keyboard.press("?")
        assert page.locator("#keys").is_visible()
        page.keyboard.press("Escape")
        page.click("#magnifications button:has-text('20×')")
        visit.until("Math.abs(pane.magnification() - 20) < 0.1")


def test_colours_are_drawn_as_they_were_computed(visiting, client):
    with visiting(client) as visit:
        visit.open()
        modes = visit.js("[...document.getElementById('mode').options].map((option) => option.value)")
        assert modes == ["pca", "pc1", "clusters", "similarity", "attention", "fragments"]
        seen = set()
        patches = [0, 5, 9, 14]
        for mode in ("pca", "pc1", "clusters", "fragments"):
            visit.choose(mode)
            for patch in patches:
                colour = visit.drawn(patch)
                assert np.abs(np.subtract(colour[:3], colour[3:])).max() <= 1, (mode, patch, colour)
            seen.add(visit.js("pane.colours.join()"))
            assert visit.js("app.scatter._data.colour === pane.colours")  # the map has the same colours
        assert len(seen) >= 3
        visit.choose("clusters")
        counts = [int(t) for t in visit.page.locator("#legend .count").all_inner_texts()]
        assert sum(counts) == visit.js("pane.coords.length / 2")
        visit.page.locator("#legend .keys button").nth(1).click()
        assert visit.js("pane.selected") == counts[1]
        visit.page.fill("#opacity", "30")
        assert visit.js("pane.layer.opacity") == pytest.approx(0.3)
        visit.page.uncheck("#show-patches")
        assert not visit.js("app.show.patches")


def test_a_click_finds_similar_patches(visiting, client, slide_encoder, monkeypatch):
    with visiting(client) as visit:
        page = visit.open().page
        visit.choose("similarity")
        assert "Click a patch" in page.inner_text("#legend")
        page.mouse.click(*visit.on_screen(12))
        visit.until("document.querySelectorAll('#similar .tiles img').length === 20")
        assert visit.js("pane.patch") == 12
        visit.until("pane.legend.kind === 'bar'")
        version = client.slide()["version"]
        best = client.json(f"api/slides/{client.slide()['key']}/similar", v=version, patch=12)["matches"]
        texts = page.locator("#similar .cosine").all_inner_texts()
        assert texts == [f"{match['cosine']:.3f}" for match in best]
        visit.until(
            "[...document.querySelectorAll('#similar img')].every((image) => image.complete && image.naturalWidth > 0)"
        )
        page.locator("#similar .tiles button").nth(0).click()
        match = best[0]
        visit.until(f"Math.abs(pane.place().x - {match['x'] + match['size'] / 2}) < 1")
        page.select_option("#scope", "cohort")
        visit.until("document.getElementById('similar').innerText.includes('2 slides')")
        monkeypatch.setattr(loading, "load_slide_encoder", lambda weights, device: slide_encoder)
        visit.choose("attention")
        visit.until("pane.legend.kind === 'bar'")
        assert "Block 2 of 2" in page.inner_text("#legend")
        expected = client.array("attention", "<f4", patch=12)
        colours = np.array(visit.js("[...pane.colours]")).reshape(-1, 4)
        assert (colours[expected >= np.quantile(expected, 0.995), :3] == (253, 231, 37)).all()  # viridis ends in yellow
        page.select_option("#block", "0")
        visit.until("pane.legend.text?.includes('Block 1 of 2')")


def test_the_lasso_links_map_and_slide(visiting, client):
    with visiting(client) as visit:
        page = visit.open().page
        box = page.locator("#map").bounding_box()
        left, top = box["x"], box["y"]
        bottom, middle = top + box["height"] - 2, left + box["width"] / 2
        visit.drag([(left + 2, top + 2), (middle, top + 2), (middle, bottom), (left + 2, bottom)])
        points = np.array(visit.js("[...app.scatter.points]")).reshape(-1, 2)
        marks = np.array(visit.js("[...pane.marks]"))
        centre = visit.js("app.scatter.centre[0]")
        clear = np.abs(points[:, 0] - centre) > 0.02 * np.ptp(points[:, 0])
        assert ((marks == 1) == (points[:, 0] < centre))[clear].all()  # selected are those left of the middle
        assert set(marks.tolist()) == {1, 2}
        assert f"{(marks == 1).sum()} of" in page.inner_text("#selection")
        with page.expect_download() as download:
            page.click("#selection button:has-text('CSV')")
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
        assert [int(row["patch"]) for row in rows] == np.flatnonzero(marks == 1).tolist()
        page.keyboard.press("Escape")
        assert visit.js("pane.selected") == 0
        # The other way: a lasso on the slide around one patch marks its point on the map.
        page.keyboard.press("l")
        x, y = visit.on_screen(20)
        reach = visit.js("pane.layer.cell * pane.view().scale") * 0.6
        visit.drag([(x - reach, y - reach), (x + reach, y - reach), (x + reach, y + reach), (x - reach, y + reach)])
        selected = np.flatnonzero(np.array(visit.js("[...app.scatter._data.mark]")) == 1)
        assert selected.tolist() == [20]
        page.mouse.click(*np.add((left, top), visit.js("app.scatter.pixel(7)")))
        assert visit.js("pane.patch") in np.flatnonzero(np.abs(points - points[7]).max(1) < 0.1 * np.ptp(points))


def test_regions_are_drawn_saved_and_there_after_a_reload(visiting, results, view):
    with view(results, [results / "slides"]) as client, visiting(client) as visit:
        page = visit.open().page
        page.keyboard.press("3")
        visit.until("Math.abs(pane.magnification() - 5) < 0.05")
        page.keyboard.press("d")
        visit.drag([(500, 300), (700, 300), (700, 500), (500, 500), (500, 310)])
        page.keyboard.type("Tumour")
        page.keyboard.press("Tab")
        page.keyboard.type("Tissue")
        assert page.inner_text("#saved") == "not saved"
        page.keyboard.press("Control+s")
        visit.until("!pane.unsaved")
        path = results / "regions" / "CMU-1-Small-Region.geojson"
        (polygon,) = read_polygons(path)
        assert polygon.class_name == "Tissue"
        view_ = visit.js("pane.view()")
        box = visit.js("(({ left, top }) => [left, top])(pane.osdHost.getBoundingClientRect())")
        expected = [
            (view_["x"] + (x - box[0]) / view_["scale"], view_["y"] + (y - box[1]) / view_["scale"])
            for x, y in ((500, 300), (700, 500))
        ]
        corners = polygon.rings[0].min(0), polygon.rings[0].max(0)
        assert np.abs(np.subtract(corners, expected)).max() < 2 / view_["scale"]
        # Everything that the address holds comes back: place, mode, opacity, what is hidden.
        page.keyboard.press("v")
        visit.choose("fragments")
        page.fill("#opacity", "40")
        page.uncheck("#show-outlines")
        page.wait_for_timeout(300)
        place = visit.js("pane.place()")
        page.reload()
        visit.ready()
        visit.until("pane.regions.length === 1")
        assert page.input_value("#regions input") == "Tumour"
        assert page.input_value("#mode") == "fragments"
        assert page.input_value("#opacity") == "40"
        assert not page.is_checked("#show-outlines")
        again = visit.js("pane.place()")
        assert again == pytest.approx(place, rel=1e-3)
        page.click("#regions button[title=Remove]")
        page.keyboard.press("Control+s")
        visit.until("!pane.unsaved")
        assert read_polygons(path) == []


def test_two_slides_and_the_picture(visiting, client):
    with visiting(client) as visit:
        page = visit.open().page
        page.click("#split")
        visit.until("app.panes.length === 2 && app.panes[1].slide && app.panes[1].legend && app.panes[1].view()")
        assert visit.js("app.panes.map((pane) => pane.slide.id)") == ["CMU-1-Small-Region", "second"]
        visit.until("document.title.startsWith('second')")
        page.mouse.click(*visit.on_screen(3))
        visit.until("document.querySelectorAll('#similar .tiles img').length === 20")
        page.wait_for_timeout(300)
        page.reload()
        visit.until("app.panes.length === 2 && app.panes[1].slide && app.panes[1].legend && app.panes[1].view()")
        assert visit.js("app.panes[1].patch") == 3
        with page.expect_download() as download:
            page.keyboard.press("e")
        assert download.value.suggested_filename == "CMU-1-Small-Region-second.png"
        picture = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
        assert picture.shape[1] == pytest.approx(visit.js("document.getElementById('panes').clientWidth"), abs=4)
        left, right = picture[:-24, : picture.shape[1] // 2 - 4], picture[:-24, picture.shape[1] // 2 + 4 :]
        for half in (left, right):
            assert len(np.unique(half.reshape(-1, 3)[::7], axis=0)) > 500  # tissue and colours, not an empty canvas
        page.click("#split")
        visit.until("app.panes.length === 1")


def test_a_slide_that_vanishes_leaves_a_page_that_works(visiting, results, view, monkeypatch):
    monkeypatch.setattr("exaonepath.viewer.slide_pool._CHECK_SECONDS", 0.0)
    path = results / "slides" / "CMU-1-Small-Region.svs"
    with view(results, [results / "slides"]) as client, visiting(client) as visit:
        page = visit.open().page
        path.rename(path.with_name("kept"))
        page.keyboard.press("6")  # tiles that were not loaded yet
        visit.until("document.querySelector('.banner.error')?.innerText.includes('CMU-1-Small-Region.svs')")
        visit.errors.clear()  # the browser reports the tiles that it did not get
        visit.choose("clusters")
        page.locator("#list button").nth(1).click()
        visit.until("pane.slide?.id === 'second' && pane.view() && pane.legend")
        page.locator("#list button").nth(0).click()
        visit.until("pane.slide?.id.startsWith('CMU') && pane.view() && pane.legend")  # its patches, on an empty plane
        visit.choose("clusters")
        colour = visit.drawn(4)
        assert colour[:3] == colour[3:]
        visit.errors.clear()


def test_a_hundred_thousand_patches_of_a_slide_that_is_gone(visiting, tmp_path, view):
    """The plane in place of a large slide costs a few tiles, and every patch is drawn, marked and found."""
    side, size = 320, 256
    number = np.arange(side * side)
    coords = np.stack([number % side * size, number // side * size], 1).astype(np.int32)
    vectors = np.random.default_rng(0).normal(size=(side * side, 8)).astype(np.float32)
    embedding = SlideEmbedding(vectors.mean(0), vectors, coords, (number % 7).astype(np.int32))
    (tmp_path / "embeddings").mkdir()
    write_embedding(tmp_path / "embeddings" / "large.h5", embedding, {"slide_path": str(tmp_path / "gone.svs")})
    with view(tmp_path) as client, visiting(client) as visit:
        visit.open()
        visit.until("pane.osd.world.getItemAt(0).getFullyLoaded()")
        assert visit.js("pane.osd.tileCache.numTilesLoaded()") <= 2  # of the slide, and of the navigator
        assert "gone.svs" in visit.page.inner_text(".banner.error")
        visit.choose("fragments")
        for patch in (0, 51_234, side * side - 1):
            colour = visit.drawn(patch)
            assert np.abs(np.subtract(colour[:3], colour[3:])).max() <= 1
        visit.page.mouse.click(*visit.on_screen(51_234))
        visit.until("pane.patch === 51234")
        visit.page.locator("#legend .keys button").nth(0).click()
        assert visit.js("pane.selected") == (number % 7 == 0).sum()
        visit.errors.clear()  # the thumbnail of the slide that is gone


def test_a_tablet(visiting, client):
    with visiting(client, 820, 1180, has_touch=True, is_mobile=True, device_scale_factor=2) as visit:
        page = visit.open().page
        assert visit.js("document.documentElement.scrollWidth") <= 820
        page.tap("#toggle-panel")
        page.wait_for_timeout(100)
        assert not page.locator("#panel").is_visible()
        page.touchscreen.tap(*visit.on_screen(10))
        visit.until("pane.patch === 10")
        page.tap("#toggle-panel")
        visit.until("document.querySelectorAll('#similar .tiles img').length === 20")


@pytest.mark.parametrize("width", [1024, 1280, 1920])
def test_nothing_is_cut_off(visiting, client, width):
    with visiting(client, width, 720) as visit:
        visit.open()
        assert visit.js("document.documentElement.scrollWidth") <= width
        for button in visit.page.locator("header button").all():
            box = button.bounding_box()
            assert box["x"] >= 0, button.inner_text()
            assert box["x"] + box["width"] <= width, button.inner_text()


def test_every_control_has_a_name_and_the_keyboard_reaches_it(visiting, client):
    with visiting(client) as visit:
        page = visit.open().page
        unnamed = visit.js(
            "[...document.querySelectorAll(`button, select, input, [tabindex='0']`)]"
            ".filter((e) => !(e.labels?.length ||"
            "e.getAttribute('aria-label') || e.innerText?.trim() || e.title || e.placeholder)).map((e) => e.outerHTML)"
        )
        assert unnamed == []
        reached = set()
        for _ in range(45):
            page.keyboard.press("Tab")
            reached.add(
                visit.js(
                    "document.activeElement.id || document.activeElement.innerText || document.activeElement.className"
                )
            )
        assert {"mode", "opacity", "map", "scope", "Fit", "split"} - reached <= {"Fit"}
