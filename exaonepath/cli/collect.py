"""`exaonepath collect`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say, say_result
from exaonepath.cli.guard import EXIT_ERROR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exaonepath.slides.cohort.cohort_slide import CohortSlide


def collect(
    out: Annotated[Path, typer.Argument(help="Output folder of `exaonepath encode`.")],
    manifest: Annotated[
        Path | None, typer.Option(help="A table of slides that states their patients (see `exaonepath encode`).")
    ] = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Gather all slide embeddings of a folder in one table, slides.parquet; what did not change is not read again."""
    from exaonepath.slides.cohort.collect import collect_slide_vectors
    from exaonepath.slides.cohort.manifest import read_manifest

    slides = read_manifest(manifest).slides if manifest else ()
    found = collect_slide_vectors(out, _patients(slides))
    for table in found.tables:
        say_result(table.path, f"{table.n_slides} slides, vectors of {table.width}", False, quiet)
    if not quiet:
        removed = f", {found.n_removed} are gone" if found.n_removed else ""
        say(f"{found.n_read} embeddings were read, {found.n_kept} are unchanged{removed}")
    for problem in found.problems:
        say(f"error: {problem}")
    if found.problems:
        raise typer.Exit(EXIT_ERROR)
    if not found.tables:
        say(f"{out} has no embeddings")


def keep_collected(out: Path, slides: Sequence[CohortSlide]) -> None:
    """Bring the table of a folder up to date after a run, if the run was on several slides and pyarrow is installed.

    A problem with the table is reported and does not change the result of the run.
    """
    if len(slides) < 2 or importlib.util.find_spec("pyarrow") is None:
        return
    from exaonepath.errors import ExaonePathError
    from exaonepath.slides.cohort.collect import collect_slide_vectors

    try:
        found = collect_slide_vectors(out, _patients(slides))
    except ExaonePathError as exc:
        say(f"warning: the table of slide embeddings is not up to date: {exc}")
        return
    for problem in found.problems:
        say(f"warning: {problem}")


def _patients(slides: Sequence[CohortSlide]) -> dict[str, str]:
    return {slide.id: slide.patient for slide in slides if slide.patient}
