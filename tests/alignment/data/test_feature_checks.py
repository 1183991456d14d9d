"""The record of checked features files: an unchanged file is not read again, and a changed one always is."""

import json
import os
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from exaonepath.alignment.data import feature_checks
from exaonepath.alignment.data.feature_checks import FeatureChecks, file_state
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.slides import read_slides
from exaonepath.errors import DamagedFileError, DataFileError
from exaonepath.files.feature_rows import OpenFeatures
from exaonepath.files.user_cache import cache_folder


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """A cache of its own; small files are recorded, and files count as settled at once."""
    monkeypatch.setenv("EXAONEPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_checks, "LEAST_BYTES", 0)
    monkeypatch.setattr(feature_checks, "_SETTLED_SECONDS", -3600.0)


@pytest.fixture
def checked(monkeypatch):
    """The files that were read completely, in order."""
    files = []
    original = OpenFeatures.check

    def check(self):
        files.append(self.path.name)
        original(self)

    monkeypatch.setattr(OpenFeatures, "check", check)
    return files


@pytest.fixture
def table(write_slide, write_csv):
    """A table of three slides, and a function that reads it."""
    for n, name in enumerate(("a.h5", "b.h5", "ç.h5")):
        write_slide(name, n=40 + n, feature_dtype="float16" if n else "float32")
    path = write_csv("slides.csv", ["patient", "features"], [["P1", "a.h5"], ["P2", "b.h5"], ["P3", "ç.h5"]])

    def read(**options):
        report = CohortReport()
        slides = read_slides(path, report, **options)
        return slides, report

    read.path = path
    return read


def _record(tmp_path):
    (record,) = (tmp_path / "cache" / "feature-checks").iterdir()
    return record


def test_an_unchanged_file_is_read_once(table, checked, tmp_path):
    first, report = table()
    assert checked == ["a.h5", "b.h5", "ç.h5"]
    for _ in range(2):
        again, other = table()
        assert again == first
        assert other.as_dict() == report.as_dict()
    header, _ = table(check="header")
    assert [s.header for s in header.slides] == [s.header for s in first.slides]
    assert checked == ["a.h5", "b.h5", "ç.h5"]
    again, _ = table(check="again")
    assert again == first
    assert checked == ["a.h5", "b.h5", "ç.h5"] * 2
    assert [p.name for p in _record(tmp_path).parent.iterdir()] == [_record(tmp_path).name]  # no temporary file


def _same_size(path, seed=1):
    """Other values in the file, of the same size; the checksums are removed, so that only a check could notice."""
    with h5py.File(path, "r+") as file:
        file["features"][:] = np.random.default_rng(seed).standard_normal(file["features"].shape)


def _replaced(path):
    other = path.with_name("other.h5")
    shutil.copyfile(path, other)
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def _set_back(path):
    status = path.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    _same_size(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert path.stat().st_size == status.st_size


def _appended(path):
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _touched(path):
    os.utime(path)


def _linked(path):
    moved = path.with_name("moved.h5")
    shutil.copyfile(path, moved)
    path.unlink()
    path.symlink_to(moved)


@pytest.mark.parametrize("change", [_same_size, _replaced, _set_back, _appended, _touched, _linked])
def test_every_change_that_the_file_system_shows_is_noticed(table, checked, tmp_path, change):
    """Also a file of the same size whose modification time was set back: the time of its inode cannot be set."""
    table()
    del checked[:]
    change(tmp_path / "b.h5")
    _, report = table()
    if change in (_same_size, _set_back):
        assert "b.h5 is damaged" in str(report.findings)
    assert checked == ["b.h5"]
    table()
    assert checked == ["b.h5"] * (2 if report.errors else 1)  # a file that failed is read again


def test_a_change_without_any_trace_is_found_when_rows_are_read(table, checked, tmp_path, monkeypatch):
    """What the record cannot notice: damage on the disk, here simulated by a file system that reports no change."""
    from exaonepath.alignment.data.feature_cache import FeatureCache

    slides, _ = table()
    states = {slide.features: file_state(slide.features) for slide in slides.slides}
    _same_size(tmp_path / "b.h5")
    monkeypatch.setattr(feature_checks, "file_state", lambda path: states[path])
    del checked[:]
    again, report = table()
    assert not checked
    assert not report.errors
    with pytest.raises(DamagedFileError, match=r"b\.h5"):
        FeatureCache(again.slides, 0).read(again.slides[1], lambda coords, _: np.arange(5))


def test_a_file_that_was_just_written_is_not_remembered(table, checked, monkeypatch):
    """A change in the same tick of the clock as the check would have the same times."""
    monkeypatch.setattr(feature_checks, "_SETTLED_SECONDS", 2.0)
    table()
    table()
    assert checked == ["a.h5", "b.h5", "ç.h5"] * 2


def test_a_file_that_changes_during_its_check_is_not_remembered(table, checked, tmp_path, monkeypatch):
    original = OpenFeatures.check

    def check(self):
        original(self)
        if self.path.name == "b.h5":
            os.utime(self.path)

    monkeypatch.setattr(OpenFeatures, "check", check)
    table()
    table()
    assert checked == ["a.h5", "b.h5", "ç.h5", "b.h5"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("a.h5", "x.h5", 1),
        lambda text: text.replace("40", "41"),
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
        lambda text: json.dumps({**json.loads(text), "format": 0}),
        lambda text: "\0" * 100,
    ],
)
def test_a_damaged_record_is_not_used(table, checked, tmp_path, damage):
    first, _ = table()
    record = _record(tmp_path)
    record.write_text(damage(record.read_text()))
    again, _ = table()
    assert again == first
    assert len(checked) == 6
    table()
    assert len(checked) == 6  # and it was written again


def test_a_failed_file_is_never_remembered(table, checked, tmp_path, drop_checksums):
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["features"][3, 1] = np.nan
        drop_checksums(file)
    for _ in range(2):
        _, report = table()
        assert "hold NaN or infinity (row 3)" in str(report.findings)
    assert checked == ["a.h5", "b.h5", "ç.h5", "a.h5"]


def test_an_interrupted_check_continues_where_it_was(table, checked, monkeypatch):
    original = OpenFeatures.check

    def interrupt(self):
        if self.path.name == "ç.h5":
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFeatures, "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            table()
    del checked[:]
    table()
    assert checked == ["ç.h5"]


def test_a_cache_that_cannot_be_written_does_no_harm(table, checked, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file" / "below"), ""):
        monkeypatch.setenv("EXAONEPATH_CACHE", value)
        assert len(table()[0]) == 3
    assert len(checked) == 6


def test_a_small_check_leaves_no_record(table, monkeypatch, tmp_path):
    monkeypatch.setattr(feature_checks, "LEAST_BYTES", 256 << 20)
    table()
    assert not (tmp_path / "cache").exists()


def test_files_that_left_the_table_are_forgotten(table, checked, tmp_path):
    table()
    rows = table.path.read_text().splitlines()
    table.path.write_text("\n".join(rows[:3]) + "\n")
    os.utime(tmp_path / "a.h5")
    table()
    assert "ç" not in json.loads(json.loads(_record(tmp_path).read_text())["content"])["files"][-1][0]
    assert checked == ["a.h5", "b.h5", "ç.h5", "a.h5"]


def test_the_folder_of_the_cache(monkeypatch):
    monkeypatch.delenv("EXAONEPATH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/exaonepath")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "exaonepath"
    monkeypatch.setenv("EXAONEPATH_CACHE", " ")
    assert cache_folder() is None


def test_errors_of_a_file_are_those_of_reading_it(write_slide, tmp_path):
    checks = FeatureChecks(tmp_path / "slides.csv", "full")
    with pytest.raises(DataFileError, match="no such file"):
        checks.check(tmp_path / "none.h5")
    file = write_slide("a.h5", complete=False)
    assert checks.check(file).n_patches == 6  # `write_features` sets the mark itself
