"""Values of patches over slides: pixels have exactly the colours of the values, and nothing is silently wrong."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="needs the extra `viz`")
pytest.importorskip("tifffile", reason="needs the extra `viz`")

import tifffile
import torch
from matplotlib import colormaps

from exaonepath.encoders import loading
from exaonepath.encoders.attention_map import attention_map
from exaonepath.errors import (
    DataFileError,
    OutputError,
    SettingsError,
    SlideChangedError,
    SlideOpenError,
    SlideReadError,
)
from exaonepath.files.embeddings import SlideEmbedding, read_embedding, write_embedding
from exaonepath.files.features import PatchFailure, read_features
from exaonepath.slides.cohort.inputs import cohort_inputs
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide
from exaonepath.viz import contact_sheet, overlay
from exaonepath.viz.canvas import view
from exaonepath.viz.cells import Cells, patch_cells
from exaonepath.viz.contact_sheet import draw_contact_sheet, sheet_rows, striped
from exaonepath.viz.figures import FigureMaker, Look
from exaonepath.viz.gallery import read_tile
from exaonepath.viz.heatmap import draw_heatmap
from exaonepath.viz.overlay import level_sizes, write_overlay
from exaonepath.viz.palettes import CATEGORY_COLOURS, FAILED, MISSING, patch_colours
from exaonepath.viz.values import patch_values as patch_values_module
from exaonepath.viz.values.attention import Attention, AttentionUnavailable
from exaonepath.viz.values.patch_values import PatchValues, Question, patch_values
from exaonepath.viz.values.results import load_results
from exaonepath.viz.values.table import PatchTable
from exaonepath.viz.values.vectors import UnitRows, VectorStore, unit_rows

DPI = 150
CORNER = round(0.3 * DPI), round(0.95 * DPI)  # of the slide on the picture


def numbers(values, **more) -> PatchValues:
    values = np.asarray(values, np.float32)
    finite = values[np.isfinite(values)]
    limits = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return PatchValues("Score", "of a test", "score", values, limits=limits, **more)


@pytest.fixture(scope="module")
def maker(made):
    with FigureMaker(made / "out") as maker:
        yield maker


@pytest.fixture(scope="module")
def results(maker):
    return load_results(maker.slides()[0])


@pytest.fixture(scope="module")
def slide(made):
    with SlideImage(made / "slides" / "one.svs") as slide:
        yield slide


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def canvas_of(slide, results, longest: int):
    cells = patch_cells(results.coords, results.patch_size, np.zeros((len(results.coords), 3), np.uint8))
    return view(slide, [cells.boxes[:, :2], cells.boxes[:, 2:]], longest), cells


# ---- colours


def test_numbers_have_the_colours_of_the_colour_map():
    values = numbers([2.0, 3.0, 4.0, np.nan])
    expected = colormaps["cividis"]([0.0, 0.5, 1.0], bytes=True)[:, :3]
    assert (patch_colours(values, "cividis")[:3] == expected).all()
    assert tuple(patch_colours(values)[3]) == MISSING
    beyond = replace(values, limits=(2.5, 3.5))
    assert (patch_colours(beyond)[[0, 2]] == colormaps["viridis"]([0.0, 1.0], bytes=True)[:, :3]).all()
    equal = numbers([7, 7])
    assert (patch_colours(equal) == colormaps["viridis"](0.0, bytes=True)[:3]).all()
    with pytest.raises(SettingsError, match="viridis, cividis, magma"):
        patch_colours(values, "jet")


def test_categories_and_given_colours():
    values = PatchValues("x", "", "", np.array([1, np.nan, 0], np.float32), ("a", "b"))
    assert patch_colours(values).tolist() == [CATEGORY_COLOURS[1].tolist(), list(MISSING), CATEGORY_COLOURS[0].tolist()]
    given = replace(values, categories=(), colours=np.full((3, 3), 9, np.uint8))
    assert patch_colours(given).tolist() == [[9, 9, 9], list(MISSING), [9, 9, 9]]


def test_cells_of_neighbours_meet_at_every_scale():
    coords = np.array([(x, y) for y in range(0, 700, 100) for x in range(0, 700, 100)])
    colours = np.arange(49, dtype=np.uint8)[:, None] + 1
    for patch_size in (100, 160):  # adjacent, and overlapping
        cells = patch_cells(coords, patch_size, colours)
        for scale in (1.0, 0.37, 0.0193):
            side = round(700 * scale)
            picture = np.zeros((side, side, 1), np.uint8)
            origin = ((patch_size - 100) / 2,) * 2
            cells.scaled((scale, scale), origin).paint(picture)
            assert (picture > 0).all()
            assert len(np.unique(picture)) == 49


@pytest.mark.parametrize("side", [64, 100])
def test_tiles_are_cut_from_the_whole_picture(side):
    rng = np.random.default_rng(0)
    low = rng.integers(-40, 500, (300, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 130, (300, 2))], axis=1)
    cells = Cells(boxes, rng.integers(0, 255, (300, 3)).astype(np.uint8))
    whole = np.zeros((450, 330, 3), np.uint8)
    cells.paint(whole)
    for (x, y), inside in cells.by_tile(330, 450, side):
        tile = np.zeros((side, side, 3), np.uint8)
        inside.paint(tile, (x, y))
        expected = whole[y : y + side, x : x + side]
        assert (tile[: expected.shape[0], : expected.shape[1]] == expected).all()


# ---- the picture over the slide


def test_a_patch_has_exactly_the_colour_of_its_value(slide, results, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=len(results.coords)).astype(np.float32)
    values[3] = np.nan
    plain = replace(results, outlines=None)
    canvas, cells = canvas_of(slide, results, 900)
    for opacity in (1.0, 0.35):
        path = draw_heatmap(slide, plain, numbers(values), tmp_path / f"{opacity}.png", opacity=opacity, longest=900)
        shown = picture(path)[CORNER[1] :, CORNER[0] :][: canvas.size[1], : canvas.size[0]]
        grey = np.asarray(Image.fromarray(canvas.image).convert("L")).astype(int)
        centres = np.floor(canvas.points((cells.boxes[:, :2] + cells.boxes[:, 2:]) / 2)).astype(int)
        colours = patch_colours(numbers(values))
        checked = 0
        for (x, y), colour in zip(centres, colours, strict=True):
            if y > canvas.size[1] - 60:  # the scale bar
                continue
            expected = opacity * colour + (1 - opacity) * grey[y, x]
            # OpenCV's and Pillow's grey differ by one at most.
            assert np.abs(shown[y, x] - expected).max() <= (0 if opacity == 1 else 1.5), (x, y)
            checked += 1
        assert checked > 0.8 * len(centres)


def test_it_is_the_same_file_each_time(maker, tmp_path):
    look = Look(("png", "ome-tiff", "contact-sheet"), longest=500, each=3)
    entry = maker.slides()[0]
    question = Question("cluster", clusters=3)
    first = maker.make(entry, question, look, tmp_path / "a")
    second = maker.make(entry, question, look, tmp_path / "b")
    names = ["one-clusters-3.png", "one-clusters-3.ome.tif", "one-clusters-3-patches.png"]
    assert [path.name for path in first] == names
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)  # nothing temporary


def texts(monkeypatch, draw, *arguments, **more) -> str:
    """The texts of a picture."""
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig

    def remember(figure, *rest, **options):
        from matplotlib.text import Text

        seen.extend(text.get_text() for text in figure.findobj(Text))
        return save(figure, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", remember)
        draw(*arguments, **more)
    return "\n".join(seen)


def test_the_picture_says_what_it_shows(slide, results, tmp_path, monkeypatch):
    values = np.linspace(0, 1, len(results.coords)).astype(np.float32)
    values[:5] = np.nan
    failed = (PatchFailure(0, 10, 20, "no data"),) * 3
    odd = replace(results, failures=failed, notes=("A note of $the$ results.",))
    words = texts(monkeypatch, draw_heatmap, slide, odd, numbers(values, marked=7), tmp_path / "a.png", longest=400)
    for part in ("Score — one", "of a test", f"{len(values)} patches of 64 µm", "score", "no value  5", "patch 7"):
        assert part in words, part
    assert "could not be read  3" in words
    assert "Random weights" in words
    assert "µm" in words.replace("of 64 µm", "")  # the scale bar
    assert "$the$" in words
    assert "assumed" not in words
    # Crosses are drawn where the failed patches are, patches without a value in grey.
    categories = replace(numbers(values), categories=("a", "b"), values=np.float32(np.arange(len(values)) % 2))
    words = texts(monkeypatch, draw_heatmap, slide, odd, categories, tmp_path / "b.png", longest=400)
    assert f"a  {-(-len(values) // 2)}" in words


def test_an_assumed_scale_is_stated_everywhere(encode, tmp_path, monkeypatch):
    path = make_slide(tmp_path / "nompp.tif", 900, 700, fragments=1, holes=False, mpp=None, vendor="generic")
    encode(path, tmp_path / "out")
    with FigureMaker(tmp_path / "out") as maker, SlideImage(path) as slide:
        entry = maker.slides()[0]
        results = load_results(entry)
        words = texts(
            monkeypatch, draw_heatmap, slide, results, numbers(np.arange(len(results.coords))), tmp_path / "a.png"
        )
        assert "Assumed scale" in words
        assert "pixel size assumed" in words
        (made,) = maker.make(entry, Question("fragment"), Look(("ome-tiff",)))
    with tifffile.TiffFile(made) as file:
        assert "PhysicalSize" not in file.ome_metadata  # the slide states none
        assert "Assumed scale" in file.ome_metadata
        assert 282 not in file.pages[0].tags or file.pages[0].tags[282].value == (1, 1)


# ---- the overlay


def test_every_level_of_the_overlay_is_aligned(slide, results, tmp_path):
    rng = np.random.default_rng(1)
    values = numbers(rng.normal(size=len(results.coords)))
    failed = (PatchFailure(0, 1000, 5, "x"), PatchFailure(1, 1880, 1290, "at the edge"))
    path = write_overlay(slide, replace(results, failures=failed), values, tmp_path / "o.ome.tif")
    colours = patch_colours(values)
    (width, height), size = slide.dimensions, results.patch_size
    naive = np.zeros((height, width, 4), np.uint8)
    for x, y in ((1000, 5), (1880, 1290)):
        naive[y : y + size, x : x + size] = (*FAILED, 255)
    for (x, y), colour in zip(results.coords.tolist(), colours, strict=True):
        naive[max(0, y) : y + size, max(0, x) : x + size] = (*colour, 255)
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        levels = file.series[0].levels
        assert [level.shape for level in levels] == [(h, w, 4) for w, h in level_sizes(width, height)]
        assert levels[0].shape[:2] == (height, width)
        assert max(levels[-1].shape) <= 512
        assert (levels[0].asarray() == naive).all()
        for level in levels[1:]:
            shown = level.asarray()
            scale = shown.shape[1] / width, shown.shape[0] / height
            for (x, y), colour in zip(results.coords, colours, strict=True):
                at = int((x + size / 2) * scale[0]), int((y + size / 2) * scale[1])
                assert tuple(shown[at[1], at[0]]) == (*colour, 255)
            known = {tuple(colour) for colour in naive.reshape(-1, 4)}
            assert {tuple(colour) for colour in shown.reshape(-1, 4)} <= known  # never a mixture
        assert file.pages[0].tags["TileWidth"].value == 512
        assert f'PhysicalSizeX="{slide.mpp}" PhysicalSizeXUnit="µm"' in file.ome_metadata
        assert "could not be read" in file.ome_metadata
        assert "Random weights" in file.ome_metadata
    # Other readers see the same pixels, at the same scale.
    with openslide.OpenSlide(path) as other:
        assert other.dimensions == slide.dimensions
        assert float(other.properties["openslide.mpp-x"]) == pytest.approx(slide.mpp)
        assert (np.asarray(other.read_region((0, 0), 0, other.dimensions)) == naive).all()
    with SlideImage(path) as ours:
        assert ours.level_dimensions == tuple(level_sizes(width, height))
        assert ours.mpp == pytest.approx(slide.mpp)
        assert (ours.read_region((0, 0), 0, ours.dimensions) == naive).all()


def test_memory_does_not_grow_with_the_slide(results, tmp_path):
    """A slide of 1.2 gigapixels: level 0 alone would take 4.8 GB."""
    width, height = 40_000, 30_000
    fake = SimpleNamespace(
        dimensions=(width, height),
        mpp=0.25,
        mpp_y=0.25,
        mpp_source="openslide.mpp-x",
        scale_doubts=(),
        name="large",
        fingerprint=lambda: str(results.slide_fingerprint),
        check_unchanged=lambda: None,
    )
    coords = np.array([(x, y) for y in range(0, 2000, 256) for x in range(0, width, 2560)], np.int32)
    large = replace(results, coords=coords, patch_size=256, fragments=np.zeros(len(coords), np.int32), outlines=None)
    tracemalloc.start()
    path = write_overlay(fake, large, numbers(np.arange(len(coords))), tmp_path / "large.ome.tif")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, peak
    with tifffile.TiffFile(path) as file:
        assert file.series[0].shape == (height, width, 4)
        assert len(file.series[0].levels) == len(level_sizes(width, height))
        assert file.is_bigtiff


def test_an_interrupted_overlay_leaves_nothing(slide, results, tmp_path, monkeypatch):
    target = tmp_path / "o.ome.tif"
    target.write_bytes(b"before")

    def stop(*_):
        yield b"x"
        raise KeyboardInterrupt

    monkeypatch.setattr(overlay, "_tiles", stop)
    with pytest.raises(KeyboardInterrupt):
        write_overlay(slide, results, numbers(np.zeros(len(results.coords))), target)
    assert [path.name for path in tmp_path.iterdir()] == ["o.ome.tif"]
    assert target.read_bytes() == b"before"


# ---- the contact sheet


def test_rows_of_a_score_and_of_categories():
    score = numbers([3, np.nan, 1, 3, 2, 5])
    highest, lowest = sheet_rows(score, 3)
    assert (highest.heading, highest.patches.tolist(), highest.captions) == (
        "highest: score",
        [5, 0, 3],
        ["5", "3", "3"],
    )
    assert (lowest.heading, lowest.patches.tolist()) == ("lowest: score", [2, 4, 0])
    assert sheet_rows(numbers([np.nan]), 3) == []
    assert sheet_rows(numbers([]), 3) == []
    kinds = replace(score, values=np.array([0, 2, 2, 2, 2, np.nan], np.float32), categories=("a", "b", "c"))
    rows = sheet_rows(kinds, 3)
    assert [(row.heading, row.patches.tolist()) for row in rows] == [
        ("c  (4 patches)", [1, 2, 4]),
        ("a  (1 patch)", [0]),
    ]
    rng = np.random.default_rng(0)
    unit = UnitRows(*unit_rows(rng.normal(size=(50, 8)) + 2))
    row = sheet_rows(replace(kinds, values=np.zeros(50, np.float32), categories=("a",), unit=unit), 4)[0]
    mean = unit.rows.mean(0) / np.linalg.norm(unit.rows.mean(0))
    assert row.patches.tolist() == np.argsort(-(unit.rows @ mean), kind="stable")[:4].tolist()


def test_tiles_are_the_patches(slide, results, tmp_path, monkeypatch):
    values = numbers(np.arange(len(results.coords)))
    failed = (PatchFailure(0, 10, 20, "no data"),)
    path = tmp_path / "s.png"
    words = texts(monkeypatch, draw_contact_sheet, slide, replace(results, failures=failed), values, path, each=4)
    shown = picture(path)
    side, pitch = contact_sheet._TILE, contact_sheet._TILE + contact_sheet._GAP
    inner = slice(6, side - 6)  # without the frame
    best = len(values) - 1 - np.arange(4)
    for column, patch in enumerate(best):
        left, top = CORNER[0] + column * pitch, CORNER[1] + contact_sheet._HEADING
        expected = read_tile(slide, results.coords[patch], results.patch_size, side)
        assert (shown[top : top + side, left : left + side][inner, inner] == expected[inner, inner]).all()
        x, y = results.coords[patch]
        assert f"{x}, {y}\n{patch}" in words
    assert "could not be read  (1)" in words
    assert "10, 20\nno data" in words
    top = CORNER[1] + contact_sheet._HEADING + 2 * (contact_sheet._HEADING + side + contact_sheet._CAPTION)
    lost = shown[top : top + side, CORNER[0] : CORNER[0] + side]
    assert (lost[inner, inner] == striped(side)[inner, inner]).all()
    with pytest.raises(SettingsError, match="1 to 16"):
        draw_contact_sheet(slide, results, values, path, each=0)


def test_patches_that_cannot_be_read_now(made, results, tmp_path, monkeypatch):
    """The slide's bytes were damaged since: pictures are drawn all the same, and show where."""
    with SlideImage(made / "slides" / "one.svs") as slide:
        read = slide.read_region

        def broken(location, level, size):
            if location[0] < 900:
                raise SlideReadError("broken")
            return read(location, level, size)

        monkeypatch.setattr(slide, "read_region", broken)
        values = numbers(results.coords[:, 0])
        words = texts(monkeypatch, draw_contact_sheet, slide, results, values, tmp_path / "a.png", each=4)
        assert words.count("cannot be read") == 4  # the lowest
        side = contact_sheet._TILE
        top = CORNER[1] + 2 * contact_sheet._HEADING + side + contact_sheet._CAPTION
        lost = picture(tmp_path / "a.png")[top : top + side, CORNER[0] : CORNER[0] + side]
        assert (lost[6:-6, 6:-6] == striped(side)[6:-6, 6:-6]).all()
        words = texts(monkeypatch, draw_heatmap, slide, results, values, tmp_path / "b.png", longest=400)
        assert "area(s) of the slide cannot be read" in words
        with pytest.raises(SlideReadError):
            slide.thumbnail(400)  # whoever does not ask for it gets the error


