"""Output of commands: results on standard output, everything else on standard error, bars on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exaonepath.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID


def say(message: str) -> None:
    """Write one line to standard error; names in it may contain any characters."""
    sys.stderr.write(printable(message) + "\n")


def say_result(path: Path, what: str, reused: bool, quiet: bool) -> None:
    """Write one line to standard output: the file, two spaces, its content."""
    if not quiet:
        note = ", ".join(filter(None, [what, "already there" if reused else ""]))
        sys.stdout.write(printable(f"{path}  {note}".rstrip()) + "\n")


def say_unreadable(count: int, total: int, slide: Path, listed_in: Path) -> None:
    """Report the number of patches that could not be read."""
    say(
        f"{count} of {total} patches of {slide} could not be read; they are listed in {listed_in} (failed_index, "
        "failed_coords, failed_reason); the same command tries them again"
    )


def say_table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Collection[str] = ()) -> None:
    """Write a table of aligned columns to standard output.

    Args:
        header: names of the columns.
        rows: their values.
        right: columns that are aligned to the right.
    """
    cells = [[printable(value) for value in row] for row in rows]
    widths = [
        max(len(name), *(len(row[at]) for row in cells)) if cells else len(name) for at, name in enumerate(header)
    ]
    for row in (header, *cells):
        aligned = [
            text.rjust(width) if name in right else text.ljust(width)
            for text, width, name in zip(row, widths, header, strict=True)
        ]
        sys.stdout.write("  ".join(aligned).rstrip() + "\n")


def byte_text(count: float) -> str:
    """A number of bytes for people: "12.3 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def note_random(is_random: bool, weights: str, quiet: bool) -> None:
    """Note that the results have no meaning if the weights are random."""
    if is_random and not quiet:
        say(f"note: {weights} are random weights, for tests: the embeddings contain no information about pathology")


@contextmanager
def status(text: str, quiet: bool) -> Iterator[None]:
    """Show a spinner with a text while the block runs, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def progress_bar(description: str, *, disable: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function (done, total) that updates a bar on stderr, or None if stderr is not a terminal."""
    if disable or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(*_columns(), console=Console(stderr=True)) as bar:
        task = bar.add_task(escape(printable(description)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _columns() -> tuple[ProgressColumn, ...]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


class CohortBars:
    """A bar for all slides, and above it one for each slide that is being encoded.

    Args:
        bar: the bars, on standard error.
        total: number of slides.
    """

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._names: dict[str, TaskID] = {}
        self._all = bar.add_task("slides", total=total)

    def progress(self, name: str, done: int, total: int) -> None:
        """Patches of a slide that were encoded."""
        from rich.markup import escape

        if name not in self._names:
            self._names[name] = self._bar.add_task(escape(printable(name)), total=None)
        self._bar.update(self._names[name], completed=done, total=total)

    def done(self, name: str) -> None:
        """A slide is finished, or has failed."""
        if name in self._names:
            self._bar.remove_task(self._names.pop(name))
        self._bar.advance(self._all)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Show no bars while the block prints lines."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()


@contextmanager
def cohort_bars(total: int, *, disable: bool = False) -> Iterator[CohortBars | None]:
    """Show bars for a cohort of so many slides during the block, on a terminal only; otherwise yield None."""
    if disable or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Results go to standard output, which rich would redirect to the console of the bars.
    with Progress(*_columns(), console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield CohortBars(bar, total)
