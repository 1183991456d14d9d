"""What a cluster's scheduler tells a process: the id of its job, and which part of the slides to begin with."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from exaonepath.errors import SettingsError

T = TypeVar("T")

_GOLDEN = (math.sqrt(5) - 1) / 2


class Shard(NamedTuple):
    """Where a process begins in the list of slides: after this fraction of them. It decides nothing else.

    Attributes:
        begin: from 0 to 1, without 1.
        parts: number of parts; 0 if the scheduler does not tell it.
        source: the option or variable that it was taken from; empty without any.
    """

    begin: float = 0.0
    parts: int = 1
    source: str = ""


def parse_shard(text: str) -> Shard:
    """The shard for "k/n": the k-th of n parts, with k from 1 to n.

    Raises:
        SettingsError: it is not of this form, or k is not from 1 to n.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
    if match is None:
        raise SettingsError(f"a shard is written k/n, such as 1/4 to 4/4, not {text!r}")
    k, n = int(match[1]), int(match[2])
    if not 1 <= k <= n:
        raise SettingsError(f"shard {text} is out of range: of {n} shards, the first is 1/{n}, the last {n}/{n}")
    return Shard((k - 1) / n, n, "shard")


def shard_of_job(environment: Mapping[str, str] | None = None) -> Shard:
    """The shard that the variables of SLURM, LSF or PBS imply; the whole list if there are none.

    In an array of jobs with several tasks each (SLURM), both numbers count. Where the number of jobs is not known
    (PBS), positions are chosen such that any number of jobs begins far from each other.
    """
    values = os.environ if environment is None else environment

    def number(name: str) -> int | None:
        text = values.get(name, "").strip()
        return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else None

    k, n, sources = 0, 1, []
    task, count = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT")
    if task is not None:
        if not count or count < 1:
            return _spread(task, "SLURM_ARRAY_TASK_ID")
        step = max(1, number("SLURM_ARRAY_TASK_STEP") or 1)
        k, n = (task - (number("SLURM_ARRAY_TASK_MIN") or 0)) // step % count, count
        sources.append("SLURM_ARRAY_TASK_ID")
    process, processes = number("SLURM_PROCID"), number("SLURM_NTASKS")
    if process is not None and processes is not None and 0 <= process < processes and processes > 1:
        k, n = k * processes + process, n * processes
        sources.append("SLURM_PROCID")
    if sources:
        return Shard(k / n, n, " and ".join(sources))
    index, end = number("LSB_JOBINDEX"), number("LSB_JOBINDEX_END")
    if index:  # 0: not an array
        if end is None or end < index:
            return _spread(index, "LSB_JOBINDEX")
        step = max(1, number("LSB_JOBINDEX_STEP") or 1)
        n = -(-end // step)
        return Shard((index - 1) // step % n / n, n, "LSB_JOBINDEX")
    for name in ("PBS_ARRAY_INDEX", "PBS_ARRAYID"):
        index = number(name)
        if index is not None:
            return _spread(index, name)
    return Shard()


def begin_at(slides: Sequence[T], shard: Shard) -> list[T]:
    """The slides in the order in which a process of this shard looks at them: all of them, from its own part on."""
    at = int(shard.begin * len(slides) + 1e-9)  # k/n in floating point may be a little less than it is
    return [*slides[at:], *slides[:at]]


def job_id(environment: Mapping[str, str] | None = None) -> str:
    """The id of this job as its scheduler's commands take it; empty outside a scheduler."""
    values = os.environ if environment is None else environment
    array, task = values.get("SLURM_ARRAY_JOB_ID"), values.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"slurm:{array}_{task}"
    for name, variable in (("slurm", "SLURM_JOB_ID"), ("lsf", "LSB_JOBID"), ("pbs", "PBS_JOBID")):
        if values.get(variable):
            return f"{name}:{values[variable]}"
    return ""


def _spread(index: int, source: str) -> Shard:
    # Multiples of the golden ratio, without their whole parts, fill the interval evenly, however many there are.
    return Shard(index * _GOLDEN % 1.0, 0, source)
