"""The number of processors that a process may use."""

from __future__ import annotations

import os

import pytest

from exaonepath import processors
from exaonepath.processors import usable_processors
from exaonepath.slides.features.reader import default_workers


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(affinity, files, own)`: a machine with these files below /sys/fs/cgroup."""

    def make(affinity=64, files=(), own="0::/\n"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(processors, "_CGROUPS", tmp_path)
        monkeypatch.setattr(processors, "_OWN_CGROUPS", tmp_path / "own")

    return make


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "0::/\n", 64),
        ({"cpu.max": "max 100000\n"}, "0::/\n", 64),
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "1000 100000\n"}, "0::/\n", 1),
        ({"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, "0::/job/step\n", 3),
        ({"job/step/cpu.max": "400000 100000", "job/cpu.max": "900000 100000"}, "0::/job/step\n", 4),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "500000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
         "3:memory:/y\n2:cpu,cpuacct:/x\n", 5),
        ({"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu,cpuacct:/docker/f00\n", 6),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu:/\n", 64),
        ({"cpu.max": "nonsense"}, "0::/\n", 64),
        ({"cpu.max": ""}, "garbage", 64),
    ],
)  # fmt: skip
def test_cgroups(machine, files, own, expected):
    machine(files=files, own=own)
    assert usable_processors({}) == expected


def test_the_least_of_all_counts(machine):
    machine(affinity=8, files={"cpu.max": "400000 100000"})
    assert usable_processors({}) == 4
    assert usable_processors({"SLURM_CPUS_PER_TASK": "3"}) == 3
    assert usable_processors({"SLURM_CPUS_PER_TASK": "30", "NCPUS": "2"}) == 2
    for text in ("", "x", "-1", "0x3", "1(x2)"):
        assert usable_processors({"SLURM_CPUS_PER_TASK": text}) == 4
    assert usable_processors({"LSB_DJOB_NUMPROC": "0"}) == 1


def test_reading_threads_follow(machine, monkeypatch):
    machine(affinity=64)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert default_workers() == 5
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "50")
    assert default_workers() == 16
