"""Error handling shared by all commands: exit codes, one-line errors, Ctrl-C; a failed slide does not stop the others.

Exit codes: 0 success; 1 an error, reported in one line; 2 wrong usage; 3 success, but some patches could not be read;
130 interrupted (the same command resumes).
"""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import typer

from exaonepath.cli.console import say
from exaonepath.cli.logs import set_up_logging
from exaonepath.errors import ExaonePathError, SlideOpenError

if TYPE_CHECKING:
    from exaonepath.slides.cohort.cohort_slide import CohortSlide

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_ERROR, EXIT_UNREADABLE, EXIT_INTERRUPTED = 0, 1, 3, 130

# Of commands that do not resume, what Ctrl-C leaves.
_WHOLE = "files that were finished are whole and stay: the same command with --overwrite writes all of them again"
_INTERRUPTED = {"export": _WHOLE, "import_features": _WHOLE}

F = TypeVar("F", bound=Callable[..., None])


def guarded(command: F) -> F:
    """Set up logging; exit with one line for an error, and with 130 for Ctrl-C or a scheduler's SIGTERM."""

    @functools.wraps(command)
    def run(*args: Any, verbose: int = 0, quiet: bool = False, **kwargs: Any) -> None:
        set_up_logging(verbose, quiet)
        try:
            with interruptible():
                command(*args, verbose=verbose, quiet=quiet, **kwargs)
        except (click.exceptions.ClickException, typer.BadParameter, typer.Exit, typer.Abort):
            raise
        # Scripts rely on the one line and the exit code, whatever error a library or an unusual file causes.
        except Exception as exc:
            report(exc, verbose)
            raise typer.Exit(EXIT_ERROR) from exc
        except KeyboardInterrupt as exc:
            say(f"interrupted; {_INTERRUPTED.get(command.__name__, 'finished work is kept: the same command resumes')}")
            raise typer.Exit(EXIT_INTERRUPTED) from exc

    return run  # type: ignore[return-value]


def report(exc: Exception, verbose: int, slide: Path | None = None) -> None:
    """Print one line for an error; with -v, also its traceback."""
    if verbose:
        logger.error("failed", exc_info=exc)
    if isinstance(exc, ExaonePathError):
        first, *others = exc.lines
        say(f"error: {first}")
        for line in others:
            say(line)
        return
    about = "" if slide is None else f"{slide}: "
    reason = " ".join(str(exc).split())
    say(f"error: {about}unexpected {type(exc).__name__}{f': {reason}' if reason else ''} (-v shows where)")


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM, which schedulers send, end the block like Ctrl-C: threads are stopped, files are closed."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class EmptySlides:
    """The slides without a patch, with their reasons; reported when all slides are done.

    Args:
        fail: they are errors (`--fail-on-empty`).
        quiet: they are not listed if they are no errors.
    """

    def __init__(self, fail: bool, quiet: bool) -> None:
        self._fail, self._quiet = fail, quiet
        self._found: list[tuple[Path, str]] = []

    def add(self, slide: Path, reason: str) -> None:
        """Note a slide without a patch."""
        self._found.append((slide, reason))

    def report(self, total: int) -> int:
        """List the slides, and return the exit code."""
        # Of a single slide, a warning with the same text was logged just before.
        if self._found and (self._fail or (total > 1 and not self._quiet)):
            say(f"{'error: ' if self._fail else ''}{len(self._found)} of {total} slides have no patch:")
            for slide, reason in self._found:
                say(f"  {slide}: {reason}")
        return EXIT_ERROR if self._found and self._fail else EXIT_OK


def each(
    slides: Sequence[CohortSlide],
    work: Callable[[CohortSlide], int],
    problems: Sequence[SlideOpenError],
    verbose: int,
    empty: EmptySlides | None = None,
) -> None:
    """Process slides one after another; an error in one does not stop the others. Exits with the worst exit code.

    Args:
        slides: the slides.
        work: processes one slide and returns its exit code.
        problems: errors of paths that cannot be processed, found beforehand.
        verbose: if at least 1, errors are printed with their tracebacks.
        empty: filled by `work`, and reported at the end.
    """
    from exaonepath.slides.encode import each_slide

    codes = {EXIT_ERROR} if problems else set()
    failed = len(problems)
    for problem in problems:
        report(problem, verbose)
    for slide, code in each_slide(slides, work):
        if isinstance(code, Exception):
            report(code, verbose, slide.path)
            failed += 1
        codes.add(EXIT_ERROR if isinstance(code, Exception) else code)
    total = len(slides) + len(problems)
    if failed and total > 1:
        say(f"{failed} of {total} slides failed")
    if empty is not None:
        codes.add(empty.report(total))
    for worst in (EXIT_ERROR, EXIT_UNREADABLE):
        if worst in codes:
            raise typer.Exit(worst)
