"""Working files: never through a link, removed when their process is gone, recovered when it was killed half way."""

import errno
import os
import stat

import pytest

from exaonepath.errors import OutputError
from exaonepath.files import atomic
from exaonepath.files.atomic import (
    atomic_folder,
    atomic_path,
    open_private,
    recover_folder,
    remove_abandoned,
    try_lock,
    write_text,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_writer_of_that_file(tmp_path, abandoned):
    for name in ("a.txt", "b.txt"):
        (tmp_path / abandoned(name)).write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == [abandoned("b.txt"), "a.txt"]
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["a.txt"]


def test_what_a_living_process_writes_stays(tmp_path):
    with atomic_path(tmp_path / "a.txt") as first, atomic_path(tmp_path / "a.txt") as second:
        assert first.exists()
        first.write_text("1")
        second.write_text("2")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "1"


@pytest.mark.parametrize(("days", "stays"), [(1, True), (8, False)])
def test_what_another_machine_left_is_judged_by_its_age(tmp_path, days, stays):
    left = tmp_path / ".a.txt.00000000-12-0123abcd.tmp"
    left.write_text("half")
    os.utime(left, (left.stat().st_mtime - days * 86400,) * 2)
    write_text(tmp_path / "a.txt", "whole")
    assert left.exists() == stays


@pytest.mark.parametrize("name", [".a.txt.tmp", ".a.txt.backup.tmp", "a.txt.00000000-12-0123abcd.tmp", ".mine.tmp"])
def test_files_of_the_user_are_not_taken_for_ours(tmp_path, name):
    (tmp_path / name).write_text("mine")
    os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "a.txt", "whole")
    remove_abandoned(tmp_path)
    assert (tmp_path / name).exists()


def test_a_left_folder_and_a_link_among_the_leftovers(tmp_path, abandoned):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / abandoned("m")).symlink_to(tmp_path / "precious")
    with atomic_folder(tmp_path / "m") as work:
        (work / "new").write_text("1")
    assert names(tmp_path) == ["m", "precious"]
    assert (tmp_path / "precious" / "file").read_text() == "x"


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "pipe"])
def test_a_working_file_that_is_something_else_is_refused(tmp_path, kind):
    path, other = tmp_path / ".f.part", tmp_path / "other"
    other.write_text("precious")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "hard link":
        path.hardlink_to(other)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(OutputError, match=r"\.f\.part"):
        open_private(path)
    assert other.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_works(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    descriptor = open_private(tmp_path / ".lock")
    assert try_lock(descriptor)
    os.close(descriptor)


def test_a_lock_that_is_taken_is_refused(tmp_path):
    first, second = open_private(tmp_path / ".lock"), open_private(tmp_path / ".lock")
    assert try_lock(first)
    assert not try_lock(second)
    assert not try_lock(second, shared=True)
    os.close(first)
    assert try_lock(second)
    os.close(second)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "model") as work:
            (work / "deep").mkdir()
            (work / "deep" / "file").write_text(text)
            if text == "new":
                assert (tmp_path / "model" / "deep" / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "deep" / "file").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~atomic._UMASK


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, error):
    with atomic_folder(tmp_path / "model") as work:
        (work / "file").write_text("old")

    def failing():
        with atomic_folder(tmp_path / "model") as work:
            (work / "file").write_text("new")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        failing()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "old"


@pytest.mark.parametrize("at", range(2))
def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, at):
    with atomic_folder(tmp_path / "model") as work:
        (work / "file").write_text("old")
    calls, rename = [], type(tmp_path).rename

    def failing(self, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise OSError(errno.EIO, "x")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(OutputError), atomic_folder(tmp_path / "model") as work:
        (work / "file").write_text("new")
    monkeypatch.undo()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "old"


def test_a_folder_set_aside_by_a_killed_process_comes_back_or_goes(tmp_path):
    target, aside = tmp_path / "model", tmp_path / ".model.replaced"
    aside.mkdir()
    (aside / "file").write_text("old")
    recover_folder(target)
    assert (names(tmp_path), (target / "file").read_text()) == (["model"], "old")
    aside.mkdir()
    recover_folder(target)
    assert names(tmp_path) == ["model"]