# ---- what is asked for


def test_similarity_attention_and_columns(maker, made, results, own_weights, small_slide_encoder, tmp_path):

    entry, store, attention = maker.slides()[0], VectorStore(), Attention()

    def asked(question, table=None):
        return patch_values(entry, results, question, store=store, attention=attention, table=table)

    features = read_features(made / "out" / "patches" / "one_features.h5")
    arrays = [torch.from_numpy(a) for a in (features.features, features.coords, features.contour_index)]
    maps = attention_map(small_slide_encoder.model, *arrays, range(len(results.coords)))
    one = asked(Question("attention", patch=5))
    assert (one.values == maps[-1].patches[5].mean(0).numpy()).all()
    assert (one.marked, one.limits[0]) == (5, 0.0)
    first = asked(Question("attention", patch=5, block=0))
    assert (first.values == maps[0].patches[5].mean(0).numpy()).all()
    mean = asked(Question("attention"))
    expected = maps[-1].patches.mean((0, 1)).numpy()
    assert np.abs(mean.values - expected).max() < 2 * len(expected) * np.finfo(np.float32).eps
    with pytest.raises(SettingsError, match="blocks 0 to 1"):
        asked(Question("attention", block=2))

    rows = np.asarray(unit_rows(features.features)[0])
    near = asked(Question("similarity", patch=5, vectors="appearance"))
    assert np.abs(near.values - rows @ rows[5]).max() < 1e-6
    assert near.limits[1] == np.delete(near.values, 5).max()
    x, y = results.coords[5]
    assert asked(Question("similarity", at=(x + 64, y + 64))).marked == 5
    with pytest.raises(SettingsError, match="no patch of the slide lies at 1e"):
        asked(Question("similarity", at=(1e9, 0)))
    for patch in (len(results.coords), 10**12):
        with pytest.raises(SettingsError, match=f"patches 0 to {len(results.coords) - 1}"):
            asked(Question("attention", patch=patch))

    text = "x,y,score,kind\n" + "".join(
        f"{x},{y},{'nan' if n == 3 else n},{'tumour' if n % 3 else ''}\n" for n, (x, y) in enumerate(results.coords[:9])
    )
    (tmp_path / "t.csv").write_text(text)
    table = PatchTable(tmp_path / "t.csv")
    score = asked(Question("column", column="score"), table)
    assert score.values[:3].tolist() == [0, 1, 2]
    assert np.isnan(score.values[[3, 9, -1]]).all()
    assert score.limits == (0, 8)
    kind = asked(Question("column", column="kind"), table)
    assert kind.categories == ("tumour",)
    assert np.isnan(kind.values[0])
    with pytest.raises(SettingsError, match="has no column other; it has score, kind"):
        asked(Question("column", column="other"), table)
    with pytest.raises(SettingsError, match="name the file"):
        asked(Question("column", column="score"))
    (tmp_path / "u.csv").write_text("slide,x,y,score\ntwo,0,0,1\n")
    with pytest.raises(SettingsError, match="no row for a patch of one"):
        asked(Question("column", column="score"), PatchTable(tmp_path / "u.csv"))

    assert asked(Question("fragment")).categories == ("fragment 0", "fragment 1")
    assert asked(Question("pca")).colours.shape == (len(results.coords), 3)
    component = asked(Question("component"))
    assert component.limits[0] < 0 < component.limits[1]
    store.close()


