"""Batches that are read ahead: equal for any number of workers, by workers that stay, whatever signal they get."""

import json
import os
import pickle
import shutil
import signal
from dataclasses import replace

import pytest

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.training.batch_plan import BatchPlan
from exaonepath.alignment.training.loading import _Batches, read_batches
from exaonepath.alignment.training.run import prepare
from exaonepath.errors import DamagedFileError


def _digest(batch):
    slides = batch.slides
    return (
        batch.patients,
        None if slides is None else (slides.lengths, float(slides.features.double().sum()), slides.coords.sum().item()),
        {name: float(profile.double().sum()) for name, profile in batch.profiles.items()},
    )


def test_batches_depend_on_the_plan_only(make_settings):
    base = make_settings()
    data = prepare(replace(base, data=replace(base.data, max_patches=9))).data
    plan = BatchPlan.of(data.train, batch_size=8, chunk_size=3, epochs=3, steps=0, seed=4, processes=1)

    def read(workers, first=0):
        found = data.chunks(plan.steps(first, 0, 1), workers=workers)
        return [(step, [(chunk.seed, _digest(chunk.batch)) for chunk in chunks]) for step, chunks in found]

    expected = read(0)
    assert len(expected) == plan.total
    assert expected[0] != expected[plan.steps_per_epoch]
    for workers in (1, 2):
        assert read(workers) == expected
    assert read(1, first=4) == expected[4:]
    patients, rows = data.validation, list(range(len(data.validation)))
    batches = [[(r, _digest(b)) for r, b in data.evaluation_batches(patients, rows, 2, workers=w)] for w in (0, 1, 8)]
    assert batches[0] == batches[1] == batches[2]
    assert list(data.evaluation_batches(patients, [], 2, workers=2)) == []


class _WhoReads:
    """Stands for a data set: the patients of a batch are the process that read it."""

    def batch(self, rows, epoch):
        return PatientBatch(1, patients=(str(os.getpid()),))


def test_workers_stay_and_read_ahead():
    asked = []

    def requests():
        for epoch in range(4):
            for row in range(5):
                asked.append((epoch, row))
                yield epoch, [row]

    batches = read_batches(_WhoReads(), requests(), workers=2)
    first = next(batches)
    assert 2 < len(asked) < 10
    pids = {batch.patients[0] for batch in [first, *batches]}
    assert len(asked) == 20
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_the_error_without_one(make_settings, tmp_path, cohort_folder, workers):
    base = make_settings()
    shutil.copytree(cohort_folder, tmp_path / "cohort")
    slides = str(tmp_path / "cohort" / "slides.csv")
    data = prepare(replace(base, data=replace(base.data, slides=slides))).data
    bad = next(slide for slide in data.cohort.slides.slides if slide.patient in data.train)
    bad.features.write_bytes(bad.features.read_bytes()[:5000])
    with pytest.raises(DamagedFileError) as raised:
        list(read_batches(data._training, [(0, [data._number[bad.patient]])], workers=workers))
    assert str(raised.value).startswith(f"{bad.features} is damaged")
    assert "Traceback" not in str(raised.value)


def test_a_worker_that_is_not_forked_can_be_sent_the_data(make_settings):
    data = prepare(make_settings()).data
    copy = pickle.loads(pickle.dumps(_Batches(data._training)))  # noqa: S301 - as a loader does it
    assert _digest(copy[1, [0, 3]]) == _digest(_Batches(data._training)[1, [0, 3]])


def test_a_signal_to_all_processes_of_a_job_ends_the_run_with_a_checkpoint(warm_package, make_settings, tmp_path):
    """A scheduler sends SIGTERM to workers too. The training process still needs their batches for its last step."""
    base = make_settings()
    # Without slides: opening a file of features would set a handler in the worker anyway.
    data = replace(base.data, modalities=("rna", "cnv"))
    settings = replace(base, data=data, run=replace(base.run, epochs=40, num_workers=2))
    code = f"""
import json, os, signal, subprocess, time
os.setsid()
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings

def stop(step, total, row):
    if step == 3:  # from another process: workers take a signal of their parent for the end of the run
        subprocess.run(["sh", "-c", f"trap '' TERM; kill -TERM -{{os.getpgid(0)}}"], check=True)
        time.sleep(0.5)

settings = build_settings(json.loads({json.dumps(json.dumps(settings.as_dict()))}))
result = train(settings, "run", progress=stop)
print(json.dumps([result.step, result.finished]))
"""
    done = warm_package.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    step, finished = json.loads(done.stdout)
    assert 3 <= step <= 5
    assert not finished
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
