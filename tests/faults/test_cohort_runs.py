"""Processes of a cohort run that are killed, stopped, starved and confused, at random moments.

What has to hold: a process ends with its status or is dead, never hangs; whatever lies under a final name is what an
undisturbed run writes; and in the end, after the same command was run again, all of it is there, bit for bit. Each row
of the table is (tried, survived, what was lost); `make faults` takes more of each and prints it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import h5py
import pytest

from exaonepath.errors import ExaonePathError
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import read_features
from exaonepath.files.patches import read_patches
from exaonepath.synthetic import make_slide

STAND_INS = Path(__file__).resolve().parents[1] / "slides/cohort"
sys.path.insert(0, str(STAND_INS))  # processes import it by name

import cohort_stand_ins  # noqa: E402

FORKED = multiprocessing.get_context("forkserver")
ALL = os.environ.get("EXAONEPATH_FAULTS") == "all"
PATIENCE = 120
BATCH = 4
NAMES = "abcdef"


@pytest.fixture(scope="module", autouse=True)
def server():
    """The process from which the others are forked. Before Python 3.13 it does not take over `sys.path`."""
    FORKED.set_forkserver_preload(["cohort_stand_ins"])
    with pytest.MonkeyPatch.context() as patch:
        path = [str(STAND_INS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [
        make_slide(folder / f"{name}.svs", 1200, 1000, fragments=at % 3, holes=False, seed=at)
        for at, name in enumerate(NAMES, start=1)
    ]


class Run:
    """A process of a cohort run with the stand-ins.

    Processes are forked from a server that has imported everything, and has run nothing: a new interpreter takes
    seconds to import torch.

    Args:
        out: the output folder.
        slides: the slides, in the order in which this process takes them.
        environment: see `cohort_stand_ins`; None removes a variable.
    """

    def __init__(self, out: Path, slides: list[Path], **environment) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=out.parent))
        streams = [str(self.folder / name) for name in ("stdout", "stderr")]
        values = {name: None if value is None else str(value) for name, value in environment.items()}
        self.process = FORKED.Process(
            target=cohort_stand_ins.as_process, args=([str(out), *map(str, slides)], values, *streams)
        )
        self.process.start()

    def lines(self) -> list[dict]:
        """What it has printed."""
        try:
            return [
                json.loads(line)
                for line in (self.folder / "stdout").read_text().splitlines(keepends=True)
                if "\n" in line
            ]
        except FileNotFoundError:
            return []

    def wait_until_ready(self) -> Run:
        """Wait until it begins to work."""
        end = time.monotonic() + PATIENCE
        while not self.lines() and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        return self

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> bool:
        """kill -9; whether it was still alive."""
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join(PATIENCE)
        return alive

    def finish(self) -> tuple[int, str]:
        """Its exit status and what it wrote to standard error, once it has ended."""
        self.process.join(PATIENCE)
        said = (self.folder / "stderr").read_text() if (self.folder / "stderr").exists() else ""
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"a process hangs: {said[-2000:]}")
        return self.process.exitcode, said


def results(out: Path) -> dict[str, bytes]:
    """Everything under a final name, by path."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("patches", "embeddings", "masks", "contours")
        for path in sorted((out / folder).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def leftovers(out: Path) -> list[str]:
    """Whatever is neither a result nor a log."""
    kept = {"patches", "embeddings", "masks", "contours", "runs"}
    hidden = [path for path in out.rglob(".*") if path.is_file()]
    return [str(path.relative_to(out)) for path in [*hidden, *out.glob("claims/*")]] + [
        path.name for path in out.iterdir() if path.name not in {*kept, "claims", "failures"}
    ]


@pytest.fixture(scope="module")
def undisturbed(slides, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """The files of an undisturbed run, and the number of patches that it encoded."""
    folder = tmp_path_factory.mktemp("undisturbed")
    log = folder / "log"
    status, error = Run(folder / "out", slides, STAND_IN_LOG=log).finish()
    assert status == 0, error
    patches = sum(map(int, log.read_text().split()))
    assert patches > 60
    return results(folder / "out"), patches


def check_final_names(out: Path, expected: dict[str, bytes]) -> None:
    for name, content in results(out).items():
        assert content == expected[name], name


def test_processes_that_are_killed_at_random_moments(slides, undisturbed, tmp_path, table):
    """Two at a time on one folder, each restarted when it was killed, in another order of slides."""
    expected, patches = undisturbed
    generator, kills = random.Random(0), 20 if ALL else 5
    out, log = tmp_path / "out", tmp_path / "log"
    running: list[Run] = []
    killed = 0
    while True:
        while len(running) < 2:
            order = generator.sample(slides, len(slides))
            running.append(Run(out, order, STAND_IN_BATCH_SECONDS=0.06, STAND_IN_LOG=log).wait_until_ready())
        time.sleep(generator.uniform(0.0, 0.5))
        if killed < kills:
            killed += running.pop(generator.randrange(2)).kill()
            check_final_names(out, expected)
            if len(results(out)) == len(expected):  # too quick for so many kills: from the beginning
                running.pop().kill()
                shutil.rmtree(out)
                log.unlink()
        else:
            break
    statuses = [process.finish()[0] for process in running]
    assert statuses == [0, 0]
    assert results(out) == expected
    assert leftovers(out) == []
    # Of each killed process, at most the batches in work: one on the device, one that was being stored.
    again = sum(map(int, log.read_text().split())) - patches
    assert again <= 2 * BATCH * killed
    table("kill -9 of one of two processes", killed, killed, f"{again} patches encoded twice of {patches}")


@pytest.mark.parametrize("count", [2, 4])
def test_processes_on_one_folder_in_different_orders(slides, undisturbed, tmp_path, table, count):
    expected, patches = undisturbed
    generator, rounds = random.Random(count), 3 if ALL else 1
    for at in range(rounds):
        out, log = tmp_path / f"out{at}", tmp_path / f"log{at}"
        processes = [Run(out, generator.sample(slides, len(slides)), STAND_IN_LOG=log) for _ in range(count)]
        said: Counter[str] = Counter()
        for process in processes:
            status, error = process.finish()
            assert status == 0, error
            said.update(next(iter(line.values())) for line in process.lines()[1:])
        assert sum(map(int, log.read_text().split())) == patches  # each patch exactly once
        assert said["finished"] + said["empty"] == len(slides)
        assert results(out) == expected
        assert leftovers(out) == []
    table(f"{count} processes in different orders", rounds, rounds, "nothing")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_processes_that_are_asked_to_stop(slides, undisturbed, tmp_path, table, number):
    expected, patches = undisturbed
    generator, rounds = random.Random(int(number)), 8 if ALL else 2
    out, log = tmp_path / "out", tmp_path / "log"
    for _ in range(rounds):
        process = Run(out, slides, STAND_IN_BATCH_SECONDS=0.05, STAND_IN_LOG=log).wait_until_ready()
        time.sleep(generator.uniform(0, 0.6))
        process.signal(number)
        status, error = process.finish()
        assert status in (0, 130), error
        assert "Traceback" not in error
        check_final_names(out, expected)
        assert list(out.glob("claims/*")) == []
    assert Run(out, slides, STAND_IN_LOG=log).finish()[0] == 0
    assert results(out) == expected
    assert leftovers(out) == []
    again = sum(map(int, log.read_text().split())) - patches
    table(number.name, rounds, rounds, f"{again} patches encoded twice")


def test_a_folder_that_vanishes(slides, undisturbed, tmp_path, table):
    """Somebody removes a folder of the results in mid-run: errors, and the next run makes everything again."""
    expected, _ = undisturbed
    generator, names = random.Random(1), ["patches", "embeddings", "claims", "masks", "runs", "."]
    names = names if ALL else names[:3]
    for name in names:
        out = tmp_path / f"out-{name}"
        process = Run(out, slides, STAND_IN_BATCH_SECONDS=0.05).wait_until_ready()
        time.sleep(generator.uniform(0.2, 0.6))
        shutil.rmtree(out / name, ignore_errors=True)
        status, error = process.finish()
        assert status in (0, 1), error
        assert "Traceback" not in error
        check_final_names(out, expected)
        assert Run(out, slides).finish()[0] == 0
        assert results(out) == expected
    table("a folder removed in mid-run", len(names), len(names), "what was in it, made again")


def test_a_full_disk(slides, undisturbed, tmp_path, table):
    """A file system that is too small for the results, then large enough."""
    expected, _ = undisturbed
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here; ENOSPC is injected in test_faults.py")
    sizes = [64, 100, 160, 220, 300] if ALL else [64, 160]
    try:
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            status, error = Run(disk / "out", slides).finish()
            assert status == 1, error
            assert "Traceback" not in error
            check_final_names(disk / "out", expected)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        # Failures of three runs put a slide aside: they are told from a full disk, which is no fault of the slide.
        status, error = Run(disk / "out", slides).finish()
        assert status == 0, error
        assert results(disk / "out") == expected
        assert leftovers(disk / "out") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    table("a full disk", len(sizes), len(sizes), "nothing")


def test_a_stopped_process_wakes_up_after_its_slide_was_taken(slides, undisturbed, tmp_path, table):
    """Its claim is taken over as stale; when it goes on, it must not publish or interleave anything."""
    expected, _ = undisturbed
    generator, rounds = random.Random(2), 6 if ALL else 2
    for at in range(rounds):
        out = tmp_path / f"out{at}"
        first = Run(out, slides, STAND_IN_BATCH_SECONDS=0.05, STAND_IN_STALE_AFTER=0.5).wait_until_ready()
        time.sleep(generator.uniform(0.1, 0.8))
        first.signal(signal.SIGSTOP)
        status, error = Run(out, slides[::-1], STAND_IN_STALE_AFTER=0.5).finish()
        assert status == 0, error
        assert results(out) == expected
        first.signal(signal.SIGCONT)
        status, error = first.finish()
        assert status == 0, error
        assert results(out) == expected
        assert leftovers(out) == []
    table("a process stopped until its claim is stale", rounds, rounds, "nothing")


def test_no_home_and_closed_streams(slides, undisturbed, tmp_path, table):
    expected, _ = undisturbed
    out = tmp_path / "out"
    status, error = Run(out, slides, HOME=None, USER=None, LOGNAME=None, TMPDIR=None).finish()
    assert status == 0, error
    assert results(out) == expected
    # A reader that goes away after the first line: the run may end, but nothing is broken.
    out = tmp_path / "closed"
    command = [sys.executable, cohort_stand_ins.__file__, str(out), *map(str, slides)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        assert process.wait(PATIENCE) is not None
    check_final_names(out, expected)
    assert Run(out, slides).finish()[0] == 0
    assert results(out) == expected
    table("no HOME; streams closed", 2, 2, "nothing")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("patches/b.h5", lambda path: read_patches(path).coords.tobytes()),
        ("patches/b_features.h5", lambda path: read_features(path).features.tobytes()),
        ("embeddings/b.h5", lambda path: read_embedding(path).slide_embedding.tobytes()),
    ],
)
def test_changed_bits(slides, undisturbed, tmp_path, table, name, read):
    """In any place of a stored file: refused, or read with the same numbers; and a run makes it again, or keeps it."""
    expected, _ = undisturbed
    generator, flips = random.Random(name), 200
    path = tmp_path / Path(name).name
    path.write_bytes(expected[name])
    content = read(path)
    refused = 0
    for _ in range(flips):
        damaged = bytearray(expected[name])
        place = generator.randrange(8 * len(damaged))
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except ExaonePathError:
            refused += 1
        else:
            assert found == content, f"bit {place}"
    assert refused > flips // 10
    # A whole run on top of damaged results.
    out, rounds = tmp_path / "out", 6 if ALL else 1
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        for file, data in expected.items():
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(data)
        damaged = bytearray(expected[name])
        place = generator.randrange(8 * len(damaged))
        damaged[place // 8] ^= 1 << place % 8
        (out / name).write_bytes(damaged)
        status, error = Run(out, slides).finish()
        assert status == 0, error
        for file, data in results(out).items():
            if file.endswith(".h5"):
                assert same_content(tmp_path, data, expected[file]), file
    table(f"changed bits in {name}", flips + rounds, flips + rounds, f"{refused} refused, the others change nothing")


def same_content(folder: Path, one: bytes, other: bytes) -> bool:
    """Whether two HDF5 files have the same datasets and attributes: a bit of no meaning may differ."""
    paths = [folder / "one.h5", folder / "other.h5"]
    for path, data in zip(paths, (one, other), strict=True):
        path.write_bytes(data)
    with h5py.File(paths[0]) as a, h5py.File(paths[1]) as b:
        names: list[str] = []
        b.visit(names.append)
        return dict(a.attrs).keys() == dict(b.attrs).keys() and all(
            name in a and (isinstance(b[name], h5py.Group) or a[name][()].tobytes() == b[name][()].tobytes())
            for name in names
        )
