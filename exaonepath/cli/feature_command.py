"""What the two command lines share: exit codes, logging, interruption, and the features stage itself."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

from exaonepath.cli.progress import progress_bar
from exaonepath.device import resolve_device, resolve_dtype
from exaonepath.encoders import loading
from exaonepath.slides.features.extract import extract_features
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage
from exaonepath.text import printable

_handler: logging.Handler | None = None

_SHOWN_CAUSES = 8  # of an error, in a trace
EXIT_OK, EXIT_ERROR, EXIT_UNREADABLE, EXIT_INTERRUPTED = 0, 1, 3, 130


def run_features(
    slide: Path,
    patches: Path,
    out: Path,
    *,
    weights: str,
    device: str,
    dtype: str,
    resize: int,
    batch_size: int,
    num_workers: int | None,
    overwrite: bool,
    quiet: bool,
) -> int:
    """The features stage of one slide as a command: results to stdout, notes to stderr, the exit code returned.

    Raises:
        ExaonePathError: see `extract_features`.
    """
    preprocessing = PreprocessingConfig(resize=resize)
    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    with SlideImage(slide) as opened:  # first: a wrong path should not wait for the weights
        encoder = loading.load_patch_encoder(weights, device=target)
        note_random(encoder.is_random, weights, quiet)
        with progress_bar(f"{opened.name}: features", disable=quiet) as progress:
            result = extract_features(
                opened,
                patches,
                out,
                encoder.model,
                weights=encoder.weights,
                weights_fingerprint=encoder.fingerprint,
                preprocessing=preprocessing,
                batch_size=batch_size,
                num_workers=num_workers,
                device=target,
                dtype=compute,
                progress=progress,
                overwrite=overwrite,
            )
    resumed = f", {result.resumed_from} from an earlier run" if result.resumed_from else ""
    say_result(result.path, f"{result.n_features} patches{resumed}", result.reused, quiet)
    if result.failures:
        say_unreadable(len(result.failures), result.n_patches, slide, result.path)
        return EXIT_UNREADABLE
    return EXIT_OK


@contextmanager
def interruptible() -> Iterator[None]:
    """A scheduler's polite kill (SIGTERM) ends the block like Ctrl-C: threads stopped, files closed."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    # Loading takes a second: its bar would only flicker, and land in the logs of batch jobs.
    transformers_logging.disable_progress_bar()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()


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


def say(message: str) -> None:
    """One line to standard error, whatever characters the names in it hold."""
    sys.stderr.write(printable(message) + "\n")


def say_result(path: Path, what: str, reused: bool, quiet: bool) -> None:
    """One line to standard output: the file, two spaces, what it holds."""
    if not quiet:
        note = ", ".join(filter(None, [what, "already there" if reused else ""]))
        sys.stdout.write(printable(f"{path}  {note}".rstrip()) + "\n")


def say_unreadable(count: int, total: int, slide: Path, listed_in: Path) -> None:
    """Tell of patches that could not be read."""
    say(
        f"{count} of {total} patches of {slide} could not be read; they are listed in {listed_in} (failed_index, "
        "failed_coords, failed_reason); the same command tries them again"
    )


def note_random(is_random: bool, weights: str, quiet: bool) -> None:
    """Say that the results mean nothing, where they mean nothing."""
    if is_random and not quiet:
        say(f"note: {weights} are random weights, for trying out: the embeddings carry no pathology")