def test_many_texts_share_the_last_colour(results):

    counts = np.arange(20, 0, -1)
    values = np.repeat(np.arange(20), counts).astype(np.float32)
    shown = patch_values_module._most_frequent(PatchValues("x", "", "", values, tuple(f"t{n}" for n in range(20))))
    assert shown.categories == (*(f"t{n}" for n in range(11)), "9 others")
    assert (np.bincount(shown.values.astype(int)) == [*counts[:11], counts[11:].sum()]).all()


@pytest.mark.parametrize(
    "question",
    [
        {"by": "nothing"},
        {"by": "similarity"},
        {"by": "cluster", "patch": 3},
        {"by": "attention", "patch": 3, "at": (1, 2)},
        {"by": "cluster", "clusters": 1},
        {"by": "cluster", "clusters": 13},
        {"by": "pca", "block": 1},
        {"by": "pca", "column": "x"},
        {"by": "column"},
        {"by": "pca", "vectors": "sideways"},
    ],
)
def test_questions_without_sense_are_refused(question):
    with pytest.raises(SettingsError):
        Question(**question)


def test_looks_without_sense_are_refused():
    for look in ({"forms": ()}, {"forms": ("gif",)}, {"opacity": 1.5}, {"opacity": float("nan")}, {"each": 17}):
        with pytest.raises(SettingsError):
            Look(**look)


