"""Logging of commands: to standard error, at the requested level, with control characters in file names escaped."""

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

_SHOWN_CAUSES = 8  # errors of a chain that a trace shows


def set_up_logging(verbose: int, quiet: bool) -> None:
    """Log warnings by default, information with -v, everything with -vv; errors only with quiet or from libraries."""
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
    # The level is set on the handler: a program that calls a command keeps its own handlers and their levels.
    _handler.setLevel(level)
    root.addHandler(_handler)
    root.setLevel(min(level, logging.WARNING))
    if level > logging.DEBUG:
        # The libraries' messages repeat, at length, the one-line errors of this package.
        _when_imported("transformers.utils.logging", lambda module: module.set_verbosity_error())
        _when_imported("huggingface_hub.utils.logging", lambda module: module.set_verbosity_error())
    # Loading takes a second: a progress bar would only flicker, and would appear in the logs of batch jobs.
    _when_imported("transformers.utils.logging", lambda module: module.disable_progress_bar())
    if quiet or not sys.stderr.isatty():
        _when_imported("huggingface_hub.utils.tqdm", lambda module: module.disable_progress_bars())


def _when_imported(name: str, call: Callable[[Any], None]) -> None:
    """Call with the module, now if it is imported already, otherwise after its import; nothing is imported here."""
    wrapt.register_post_import_hook(call, name)


class _PrintableFormatter(logging.Formatter):
    """Escapes characters in file names that would control the terminal; line breaks of a traceback are kept."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_text = None  # another handler may have stored it here, unescaped
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
