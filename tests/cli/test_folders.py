"""What a folder of slides stands for, and how names are shown."""

import logging
import os
import shutil

import pytest

from exaonepath.errors import SlideOpenError
from exaonepath.slides.find import find_slides
from exaonepath.slides.image import slide_id
from exaonepath.text import printable


def dicom(path, series, size, stored=b"1.2.840.10008.5.1.4.1.1.77.1.6"):
    """The beginning of a DICOM file as far as it is looked at."""
    value = series.encode() + b"\0" * (len(series) % 2)
    head = b"\x20\x00\x0d\x00UI\x04\x001.2\0" + b"\x20\x00\x0e\x00UI" + len(value).to_bytes(2, "little") + value
    meta = b"\x02\x00\x02\x00UI" + len(stored).to_bytes(2, "little") + stored
    path.write_bytes(bytes(128) + b"DICM" + meta + head + bytes(size))
    return path


def test_hidden_files_and_folders_are_mentioned_and_skipped(tmp_path, caplog):
    for name in ("b.svs", "._a.svs", ".hidden.tif", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.svs").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in find_slides([tmp_path])] == ["b.svs"]
    assert "._a.svs is a hidden file" in caplog.text
    assert ".hidden.tif is a hidden file" in caplog.text
    assert "1 more slide files" in caplog.text
    assert "notes.txt" not in caplog.text


def test_slides_deeper_down_and_files_of_similar_names_are_mentioned(tmp_path, caplog):
    for name in (
        "b.svs",
        "q.qptiff",
        "r.qptiff",
        "v.vsi",
        "c.svs.part",
        "d.svs.tmp",
        "e.ome.tif.gz",
        "notes.txt.part",
        ".q.qptiff",
        "one/two/three/deep.svs",
        "one/.hid.svs",
        ".hidden/e.svs",
        "b/Data0000.dat",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "one" / "round").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in find_slides([tmp_path])] == ["b.svs"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 6
    for text in (
        f"has 2 .qptiff files (not known as slides; name one to try it), such as {tmp_path / 'q.qptiff'}",
        "has 1 .vsi files",
        f"has 1 .svs.part files (unfinished copies, by their name), such as {tmp_path / 'c.svs.part'}",
        "has 1 .svs.tmp files",
        "has 1 .tif.gz files (compressed; unpack them first)",
        f"with 1 more slide files, such as {tmp_path / 'one' / 'two' / 'three' / 'deep.svs'}",
    ):
        assert sum(text in line for line in said) == 1, text


def test_a_large_tree_is_searched_in_part(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("exaonepath.slides.find._MAX_ENTRIES", 10)
    for name in ("a/0.svs", *(f"b/{n}.txt" for n in range(20)), "c/1.svs", "top.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find_slides([tmp_path])] == ["top.svs"]
    assert "with 1 more slide files or more" in caplog.text


def test_a_broken_link_is_an_error_for_that_slide(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / "b.svs").symlink_to(tmp_path / "nowhere.svs")
    problems = []
    assert [p.name for p in find_slides([tmp_path], problems)] == ["a.svs"]
    assert "b.svs is a link to a file that does not exist" in str(problems[0])
    with pytest.raises(SlideOpenError, match=r"b\.svs"):
        find_slides([tmp_path])


def test_a_folder_with_nothing_but_hidden_files_is_empty(tmp_path):
    (tmp_path / "._a.svs").write_bytes(b"x")
    with pytest.raises(SlideOpenError, match="holds no slide"):
        find_slides([tmp_path])


def test_a_dicom_series_is_one_slide(tmp_path):
    for name, size in (("level0", 9000), ("level1", 900), ("level2", 90), ("label", 50), ("overview", 70)):
        dicom(tmp_path / f"{name}.dcm", "1.2.840.1", size)
    dicom(tmp_path / "other.dcm", "1.2.840.22", 10)
    (tmp_path / "odd.dcm").write_bytes(b"not DICOM")
    assert [p.name for p in find_slides([tmp_path])] == ["level0.dcm", "odd.dcm", "other.dcm"]
    assert [p.name for p in find_slides([tmp_path / "label.dcm", tmp_path / "level0.dcm"])] == ["level0.dcm"]


@pytest.mark.parametrize("suffix", ["", ".dicom", ".DICOM", ".840"])
def test_dicom_files_are_known_by_their_content(tmp_path, suffix):
    for name, size in (("level0", 9000), ("level1", 900), ("label", 50)):
        dicom(tmp_path / f"{name}{suffix}", "1.2.840.1", size)
    dicom(tmp_path / "ct", "1.2.840.2", 9, stored=b"1.2.840.10008.5.1.4.1.1.2")
    for name in ("notes", "empty.dicom", "LICENSE", "a.840"):
        (tmp_path / name).write_bytes(b"x" * 200 if name == "notes" else b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    wanted = [f"level0{suffix}"]
    assert [p.name for p in find_slides([tmp_path])] == wanted
    assert [p.name for p in find_slides([tmp_path / f"{name}{suffix}" for name in ("label", "level0")])] == wanted


def test_dicom_slides_called_by_their_uids_have_ids_of_their_own(tmp_path):
    for number in (1, 2):
        dicom(tmp_path / f"1.2.840.{number}", f"1.2.3.{number}", 10)
    found = find_slides([tmp_path])
    assert [slide_id(path) for path in found] == ["1.2.840.1", "1.2.840.2"]
    assert slide_id(tmp_path / "a.ome.tif") == "a.ome"


def test_the_same_series_in_two_folders_is_two_slides(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        dicom(tmp_path / name / f"{name}.dcm", "1.2.3", 10)
    assert len(find_slides([tmp_path / "x", tmp_path / "y"])) == 2


HOSTILE = {
    "esc": "a\x1b[31mred.svs",
    "newline": "a\nerror: all is well.svs",
    "return": "a\rb.svs",
    "bidi": "a\u202egnp.svs",
    "markup": "a[red]b[bold].svs",
    "bytes": os.fsdecode(b"a\xff\xfe.svs"),
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_of_any_kind_go_through_and_are_shown_escaped(run, slide, tmp_path, name):
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(slide, folder / name)
    (folder / f"broken-{name}").write_bytes(b"no slide")
    done = run("encode", folder, "--out", tmp_path / "out", "--weights", "random:0", "-v")
    assert done.exit_code == 1  # for the broken one
    assert len(list((tmp_path / "out" / "embeddings").iterdir())) == 1
    for text in (done.stdout, done.stderr):
        assert not any(c in text for c in "\x1b\r\u202e\udcff")
        assert not any(line.startswith("error: all is well") for line in text.splitlines())
    assert len(done.stdout.splitlines()) == 1
    again = run("encode", folder / name, "--out", tmp_path / "out", "--weights", "random:0")
    assert "already there" in again.stdout
    assert run("encode", folder / name, "--out", tmp_path / "out", "--weights", "random:0", "--quiet").exit_code == 0


def test_printable():
    assert printable("plain äé 漢字 \\ path") == "plain äé 漢字 \\ path"
    assert printable("\x1b[0m\x00\x7f") == r"\x1b[0m\x00\x7f"
    assert printable("\u202e\u200b\u2028\udcff") == r"\u202e\u200b\u2028\udcff"
