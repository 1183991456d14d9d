"""The options of `encode` that are about several processes; exit status 0, 1, 3 and 130 of a cohort."""

from __future__ import annotations

import multiprocessing
import shutil

import cv2
import pytest
import torch

from exaonepath.errors import SlideReadError
from exaonepath.slides.cohort.run_log import read_run_log
from exaonepath.slides.image import SlideImage
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "one.svs", 2400, 2000, fragments=1, holes=False)


@pytest.fixture
def folder(slide, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copy(slide, tmp_path / f"{name}.svs")
    return tmp_path


@pytest.fixture
def encode(run, folder):
    return lambda *arguments: run(
        "encode", folder / "a.svs", folder / "b.svs", folder / "c.svs", "--out", folder / "out",
        "--weights", "random:0", *arguments,
    )  # fmt: skip


@pytest.fixture
def forked(monkeypatch):
    """Worker processes are forked, with the stand-in encoders of this one; OpenCV's threads would not survive that."""
    threads, torch_threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    yield
    cv2.setNumThreads(threads)
    torch.set_num_threads(torch_threads)


def test_several_processes_and_one_give_the_same(encode, run, folder, forked):
    (folder / "broken.svs").write_bytes(b"no slide")
    done = encode("--jobs", 2, folder / "broken.svs")
    assert done.exit_code == 1
    assert sorted(line.split()[0].rpartition("/")[2] for line in done.stdout.splitlines()) == ["a.h5", "b.h5", "c.h5"]
    assert "1 of 4 slides failed" in done.stderr
    assert "random weights" in done.stderr
    logs = [list(read_run_log(path)) for path in (folder / "out" / "runs").iterdir()]
    assert sorted(rows[0]["engine"] for rows in logs) == ["worker", "worker", "workers"]
    again = encode()
    assert again.exit_code == 0
    assert again.stdout.count("already there") == 3


def test_unreadable_patches_of_a_cohort_are_exit_status_3(encode, folder, monkeypatch):
    read = SlideImage.read_rgb

    def fail_once(self, location, *rest):
        if self.name == "b" and fail_once.left:
            fail_once.left -= 1
            raise SlideReadError("a bad tile")
        return read(self, location, *rest)

    fail_once.left = 1
    monkeypatch.setattr(SlideImage, "read_rgb", fail_once)
    done = encode("--num-workers", 0)
    assert done.exit_code == 3
    assert "b.svs could not be read" in done.stderr
    assert encode().exit_code == 0


def test_a_slide_is_left_out_after_three_tries(run, folder):
    broken = folder / "broken.svs"
    broken.write_bytes(b"no slide")
    arguments = ["encode", broken, "--out", folder / "out", "--weights", "random:0"]
    for _ in range(3):
        assert "--retry-failed" not in run(*arguments).stderr
    left = run(*arguments)
    assert left.exit_code == 1
    assert "has failed 3 times" in left.stderr
    assert "--retry-failed" in left.stderr
    assert "has failed 3 times" not in run(*arguments, "--retry-failed").stderr


def test_stage_and_shard(encode, folder):
    done = encode("--stage", folder / "local", "--shard", "2/3", "--stale-after", 60)
    assert done.exit_code == 0, done.stderr
    names = [line.split()[0].rpartition("/")[2] for line in done.stdout.splitlines()]
    assert names == ["b.h5", "c.h5", "a.h5"]
    assert list((folder / "local").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shard", "4/3"], "out of range"),
        (["--shard", "x"], "written k/n"),
        (["--devices", "all"], "--jobs N"),
        (["--devices", "toaster"], "unknown device"),
        (["--devices", "cpu", "--device", "cpu"], "not both"),
    ],
)
def test_wrong_options(encode, folder, arguments, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = encode(*arguments)
    assert done.exit_code == 1
    assert says in done.stderr
    assert not (folder / "out" / "embeddings").exists()


def test_a_folder_of_claims_that_cannot_be_written_is_one_error(encode, folder):
    (folder / "out").mkdir()
    (folder / "out" / "claims").write_text("")
    done = encode()
    assert done.exit_code == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "claims" in errors[0]
