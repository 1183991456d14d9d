"""`exaonepath view`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say


def view(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder of exaonepath encode.")],
    slides: Annotated[
        list[Path] | None,
        typer.Argument(help="Slide files or folders: where slides are now, or slides without results."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port; 0: a free one.", min=0, max=65535)] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    table: Annotated[
        Path | None,
        typer.Option(
            help="CSV or Parquet file with values of patches to show as colours: columns x and y, or patch; slide."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of the slide encoder, for attention. Default: those that the embeddings state."),
    ] = None,
    device: options.Device = "auto",
    recursive: options.Recursive = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Look at slides, their patches and embeddings in the browser.

    Writes the address of the page to standard output, and serves it on this machine only, until it is interrupted.
    Example: exaonepath view results
    """
    from exaonepath.slides.cohort.inputs import cohort_inputs
    from exaonepath.viewer.start import start

    found = cohort_inputs(slides, recursive=recursive) if slides else None
    for problem in found.problems if found is not None else ():
        say(f"warning: {problem}")

    def announce(url: str) -> None:
        sys.stdout.write(url + "\n")
        sys.stdout.flush()
        if not quiet:
            say("serving on this machine only; Ctrl-C ends it")

    start(
        out,
        () if found is None else found.slides,
        port=port,
        announce=announce,
        browser=browser,
        table=table,
        weights=weights,
        device=device,
    )
