"""Stop a run by a signal."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """SIGINT and SIGTERM end the run after the current step, with a checkpoint; a second one ends it immediately."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Install the handlers inside the `with` block, and restore the previous ones after it.

        Python allows handlers in the main thread only; in other threads nothing is installed.
        """

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
