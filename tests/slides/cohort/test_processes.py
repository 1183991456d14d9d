"""Several processes on one output folder, killed, paused and interrupted: every slide once, always the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

from cohort_stand_ins import results

from exaonepath.files.atomic import _process_space
from exaonepath.slides.cohort.claim_file import read_claim
from exaonepath.slides.cohort.run_log import read_run_log

PATIENCE = 120


def wait_until(condition, process=None):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def logged(out: Path, event: str) -> list[dict]:
    return [row for path in (out / "runs").iterdir() for row in read_run_log(path) if row["event"] == event]


def encoded(out: Path) -> Counter:
    """How often each slide was encoded, as the logs state it."""
    return Counter(row["slide"] for row in logged(out, "stage") if row["stage"] == "slide" and not row["reused"])


def assert_as_reference(out: Path, reference: dict[str, bytes], copies=()) -> None:
    found = results(out)
    assert not [name for name in found if Path(name).name.startswith(".")]
    assert not list((out / "claims").iterdir())
    if not copies:
        assert found == reference


def test_four_processes_in_different_orders(start, slide_files, tmp_path, reference):
    """Every slide is encoded once, and all exit 0."""
    out = tmp_path / "out"
    orders = [slide_files, slide_files[::-1], slide_files[2:] + slide_files[:2], slide_files]
    running = [start(out, order, STAND_IN_BATCH_SECONDS=0.02) for order in orders]
    ends = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0], ends
    assert_as_reference(out, reference)
    assert encoded(out) == dict.fromkeys("abcd", 1)
    for stdout, _ in ends:
        told = {}
        for line in stdout.splitlines()[1:]:
            told.update(json.loads(line))
        assert told.keys() >= set("abcd"), "each process tells what became of every slide"


def test_kill_9_and_takeover(start, slide_files, tmp_path, reference):
    """One process is killed in mid-slide while another waits: the other continues it from its last batch."""
    out, slide = tmp_path / "out", slide_files[:1]
    victim = start(out, slide, STAND_IN_DIE_AT=24)
    victim.communicate(PATIENCE)
    assert victim.returncode == -signal.SIGKILL
    assert read_claim(out / "claims" / "a.json") is not None
    (part,) = (out / "patches").glob(".a_features.h5.*.part")
    kept = part.stat().st_size
    other = start(out, slide)
    stdout, stderr = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, stderr
    assert kept > 0
    assert json.loads(stdout.splitlines()[1])["a"] == "finished"
    for name, content in results(out).items():
        assert content == reference[name]
    (row,) = [row for row in logged(out, "stage") if row["stage"] == "features"]
    assert row["patches"] > 0
    assert_as_reference(out, reference, copies=slide)


def test_a_paused_process_is_overtaken_and_ends_well(start, slide_files, tmp_path, reference):
    """SIGSTOP in mid-slide: its claim becomes stale, another process finishes the slide; then it wakes up."""
    out, slide = tmp_path / "out", slide_files[:1]
    sleeper = start(out, slide, STAND_IN_BATCH_SECONDS=0.1, STAND_IN_STALE_AFTER=1)
    wait_until(lambda: any(p.stat().st_size > 1500 for p in (out / "patches").glob(".a*.part")), sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    other = start(out, slide, STAND_IN_STALE_AFTER=1)
    _, stderr = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, stderr
    sleeper.send_signal(signal.SIGCONT)
    stdout, stderr = sleeper.communicate(timeout=PATIENCE)
    assert sleeper.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["a"] == "reused"
    for name, content in results(out).items():
        assert content == reference[name]
    assert_as_reference(out, reference, copies=slide)
    assert encoded(out) == {"a": 1}


def test_sigterm_releases_and_the_next_run_continues(start, slide_files, tmp_path, reference):
    out = tmp_path / "out"
    first = start(out, slide_files, STAND_IN_BATCH_SECONDS=0.05)
    wait_until(lambda: any(p.stat().st_size > 1500 for p in (out / "patches").glob(".b*.part")), first)
    first.send_signal(signal.SIGTERM)
    _, stderr = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, stderr
    assert list((out / "claims").iterdir()) == []
    second = start(out, slide_files)
    _, stderr = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, stderr
    assert_as_reference(out, reference)
    assert encoded(out) == dict.fromkeys("abcd", 1)


def test_temporary_files_of_killed_processes_are_removed(start, slide_files, tmp_path):
    """Also of a file that another process has finished since, so that nobody writes it again."""
    out = tmp_path / "out"
    assert start(out, slide_files).communicate()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [out / folder / f".a.h5.{_process_space()}-{dead.pid}-0123abcd.tmp" for folder in ("patches", "embeddings")]
    of_a_living = out / "patches" / f".a.h5.{_process_space()}-{os.getpid()}-0123abcd.tmp"
    for path in (*left, of_a_living):
        path.touch()
    process = start(out, slide_files)
    process.communicate()
    assert process.returncode == 0
    assert [path.exists() for path in left] == [False, False]
    assert of_a_living.exists()


def test_random_kills(start, slide_files, tmp_path, reference):
    """kill -9 at random moments, again and again, two processes at a time: the files of an undisturbed run."""
    out, random = tmp_path / "out", Random(5)
    for _ in range(8):
        orders = [slide_files, slide_files[::-1]]
        running = [start(out, order, STAND_IN_BATCH_SECONDS=0.01) for order in orders]
        time.sleep(random.uniform(0.02, 0.6))
        victim = random.choice(running)
        victim.send_signal(signal.SIGKILL)
        if random.random() < 0.5:  # the other one goes on, or is killed too
            for process in running:
                process.send_signal(signal.SIGKILL)
        for process in running:
            process.communicate(PATIENCE)
    last = start(out, slide_files)
    _, stderr = last.communicate(PATIENCE)
    assert last.returncode == 0, stderr
    assert_as_reference(out, reference)