def test_nothing_is_replaced_unasked(maker, tmp_path):
    entry = maker.slides()[0]
    (tmp_path / "one-fragments.ome.tif").write_bytes(b"mine")
    both = Look(("png", "ome-tiff"))
    with pytest.raises(OutputError, match="exists already"):
        maker.make(entry, Question("fragment"), both, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one-fragments.ome.tif"]  # nothing was written
    maker.make(entry, Question("fragment"), both, tmp_path, overwrite=True)
    assert (tmp_path / "one-fragments.ome.tif").read_bytes() != b"mine"


def test_a_slide_that_is_gone_or_is_another_one(copied, tmp_path):
    other = make_slide(tmp_path / "one.svs", 1900, 1300, fragments=2, holes=False, seed=5, levels=(1, 4))
    with FigureMaker(copied / "out", cohort_inputs([other]).slides) as maker:
        with pytest.raises(SlideChangedError, match="is not the slide"):
            maker.make(maker.slides()[0], Question("fragment"), None, tmp_path / "f")
        other.unlink()
        with pytest.raises(SlideOpenError):
            maker.make(maker.slides()[0], Question("fragment"), None, tmp_path / "f")
        with pytest.raises(SettingsError, match=r"has no slide two; it has one"):
            maker.slides(["one", "two"])
    assert not (tmp_path / "f").exists()


def test_a_slide_without_results_is_named(made, tmp_path):
    other = make_slide(tmp_path / "other.svs", 700, 500, fragments=1)
    with FigureMaker(made / "out", cohort_inputs([other]).slides) as maker:
        assert [entry.id for entry in maker.slides()] == ["one"]
        with pytest.raises(DataFileError, match="no patches of other"):
            maker.make(maker.slides(["other"])[0], Question("fragment"), None, tmp_path)


def test_names_of_columns_become_names_of_files(maker, results, tmp_path):
    rows = "".join(f"{n},{n}\n" for n in range(len(results.coords)))
    name = "../" + "ä" * 300
    (tmp_path / "t.csv").write_text(f"patch,{name}\n{rows}", encoding="utf-8")
    with FigureMaker(maker.out, table=tmp_path / "t.csv") as other:
        (path,) = other.make(other.slides()[0], Question("column", column=name), Look(longest=200), tmp_path / "to")
    assert path.parent == tmp_path / "to"
    assert path.name == f"one-column-.._{'ä' * 57}.png"


def test_what_was_not_kept_is_named(made, encode, tmp_path, own_weights):
    slide = made / "slides" / "one.svs"
    encode(slide, tmp_path / "slim", keep="slide")
    with FigureMaker(tmp_path / "slim") as maker:
        entry = maker.slides()[0]
        for question in (Question("cluster"), Question("attention"), Question("similarity", patch=1)):
            with pytest.raises(DataFileError, match="without patch embeddings"):
                maker.make(entry, question)
        assert maker.make(entry, Question("fragment"))[0].exists()  # positions are enough
    encode(slide, tmp_path / "some", keep="features")
    with FigureMaker(tmp_path / "some") as maker:
        entry = maker.slides()[0]
        assert maker.make(entry, Question("cluster"))[0].exists()  # of the features
        with pytest.raises(DataFileError, match="not context ones"):
            maker.make(entry, Question("cluster", vectors="context"))
        with pytest.raises(AttentionUnavailable):
            maker.make(entry, Question("attention"))


def test_attention_of_other_weights_is_refused(maker, monkeypatch, small_slide_encoder, tmp_path):
    other = replace(small_slide_encoder, fingerprint="other")
    monkeypatch.setattr(loading, "load_slide_encoder", lambda weights, device: other)
    with FigureMaker(maker.out) as again, pytest.raises(AttentionUnavailable, match="not those that"):
        again.make(again.slides()[0], Question("attention"), None, tmp_path)


def test_an_empty_slide_and_one_patch(encode, tmp_path, own_weights, monkeypatch):
    empty = make_slide(tmp_path / "empty.svs", 700, 500, fragments=0)
    encode(empty, tmp_path / "out")
    tiny = make_slide(tmp_path / "tiny.svs", 128, 128, fragments=1, holes=False, levels="flat")
    with SlideImage(tiny) as image:
        attrs = {"slide_path": str(tiny), "slide_fingerprint": image.fingerprint(), "weights": "random:0"}
    vectors = np.ones((1, 56), np.float32)
    one = SlideEmbedding(vectors[0], vectors, np.zeros((1, 2), np.int32), np.zeros(1, np.int32))
    write_embedding(tmp_path / "out" / "embeddings" / "tiny.h5", one, attrs)
    every = Look(("png", "ome-tiff", "contact-sheet"), longest=300)
    with FigureMaker(tmp_path / "out") as maker:
        blank, single = maker.slides(["empty", "tiny"])
        for question in (Question("attention"), Question("cluster"), Question("pca"), Question("fragment")):
            made = maker.make(blank, question, every)
            with tifffile.TiffFile(made[1]) as file:
                assert file.series[0].shape == (500, 700, 4)
                assert not file.asarray().any()
        with pytest.raises(SettingsError, match="no patches"):
            maker.make(blank, Question("attention", patch=0))
        for question in (Question("cluster"), Question("pca"), Question("component"), Question("similarity", patch=0)):
            made = maker.make(single, question, every)
            assert all(path.stat().st_size for path in made)
        with SlideImage(empty) as slide:
            words = texts(
                monkeypatch, draw_heatmap, slide, load_results(blank), numbers([]), tmp_path / "e.png", longest=300
            )
        assert "No tissue found" in words


def test_vectors_that_are_not_usable(made, encode, tmp_path):

    encode(made / "slides" / "one.svs", tmp_path / "out")
    path = tmp_path / "out" / "embeddings" / "one.h5"
    stored = read_embedding(path)
    stored.patch_embedding[2, 24:] = np.nan
    stored.patch_embedding[4, 24:] = 0
    write_embedding(path, stored, stored.attrs)
    with FigureMaker(tmp_path / "out") as maker:
        entry = maker.slides()[0]
        results = load_results(entry)
        (made_path,) = maker.make(entry, Question("cluster", clusters=2), Look(("ome-tiff",)))
        shown = tifffile.imread(made_path)
        for patch in (2, 4):
            x, y = results.coords[patch] + 64
            assert tuple(shown[y, x]) == (*MISSING, 255)
        with pytest.raises(SettingsError, match="zero or not finite"):
            maker.make(entry, Question("similarity", patch=2))
        maker.make(entry, Question("similarity", patch=0), Look(("png", "contact-sheet"), longest=300))


def test_results_that_change_meanwhile(copied, own_weights, monkeypatch):

    with FigureMaker(copied / "out") as maker:
        entry = maker.slides()[0]
        monkeypatch.setattr(patch_values_module, "version_of", lambda entry: "another")
        with pytest.raises(DataFileError, match="were replaced"):
            maker.make(entry, Question("cluster"))
        assert not list((copied / "out" / "figures").iterdir())
