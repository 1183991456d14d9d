"""The log of a run: lines of metrics.jsonl, and the same numbers as TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from exaonepath.alignment.training.monitors import HealthWarning
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.errors import MissingDependencyError


class RunLog:
    """Rows of one run; only the main process writes them."""

    def __init__(self, folder: RunFolder, *, is_main: bool, tensorboard: bool) -> None:
        self._folder, self._is_main, self._tensorboard = folder, is_main, tensorboard
        self._board: Any = None

    @contextmanager
    def opened(self, step: int) -> Iterator[RunLog]:
        """The log, with event files that continue after `step` if the settings request them."""
        if not (self._tensorboard and self._is_main):
            yield self
            return
        self._board = summary_writer()(str(self._folder.path / "tensorboard"), purge_step=step + 1 if step else None)
        try:
            yield self
        finally:
            self._board.close()
            self._board = None

    def row(self, row: Mapping[str, Any]) -> None:
        """Write the row of a training step or a validation; it has "kind" and "step"."""
        if not self._is_main:
            return
        self._folder.append(row)
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    step = row.get("slide_step", row["step"])  # the start of the slide encoder has steps of its own
                    self._board.add_scalar(f"{row['kind']}/{key}", value, step)

    def warnings(self, warnings: Iterable[HealthWarning]) -> None:
        """Write the warnings of the health monitors."""
        if self._is_main:
            for warning in warnings:
                self._folder.append({"kind": "warning", **warning.as_dict()})


def summary_writer() -> Callable[..., Any]:
    """TensorBoard's writer class; raises `MissingDependencyError` if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise MissingDependencyError(
            "run.tensorboard needs tensorboard: pip install 'exaonepath[train]', or set run.tensorboard = false"
        ) from exc
    writer: Callable[..., Any] = SummaryWriter
    return writer
