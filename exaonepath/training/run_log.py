"""What a run says while it runs (metrics.jsonl, TensorBoard events), and the request to stop it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from exaonepath.errors import MissingDependencyError
from exaonepath.training.monitors import HealthWarning
from exaonepath.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class RunLog:
    """Rows of one run; silent on every process but the first."""

    def __init__(self, folder: RunFolder, *, is_main: bool, tensorboard: bool) -> None:
        self._folder, self._is_main, self._tensorboard = folder, is_main, tensorboard
        self._board: Any = None

    @contextmanager
    def opened(self, step: int) -> Iterator[RunLog]:
        """With event files that go on after `step`, where they are asked for."""
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
        """A training step or a validation; it has "kind" and "step"."""
        if not self._is_main:
            return
        self._folder.append(row)
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def warnings(self, warnings: Iterable[HealthWarning]) -> None:
        """What the health monitors found."""
        if self._is_main:
            for warning in warnings:
                self._folder.append({"kind": "warning", **warning.as_dict()})


class StopRequest:
    """SIGINT and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handlers inside the block, the former ones after it; only the main thread can have any."""

        def stop(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def summary_writer() -> Callable[..., Any]:
    """TensorBoard's writer class; raises `MissingDependencyError` where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise MissingDependencyError(
            "run.tensorboard needs tensorboard: pip install 'exaonepath[train]', or set run.tensorboard = false"
        ) from exc
    writer: Callable[..., Any] = SummaryWriter
    return writer
