"""SIGINT and SIGTERM that arrive inside a file operation act after it.

HDF5 calls back into Python, and h5py and finalizers swallow an exception that is raised there: a Ctrl-C at such a
moment would be lost and the run would go on. Inside `signals_held` a signal is only noted; its handler runs when the
outermost block ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)


class _Handler:
    """Stands in for the handler of one signal: notes the signal while held, else passes it on.

    It is harmless when it stays installed (a signal may arrive just before it is taken out again).
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.depth = 0
        self.arrived = False
        self.passes_to: Any = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.depth:
            self.arrived = True
        elif callable(self.passes_to):
            self.passes_to(number, frame)

    def hold(self) -> None:
        current: Any = signal.getsignal(self.number)
        # Without a Python handler there is nothing to hold back: the default action ends the process at once.
        if current is not self and callable(current):
            self.passes_to = current
            signal.signal(self.number, self)
        self.depth += 1

    def release(self) -> None:
        self.depth -= 1
        if self.depth:
            return
        passes_to, arrived = self.passes_to, self.arrived
        self.arrived = False
        current: Any = signal.getsignal(self.number)
        if current is self:
            signal.signal(self.number, passes_to)
        if arrived and callable(passes_to):
            passes_to(self.number, None)


_handlers = [_Handler(number) for number in _HELD]


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends; blocks may be nested.

    Only the main thread runs Python's signal handlers, so in any other thread there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[_Handler] = []
    try:
        for handler in _handlers:
            handler.hold()
            held.append(handler)
        yield
    finally:
        _release(held)


def _release(held: list[_Handler]) -> None:
    # A handler usually raises KeyboardInterrupt; the others still have to be released.
    if held:
        try:
            held.pop().release()
        finally:
            _release(held)
