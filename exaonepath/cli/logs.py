"""Logging of commands: to standard error, at the level asked for, with names of files made harmless."""

from __future__ import annotations

import copy
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

import wrapt
from rich.console import Console
from rich.logging import RichHandler

from exaonepath.text import printable

_handler: logging.Handler | None = None

_SHOWN_CAUSES = 8  # of an error, in a trace


def set_up_logging(verbose: int, quiet: bool) -> None:
    """Warnings by default, -v information, -vv everything; errors alone with quiet. Libraries keep to errors."""
    global _handler
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
    if sys.stderr.isatty():
        _handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
        _handler.setFormatter(_PrintableFormatter("%(message)s"))
    else:
        _handler = logging.StreamHandler()
        _handler.setFormatter(_PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    # The level is the handler's: a program that runs a command of ours keeps its own handlers and what they see.
    _handler.setLevel(level)
    root.addHandler(_handler)
    root.setLevel(min(level, logging.WARNING))
    if level > logging.DEBUG:
        # Their reports repeat, at length, what our own errors say in one line.
        _when_imported("transformers.utils.logging", lambda module: module.set_verbosity_error())
        _when_imported("huggingface_hub.utils.logging", lambda module: module.set_verbosity_error())
    # Loading takes a second: its bar would only flicker, and land in the logs of batch jobs.
    _when_imported("transformers.utils.logging", lambda module: module.disable_progress_bar())
    if quiet or not sys.stderr.isatty():
        _when_imported("huggingface_hub.utils.tqdm", lambda module: module.disable_progress_bars())


def _when_imported(name: str, call: Callable[[Any], None]) -> None:
    """Call with the module now, if it is imported already, else once it is: a command decides what it imports."""
    wrapt.register_post_import_hook(call, name)


class _PrintableFormatter(logging.Formatter):
    """Escapes what a name of a file would do to the terminal; line breaks of a traceback stay."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_text = None  # as another handler may have left it here, unescaped
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        parts: list[str] = []
        exc = ei[1]
        while exc is not None and len(parts) < _SHOWN_CAUSES:
            stack = "".join(traceback.format_tb(exc.__traceback__))
            parts.append(f"Traceback (most recent call last):\n{stack}{printable(f'{type(exc).__name__}: {exc}')}")
            exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
        return "\n\nwhich led to:\n\n".join(reversed(parts))
