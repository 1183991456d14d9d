"""`exaonepath status`."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say, say_result, say_table

if TYPE_CHECKING:
    from exaonepath.slides.cohort.status import CohortStatus, SlideStatus


def status(
    out: Annotated[Path, typer.Argument(help="Output folder of `exaonepath encode`.")],
    slides: Annotated[
        list[Path] | None, typer.Argument(help="Slides, folders or patterns; those without a trace are listed as new.")
    ] = None,
    manifest: options.Manifest = None,
    recursive: options.Recursive = False,
    every: Annotated[bool, typer.Option("--all", help="List finished slides as well.")] = False,
    json: options.Json = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page with pictures, times and failures.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Slides with a picture on the page.")] = 500,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """What is finished, running, failed and left to do in an output folder."""
    from exaonepath.slides.cohort.status import cohort_status
    from exaonepath.slides.cohort.status_page import write_status_page

    listed = options.inputs(slides, manifest, recursive, quiet).slides if slides or manifest else ()
    found = cohort_status(out, listed)
    if html is not None:
        write_status_page(found, html, pictures)
        if not json:
            say_result(html, f"{len(found.slides)} slides", False, quiet)
    if json:
        sys.stdout.write(json_module.dumps(found.as_json(), indent=1) + "\n")
    elif html is None:
        _show(found, every)


def _show(found: CohortStatus, every: bool) -> None:
    rows = [_row(one) for one in found.slides if every or one.state.state not in ("finished", "empty")]
    if rows:
        say_table(("id", "state", "patches", "seconds", "about"), rows, right=("patches", "seconds"))
    counts = found.counts
    states = [
        f"{count} {name}" for name, count in counts.items() if count and name not in ("unreadable", "quarantined")
    ]
    parts = [
        f"{counts[name]} {text}"
        for name, text in (("unreadable", "with unreadable patches"), ("quarantined", "given up after three tries"))
        if counts[name]
    ]
    note = f" ({', '.join(parts)})" if parts else ""
    say(f"{len(found.slides)} slides: {', '.join(states) or 'none'}{note}")
    going = [run for run in found.runs if not run.ended]
    if going:
        say(f"{len(going)} of {len(found.runs)} processes have not ended, or were killed:")
        for run in going:
            job = f", job {run.job}" if run.job else ""
            say(f"  {run.host}, process {run.pid}{job}: began {run.began}, last row {run.latest}")


def _row(one: SlideStatus) -> tuple[str, ...]:
    state = one.state
    about = state.reason
    if state.state == "running" and state.holder is not None:
        job = f", job {state.holder.job}" if state.holder.job else ""
        about = f"{state.holder.host}, process {state.holder.pid}{job}, since {state.holder.since}"
    if state.state == "running" and state.heartbeat_s is not None:
        about += f"{', ' if about else ''}heartbeat {state.heartbeat_s:.0f} s ago"
    if state.failure is not None and state.state == "failed":
        tries = f"{state.failure.tries} {'try' if state.failure.tries == 1 else 'tries'}"
        about = f"{about} ({tries}{', given up' if state.quarantined else ''})"
    if state.n_failed:
        about += f"{', ' if about else ''}{state.n_failed} patches unreadable"
    seconds = sum(stage.seconds for stage in one.stages.values())
    return (
        state.id,
        state.state,
        "" if state.n_patches is None else str(state.n_patches),
        f"{seconds:.1f}" if one.stages else "",
        about,
    )
