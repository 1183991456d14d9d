"""Warnings that are logged once per process, since what they are about would repeat with every batch."""

from __future__ import annotations

import logging

_logged: set[tuple[str, str]] = set()


def warn_once(logger: logging.Logger, message: str, *values: object) -> None:
    """Log a warning, unless this process has logged the same text with the same logger before."""
    key = (logger.name, message % values if values else message)
    if key not in _logged:
        _logged.add(key)
        logger.warning(message, *values)


def forget() -> None:
    """Let every warning be logged again (for tests)."""
    _logged.clear()
