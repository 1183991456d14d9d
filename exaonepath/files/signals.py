"""Delays SIGINT and SIGTERM that arrive during a file operation until the operation has ended.

HDF5 calls back into Python, and h5py and finalizers suppress an exception that is raised in such a call: a Ctrl-C would
be lost and the run would continue. Inside `signals_held`, a signal is only recorded; its handler runs when the
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
    """Replaces the handler of one signal: records the signal while held, otherwise calls the original handler.

    It is harmless if it stays installed (a signal may arrive just before it is removed).
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
        # Without a Python handler nothing has to be delayed: the default action ends the process at once.
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
    """Delay SIGINT and SIGTERM until the block ends; blocks may be nested.

    Only the main thread runs Python's signal handlers, so in any other thread nothing is done.
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


def raise_if_interrupted() -> None:
    """Raise `KeyboardInterrupt` if a signal that is held would raise it at the end of the block.

    For long blocks that can end early without harm: a file of many gigabytes is not completed after Ctrl-C.
    """
    if threading.current_thread() is threading.main_thread():
        for handler in _handlers:
            if handler.arrived and handler.passes_to is signal.default_int_handler:
                raise KeyboardInterrupt


def _release(held: list[_Handler]) -> None:
    # A handler usually raises KeyboardInterrupt; the other handlers must be released nevertheless.
    if held:
        try:
            held.pop().release()
        finally:
            _release(held)
