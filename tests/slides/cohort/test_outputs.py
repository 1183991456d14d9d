"""Where files lie: one layout a folder, decided once, and the same for every process."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from exaonepath.errors import DataFileError, OutputError, SettingsError
from exaonepath.files import atomic
from exaonepath.files.atomic import write_text_once
from exaonepath.slides import outputs
from exaonepath.slides.cohort.run import encode_slides
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.image import SlideImage
from exaonepath.slides.outputs import choose_layout, output_paths, read_layout, stored_ids
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.synthetic import make_slide


def test_a_folder_without_a_statement_is_flat(tmp_path):
    paths = output_paths(tmp_path, "a.b")
    assert paths.embedding == tmp_path / "embeddings" / "a.b.h5"
    assert paths.features == tmp_path / "patches" / "a.b_features.h5"
    assert paths.mask == tmp_path / "masks" / "a.b.jpg"
    assert not list(tmp_path.iterdir())


def test_the_first_run_decides_and_later_runs_follow(tmp_path):
    assert choose_layout(tmp_path / "new", 3) == "flat"
    assert choose_layout(tmp_path / "new", 50_000) == "flat"
    assert choose_layout(tmp_path / "large", 10_001) == "hashed"
    assert choose_layout(tmp_path / "large", 1) == "hashed"
    assert choose_layout(tmp_path / "asked", 1, "hashed") == "hashed"
    assert json.loads((tmp_path / "asked" / "layout.json").read_text()) == {"format": 1, "layout": "hashed"}
    with pytest.raises(SettingsError, match="one layout"):
        choose_layout(tmp_path / "asked", 1, "flat")


def test_results_of_earlier_versions_stay_where_they_are(tmp_path):
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "one.h5").write_bytes(b"")
    with pytest.raises(SettingsError, match="'flat'"):
        choose_layout(tmp_path, 20_000, "hashed")
    assert choose_layout(tmp_path, 20_000) == "flat"


def test_paths_of_the_hashed_layout_never_change(tmp_path):
    """They are part of the file format: sha256 of the id, two digits a folder."""
    choose_layout(tmp_path, 1, "hashed")
    assert output_paths(tmp_path, "one").embedding == tmp_path / "embeddings" / "76" / "92" / "one.h5"
    assert output_paths(tmp_path, "one").features.parent == tmp_path / "patches" / "76" / "92"
    assert output_paths(tmp_path, "not utf-8: \udcff").mask.name == "not utf-8: \udcff.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{}", "does not state the layout"),
        ('{"format": 1, "layout": "deep"}', "does not state the layout"),
        ('{"format": 2, "layout": "flat"}', "later version"),
        ('{"format": "1", "layout": "flat"}', "does not state the layout"),
        ("[1]", "does not state the layout"),
        ('{"format": 1, "layout": "flat"', "not valid JSON"),
    ],
)
def test_a_damaged_statement_is_an_error_and_never_taken_for_flat(tmp_path, text, message):
    (tmp_path / "layout.json").write_text(text)
    for call in (lambda: read_layout(tmp_path), lambda: choose_layout(tmp_path, 1)):
        with pytest.raises(DataFileError, match=message):
            call()
    assert (tmp_path / "layout.json").read_text() == text


def test_many_processes_agree(tmp_path):
    wanted = [None if i % 2 else "hashed" for i in range(16)]

    def choose(layout):
        try:
            return choose_layout(tmp_path, 5, layout)
        except SettingsError:
            return read_layout(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(choose, wanted))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["layout.json"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    assert write_text_once(tmp_path / "a", "1")
    assert not write_text_once(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_read_only_folder_of_results_can_be_used(tmp_path, monkeypatch):
    def refused(path, text):
        raise OutputError("no") from PermissionError(13, "Permission denied")

    monkeypatch.setattr(outputs, "write_text_once", refused)
    assert choose_layout(tmp_path, 1) == "flat"
    with pytest.raises(OutputError):
        choose_layout(tmp_path, 1, "hashed")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", full)
    with pytest.raises(OutputError, match="disk is full"):
        choose_layout(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_an_id_travels_to_other_processes(tmp_path):
    slide = make_slide(tmp_path / "one.svs", 600, 500, fragments=0)
    with SlideImage(slide, name="another") as opened, pickle.loads(pickle.dumps(opened)) as copy:  # noqa: S301
        assert copy.name == "another"
    with SlideImage(slide) as opened, pytest.raises(SettingsError, match="already open as 'one'"):
        encode_slide(opened, tmp_path / "out", "random:0", "random:0", name="two")
    for name in ("", ".", "a/b", "a\0b"):
        with pytest.raises(SettingsError, match="part of file names"):
            SlideImage(slide, name=name)


def test_many_slides_of_a_call_are_hashed(tmp_path, monkeypatch, stand_ins):
    monkeypatch.setattr(outputs, "HASHED_ABOVE", 1)
    slides = [make_slide(tmp_path / f"{name}.svs", 600, 500, fragments=0) for name in "ab"]
    pair = stand_ins.load("stand-in", torch.device("cpu"))
    for result in encode_slides(slides, tmp_path / "out", *pair, **stand_ins.SETTINGS):
        assert result.embedding_path == output_paths(tmp_path / "out", result.name).embedding
        assert result.embedding_path.parent.parent.parent.name == "embeddings"
        assert result.embedding_path.is_file()


@pytest.mark.parametrize("layout", ["flat", "hashed"])
def test_everything_is_written_and_found_in_the_layout(tmp_path, layout):
    slide = make_slide(tmp_path / "one.svs", 1200, 1000, fragments=1, holes=False)
    out = tmp_path / "out"
    choose_layout(out, 1, layout)
    with SlideImage(slide, name="patient 1, block A") as opened:
        path = patchfy(opened, out)[0]
    paths = output_paths(out, "patient 1, block A")
    assert path == paths.patches
    assert paths.mask.is_file()
    assert paths.contours.is_file()
    paths.features.write_bytes(b"")
    paths.patches.with_name(".one.h5.0.tmp").write_bytes(b"")
    assert list(stored_ids(out, "patches")) == [("patient 1, block A", paths.patches)]
    assert list(stored_ids(out, "features")) == [("patient 1, block A", paths.features)]
    assert list(stored_ids(out, "embedding")) == []
    assert len(list((out / "patches").iterdir())) == (3 if layout == "flat" else 1)


def test_leftovers_of_a_folder_that_cannot_be_read_any_more_are_a_warning(tmp_path, abandoned, caplog):
    """It comes after the slides, whose results and errors are known by then."""
    left = tmp_path / "embeddings" / abandoned("a.h5")
    left.parent.mkdir()
    left.write_bytes(b"half")
    (tmp_path / outputs.LAYOUT_FILE).mkdir()
    outputs.remove_leftovers(tmp_path, ["a"])
    assert left.exists()
    assert "layout.json cannot be read" in caplog.text
    (tmp_path / outputs.LAYOUT_FILE).rmdir()
    outputs.remove_leftovers(tmp_path, ["a"])
    assert not left.exists()
