"""What the command prints of the slides of a cohort, and the exit status that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from exaonepath.cli.console import CohortBars, say, say_result, say_unreadable
from exaonepath.cli.guard import EXIT_ERROR, EXIT_OK, EXIT_UNREADABLE, EmptySlides, report
from exaonepath.errors import SlideOpenError

if TYPE_CHECKING:
    from exaonepath.slides.cohort.outcome import SlideOutcome


class CohortReport:
    """Prints a line or an error for each slide.

    Args:
        total: slides of the run.
        problems: errors of paths at which there is no slide.
        empty: collects slides without a patch.
        verbose: if at least 1, errors are printed with their tracebacks.
        quiet: no lines for finished slides.
        bars: are hidden while something is printed.
    """

    def __init__(
        self,
        total: int,
        problems: Sequence[SlideOpenError],
        empty: EmptySlides,
        verbose: int,
        quiet: bool,
        bars: CohortBars | None,
    ) -> None:
        self._total, self._failed = total + len(problems), len(problems)
        self._codes = {EXIT_ERROR} if problems else set()
        self._empty, self._verbose, self._quiet, self._bars = empty, verbose, quiet, bars
        for problem in problems:
            report(problem, verbose)

    def add(self, outcome: SlideOutcome) -> None:
        """Print what became of a slide."""
        slide, result = outcome.slide, outcome.result
        with self._printing():
            if outcome.error is not None:
                report(outcome.error, self._verbose, slide.path)
                self._failed += 1
                self._codes.add(EXIT_ERROR)
            if result is not None:
                say_result(result.embedding_path, f"{result.n_patches} patches", "slide" in result.reused, self._quiet)
                if result.no_patch:
                    self._empty.add(slide.path, result.no_patch)
                if result.n_failed:
                    total = result.n_patches + result.n_failed
                    say_unreadable(result.n_failed, total, slide.path, result.features_path)
                    self._codes.add(EXIT_UNREADABLE)
        if self._bars is not None:
            self._bars.done(slide.id)

    def exit_code(self) -> int:
        """Print the summary; returns the worst exit code."""
        if self._failed and self._total > 1:
            say(f"{self._failed} of {self._total} slides failed")
        codes = {*self._codes, self._empty.report(self._total)}
        return next((code for code in (EXIT_ERROR, EXIT_UNREADABLE) if code in codes), EXIT_OK)

    def _printing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._bars is None else self._bars.hidden()
