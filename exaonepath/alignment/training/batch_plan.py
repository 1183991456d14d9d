"""The patients of each step, chunk and process. The plan depends only on the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from exaonepath.errors import SettingsError

# Patients, epoch, and the seed of the chunk's dropout.
PlannedChunk = tuple[tuple[str, ...], int, int]


@dataclass(frozen=True)
class BatchPlan:
    """Batches of a run, each in chunks of patients that are encoded together.

    Attributes:
        patients: patients of the training part.
        batch_size: patients of one step. chunk_size: patients of one chunk; the last of a batch may be smaller.
        total: steps of the run.
        seed: seed of the order of patients and of dropout.
    """

    patients: tuple[str, ...]
    batch_size: int
    chunk_size: int
    total: int
    seed: int

    @staticmethod
    def of(
        patients: Sequence[str], *, batch_size: int, chunk_size: int, epochs: int, steps: int, seed: int, processes: int
    ) -> BatchPlan:
        """The plan of `steps` steps or, if that is 0, of `epochs` passes; `chunk_size` 0: one chunk per process.

        Raises:
            SettingsError: a process would have no chunk.
        """
        batch = min(batch_size, len(patients))
        chunk = chunk_size or -(-batch // processes)
        plan = BatchPlan(tuple(patients), batch, chunk, 0, seed)
        if plan.chunks_per_step < processes:
            raise SettingsError(
                f"a batch of {batch} in chunks of {chunk} gives {plan.chunks_per_step} chunks for {processes} "
                "processes: every process needs one; lower run.chunk_size"
            )
        return BatchPlan(plan.patients, batch, chunk, steps or epochs * plan.steps_per_epoch, seed)

    @property
    def chunks_per_step(self) -> int:
        """Chunks of one batch, over all processes."""
        return -(-self.batch_size // self.chunk_size)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches. The remaining patients of an epoch are different ones in every epoch."""
        return max(1, len(self.patients) // self.batch_size)

    def steps(self, first: int, rank: int, processes: int) -> Iterator[tuple[int, list[PlannedChunk]]]:
        """From step `first` on: (step, chunks of process `rank`).

        A process gets contiguous chunks, so that the rows of all processes have the same order as in one process.
        """
        low, high = (self.chunks_per_step * r // processes for r in (rank, rank + 1))
        order: list[str] = []
        known_epoch = -1
        for step in range(first, self.total):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != known_epoch:
                shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self.patients))
                order, known_epoch = [self.patients[i] for i in shuffled], epoch
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            parts = [tuple(batch[i : i + self.chunk_size]) for i in range(0, len(batch), self.chunk_size)]
            yield step, [(parts[i], epoch, derive_seed(self.seed, step, i)) for i in range(low, high)]


def derive_seed(*parts: int) -> int:
    """A seed that depends on all of `parts`."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
