"""How many processors this process may use: of the machine, of its container, and of its job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# A scheduler may count processors without enforcing it. Each of these is for one process (task) of a job.
_SCHEDULERS = ("SLURM_CPUS_PER_TASK", "LSB_DJOB_NUMPROC", "NCPUS", "PBS_NCPUS", "NSLOTS")


def usable_processors(environment: Mapping[str, str] | None = None) -> int:
    """The number of processors that threads of this process can keep busy; at least 1.

    The least of: the processors of the machine, the affinity of the process, the quota of its cgroups (version 1 or 2),
    and what SLURM, LSF, PBS or Grid Engine gave to the job.
    """
    values = os.environ if environment is None else environment
    limits = [_affinity(), *_quotas()]
    for name in _SCHEDULERS:
        text = values.get(name, "").strip()
        if text.isascii() and text.isdigit():
            limits.append(int(text))
    return max(1, min(limits))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on macOS and Windows
        return os.cpu_count() or 1


def _quotas() -> Iterator[int]:
    """Processors that each cgroup of this process, and each cgroup around it, may use; rounded up."""
    for folder in _folders():
        try:
            quota, period = (folder / "cpu.max").read_text().split()[:2]  # version 2: "max 100000", or two numbers
        except (OSError, ValueError):
            try:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()  # version 1: -1, or a number
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            except OSError:
                continue
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            yield max(1, -(-int(quota) // int(period)))


def _folders() -> Iterator[Path]:
    """The folders of this process's cgroups, and those around them."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = controllers.split(",")
        roots = [_CGROUPS] if not controllers else [_CGROUPS / controllers, _CGROUPS / "cpu"] if "cpu" in names else []
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for length in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:length])
