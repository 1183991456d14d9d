"""Reads batches of patients in advance, in processes that stay until the end of the plan."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.data.dataset import PatientDataset
from exaonepath.errors import ExaonePathError

# The epoch of the random choices, and rows of the data set.
Request = tuple[int, Sequence[int]]


class _Batches(Dataset[PatientBatch | ExaonePathError]):
    """Batches by request: so one loader, with the same workers, serves a whole run and reads across epochs.

    Errors are returned and raised by the training process: a loader would raise another error, with the worker's
    traceback as its message.
    """

    def __init__(self, rows: PatientDataset) -> None:
        self._rows = rows

    def __getitem__(self, request: Request) -> PatientBatch | ExaonePathError:
        epoch, rows = request
        try:
            return self._rows.batch(rows, epoch)
        except ExaonePathError as exc:
            return exc


def read_batches(rows: PatientDataset, requests: Iterable[Request], *, workers: int = 0) -> Iterator[PatientBatch]:
    """The batches of these requests, in order; a batch depends only on its request.

    Args:
        rows: the data set.
        requests: consumed a few batches ahead if there are workers.
        workers: processes that read; 0: batches are read when they are needed.

    Raises:
        DataFileError: a features file cannot be read, or has changed since the cohort was checked.
    """
    loader: DataLoader[PatientBatch | ExaonePathError] = DataLoader(
        _Batches(rows),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_signals,
        # A separate generator: a loader draws a number at its start, which would change torch's global generator.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, ExaonePathError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGTERM to the training process, which still needs batches for its last step.

    Both are often sent to all processes of a job. A worker ends when the training process ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
