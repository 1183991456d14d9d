"""`exaonepath encode --dry-run`: what a run would do, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from exaonepath.cli.console import byte_text, progress_bar, say, say_table
from exaonepath.cli.guard import EXIT_ERROR, report

if TYPE_CHECKING:
    from exaonepath.slides.cohort.inputs import CohortInputs
    from exaonepath.slides.cohort.plan import PlannedSlide, PlanSettings

_HEADER = ("id", "format", "reader", "size", "um/px", "scale from", "patches", "state", "disk")


def dry_run(
    inputs: CohortInputs,
    out: Path,
    settings: PlanSettings,
    *,
    threads: int | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Open every slide, and print the table. Exits with status 1 if a slide cannot be opened."""
    from exaonepath.slides.cohort.plan import plan_cohort

    planned: list[PlannedSlide] = []
    with progress_bar("opening slides", disable=quiet) as progress:
        for one in plan_cohort(inputs.slides, out, settings, threads):
            planned.append(one)
            if progress:
                progress(len(planned), len(inputs.slides))
    if as_json:
        sys.stdout.write(json.dumps(_as_json(planned, inputs, out), indent=1) + "\n")
    else:
        say_table(_HEADER, [_row(one) for one in planned], right=("size", "um/px", "patches", "disk"))
        _say_about(planned, inputs, out, verbose)
    if inputs.problems or any(one.error for one in planned):
        raise typer.Exit(EXIT_ERROR)


def _row(one: PlannedSlide) -> tuple[str, ...]:
    if one.error or one.size is None or one.state is None:
        return (one.slide.id, "-", "-", "-", "-", "-", "-", "error", "-")
    about = {"area": "<= ", "segmentation": "", "file": "", "": ""}[one.patches_from]
    return (
        one.slide.id,
        one.format,
        one.reader,
        f"{one.size[0]} x {one.size[1]}",
        f"{one.mpp:.4g}",
        one.mpp_source,
        f"{about}{one.n_patches}",
        one.state.state,
        byte_text(one.disk_bytes),
    )


def _say_about(planned: list[PlannedSlide], inputs: CohortInputs, out: Path, verbose: int) -> None:
    """Errors, reasons, skipped files and totals, on standard error."""
    from exaonepath.slides.cohort.plan import free_bytes, needed_bytes

    for problem in inputs.problems:
        report(problem, verbose)
    for one in planned:
        if one.error:
            say(f"error: {one.slide.id}: {one.error}")
        elif one.state and one.state.reason:
            say(f"{one.slide.id} is {one.state.state}: {one.state.reason}")
    for path, reason in inputs.skipped:
        say(f"skipped: {path}: {reason}")
    states = Counter("error" if one.error or one.state is None else one.state.state for one in planned)
    say(f"{len(planned)} slides: {', '.join(f'{count} {state}' for state, count in states.most_common())}")
    patches = sum(one.n_patches or 0 for one in planned)
    at_most = "at most " if any(one.patches_from == "area" for one in planned) else ""
    needed, free = needed_bytes(planned), free_bytes(out)
    left = "" if free is None else f", {byte_text(free)} are free"
    total = byte_text(sum(one.disk_bytes for one in planned))
    say(f"{at_most}{patches} patches; {at_most}about {total} of files, {byte_text(needed)} more than now{left}")
    if free is not None and needed > free:
        say("warning: the disk is too small for the files of this run; see --keep and --feature-dtype")


def _as_json(planned: list[PlannedSlide], inputs: CohortInputs, out: Path) -> dict[str, Any]:
    from exaonepath.slides.cohort.plan import FORMAT, free_bytes, needed_bytes

    return {
        "format": FORMAT,
        "out": str(out),
        "slides": [one.as_json() for one in planned],
        "problems": [str(problem) for problem in inputs.problems],
        "skipped": [{"path": str(path), "reason": reason} for path, reason in inputs.skipped],
        "patches": sum(one.n_patches or 0 for one in planned),
        "disk_bytes": sum(one.disk_bytes for one in planned),
        "needed_bytes": needed_bytes(planned),
        "free_bytes": free_bytes(out),
    }
