"""Worker processes: who gets which slide, and what happens when they die.

A spawned process imports torch and transformers first, which takes seconds; so only one test spawns, and the others
fork, which is safe here: no thread runs in the test's process, and torch uses one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
import torch
from cohort_stand_ins import results

from exaonepath.errors import DeviceError, SettingsError, WeightsError, WorkerError
from exaonepath.slides.cohort.batch_system import parse_shard
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.dispatch import CohortWork, in_order
from exaonepath.slides.cohort.run_log import read_run_log
from exaonepath.slides.cohort.run_options import RunOptions
from exaonepath.slides.cohort.worker import only_visible
from exaonepath.slides.cohort.worker_devices import worker_devices
from exaonepath.slides.cohort.workers import encode_with_workers
from exaonepath.slides.stages import EncodeSettings

OPTIONS = RunOptions(poll=(0.05, 0.2))


@pytest.fixture
def encode(stand_ins, slides, tmp_path, monkeypatch):
    """Run workers on the slides: an iterator of outcomes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def encode(slides=slides, out=tmp_path / "out", workers=2, options=OPTIONS, load=stand_ins.load, **arguments):
        settings = EncodeSettings(**stand_ins.SETTINGS)
        work = CohortWork(slides, out, "stand-in", settings, options, load)
        return encode_with_workers(work, ["cpu"] * workers, **arguments)

    return encode


@pytest.fixture
def forked(monkeypatch, forkable):
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def kinds(outcomes) -> dict[str, str]:
    return {outcome.slide.id: outcome.outcome for outcome in outcomes}


def test_workers_give_the_files_of_one_process(encode, slides, tmp_path, reference):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    seen = []
    outcomes = list(
        encode([*slides, CohortSlide(broken, "broken")], progress=lambda slide, done, total: seen.append(slide.id))
    )
    assert kinds(outcomes) == {"a": "finished", "b": "finished", "c": "empty", "d": "finished", "broken": "failed"}
    (error,) = [outcome.error for outcome in outcomes if outcome.error]
    assert "broken.svs" in str(error)
    assert results(tmp_path / "out") == reference
    assert list((tmp_path / "out" / "claims").iterdir()) == []
    assert set(seen) == set("abcd")
    logs = [list(read_run_log(path)) for path in (tmp_path / "out" / "runs").iterdir()]
    (parent,) = [rows for rows in logs if rows[0]["engine"] == "workers"]
    workers = [rows for rows in logs if rows[0]["engine"] == "worker"]
    assert len(workers) == 2
    assert {rows[0]["group"] for rows in logs} == {parent[0]["run"]}
    done = sorted(row["slide"] for rows in workers for row in rows if row["event"] == "slide")
    assert done == ["a", "b", "broken", "c", "d"]
    assert parent[-1]["exit_status"] == 1


@pytest.mark.usefixtures("forked")
def test_a_killed_worker_loses_nothing_that_was_stored(encode, slides, tmp_path, reference):
    """SIGKILL in mid-slide: its slides are continued by another worker, and every file is as ever."""
    killed = []

    def progress(slide, done, total):
        if slide.id == "a" and done >= 8 and not killed:
            claim = json.loads((tmp_path / "out" / "claims" / "a.json").read_text())
            os.kill(claim["pid"], signal.SIGKILL)
            killed.append(claim["pid"])

    outcomes = list(encode(slides[:2], workers=1, progress=progress))
    assert killed
    assert kinds(outcomes) == {"a": "finished", "b": "finished"}
    for name, content in results(tmp_path / "out").items():
        assert content == reference[name]
    assert not list((tmp_path / "out").glob("failures/*"))


@pytest.mark.usefixtures("forked")
def test_a_slide_that_kills_its_worker_is_quarantined(encode, slides, tmp_path, stand_ins):
    """Each worker dies in the first batch of a: three tries, and the other slide is finished nevertheless."""
    outcomes = list(encode([slides[0], slides[2]], workers=1, load=stand_ins.deadly))
    assert kinds(outcomes) == {"a": "failed", "c": "empty"}
    (error,) = [outcome.error for outcome in outcomes if outcome.error]
    assert isinstance(error, WorkerError)
    assert "SIGKILL" in str(error)
    record = json.loads((tmp_path / "out" / "failures" / "a.json").read_text())
    assert (record["tries"], record["error"]) == (3, "WorkerError")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("way", ["close", "interrupt"])
def test_the_end_of_the_run_ends_all_workers(encode, slides, tmp_path, way):
    """Ctrl-C, or a consumer that stops: claims are released, what was stored stays."""
    if way == "close":
        outcomes = encode(workers=2)
        next(outcomes)
        outcomes.close()
    else:

        def progress(slide, done, total):
            if done >= 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(encode(workers=2, progress=progress))
    assert list((tmp_path / "out" / "claims").iterdir()) == []
    assert multiprocessing.active_children() == []
    logs = (tmp_path / "out" / "runs").iterdir()
    ends = [row for path in logs for row in read_run_log(path) if row["event"] == "end"]
    assert {row["exit_status"] for row in ends} == {130}


@pytest.mark.usefixtures("forked")
def test_an_error_of_a_worker_s_start_is_raised_once(encode, stand_ins):
    with pytest.raises(WeightsError, match="no such weights"):
        list(encode(workers=1, load=stand_ins.no_weights))


@pytest.mark.usefixtures("forked")
def test_workers_that_die_at_the_start_end_the_run(encode, stand_ins):
    with pytest.raises(WorkerError, match="SIGKILL before it began, 3 times"):
        list(encode(workers=1, load=stand_ins.dies_while_loading))


def test_the_largest_slides_come_first_in_each_part(tmp_path):
    slides = []
    for name, size in zip("abcdefgh", (1, 5, 3, 4, 8, 2, 7, 6), strict=True):
        (tmp_path / name).write_bytes(b"x" * size)
        slides.append(CohortSlide(tmp_path / name, name))
    slides.append(CohortSlide(tmp_path / "gone", "gone"))
    assert "".join(slide.id[0] for slide in in_order(slides[:8], OPTIONS)) == "eghbdcfa"
    half = RunOptions(shard=parse_shard("2/2"))
    assert "".join(slide.id[0] for slide in in_order(slides[:8], half)) == "eghfbdca"
    assert in_order(slides, OPTIONS)[-1].id == "gone"


def test_devices(monkeypatch):
    assert worker_devices(None, "cpu", 3) == ["cpu"] * 3
    assert worker_devices("cpu", jobs=2) == ["cpu"] * 2
    with pytest.raises(DeviceError, match="twice"):
        worker_devices("cpu, cpu")
    with pytest.raises(SettingsError, match="not both"):
        worker_devices("all", "cpu")
    with pytest.raises(SettingsError, match="positive"):
        worker_devices(None, "cpu", 0)
    with pytest.raises(DeviceError, match="unknown device"):
        worker_devices("toaster")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--jobs N"):
        worker_devices("all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worker_devices("all") == ["cuda:0", "cuda:1"]
    assert worker_devices("all", jobs=2) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cuda:1", None, "1"),
        ("cuda", None, "0"),
        ("cuda:1", "4, 7", "7"),
        ("cuda:0", "GPU-1a,GPU-2b", "GPU-1a"),
        ("cuda:3", "", "3"),
    ],
)
def test_a_worker_sees_its_device_only(device, before, after):
    environment = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
    assert only_visible(device, environment) == torch.device("cuda:0")
    assert environment == {"CUDA_VISIBLE_DEVICES": after}
    assert only_visible("cpu", environment) == torch.device("cpu")
