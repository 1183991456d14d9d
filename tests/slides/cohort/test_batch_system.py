"""Where a process of a cluster's job begins in the list of slides."""

from __future__ import annotations

from itertools import pairwise

import pytest

from exaonepath.errors import SettingsError
from exaonepath.slides.cohort.batch_system import Shard, begin_at, job_id, parse_shard, shard_of_job


def first(environment, slides=100):
    return begin_at(range(slides), shard_of_job({k: str(v) for k, v in environment.items()}))[0]


def test_every_shard_has_all_slides_and_begins_with_its_own():
    slides = list("abcdefg")
    for n in range(1, 12):
        starts = [begin_at(slides, parse_shard(f"{k}/{n}")) for k in range(1, n + 1)]
        assert all(sorted(order) == slides for order in starts)
        assert [slides.index(order[0]) for order in starts] == [k * 7 // n for k in range(n)]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "-1/4", "1", "a/b", "1/4/2", "", "1.5/3", "٣/4"])
def test_a_shard_out_of_range(text):
    with pytest.raises(SettingsError, match="shard"):
        parse_shard(text)


def test_arrays_of_slurm():
    for least, step in ((0, 1), (1, 1), (10, 5)):
        tasks = [
            first({"SLURM_ARRAY_TASK_ID": least + step * k, "SLURM_ARRAY_TASK_COUNT": 4, "SLURM_ARRAY_TASK_MIN": least,
                   "SLURM_ARRAY_TASK_STEP": step})
            for k in range(4)
        ]  # fmt: skip
        assert tasks == [0, 25, 50, 75]


def test_tasks_of_slurm_and_tasks_in_an_array():
    assert [first({"SLURM_PROCID": k, "SLURM_NTASKS": 4}) for k in range(4)] == [0, 25, 50, 75]
    array = {"SLURM_ARRAY_TASK_COUNT": 2, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_NTASKS": 2}
    found = [first({**array, "SLURM_ARRAY_TASK_ID": j, "SLURM_PROCID": k}) for j in (0, 1) for k in (0, 1)]
    assert found == [0, 25, 50, 75]


def test_lsf_and_pbs():
    assert [first({"LSB_JOBINDEX": k, "LSB_JOBINDEX_END": 4}) for k in (1, 2, 3, 4)] == [0, 25, 50, 75]
    assert first({"LSB_JOBINDEX": 0}) == 0
    for name in ("PBS_ARRAY_INDEX", "LSB_JOBINDEX", "SLURM_ARRAY_TASK_ID"):
        starts = sorted(first({name: k}, 1000) for k in range(1, 9))
        assert all(b - a > 50 for a, b in pairwise(starts))


@pytest.mark.parametrize("value", ["", "x", "4294967294x", "1e3"])
def test_variables_that_make_no_sense_are_ignored(value):
    assert shard_of_job({"SLURM_ARRAY_TASK_ID": value, "SLURM_PROCID": value, "PBS_ARRAY_INDEX": value}) == Shard()


def test_the_job_s_id():
    assert job_id({}) == ""
    assert job_id({"SLURM_JOB_ID": "5"}) == "slurm:5"
    assert job_id({"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "2"}) == "slurm:4_2"
    assert job_id({"LSB_JOBID": "9"}) == "lsf:9"
    assert job_id({"PBS_JOBID": "9.server"}) == "pbs:9.server"
