"""`exaonepath heatmap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say, say_result
from exaonepath.cli.guard import EXIT_ERROR, report


def _position(value: str | None) -> str | None:
    if value is not None:
        try:
            _, _ = (float(part) for part in value.split(","))
        except ValueError as exc:
            raise typer.BadParameter(f"{value!r} is not X,Y, two numbers in level-0 pixels") from exc
    return value


def heatmap(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder of exaonepath encode.")],
    slides: Annotated[
        list[Path] | None, typer.Argument(help="Slide files or folders: where slides are now, if they were moved.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="attention, similarity, cluster, pca, component (the first one of PCA), fragment or column.",
            callback=options.one_of("attention", "similarity", "cluster", "pca", "component", "fragment", "column"),
        ),
    ] = "attention",
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="Id of a slide; may be repeated. Default: every slide of OUT.")
    ] = None,
    patch: Annotated[
        int | None,
        typer.Option(min=0, help="Patch that attends, or is compared with. Default for attention: the mean of all."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="X,Y", callback=_position, help="The patch at this position, in level-0 pixels."),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(metavar="context|appearance", help="The slide encoder's output, or the patch encoder's."),
    ] = None,
    clusters: Annotated[int, typer.Option(help="Number of clusters.")] = 8,
    block: Annotated[
        int | None, typer.Option(min=0, help="Block of the attention, from 0. Default: the last one.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of --table; implies --by column.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet file with a row for each patch: columns x and y, or patch; slide."),
    ] = None,
    picture: Annotated[bool, typer.Option("--png/--no-png", help="The patches over the slide, with a legend.")] = True,
    ome_tiff: Annotated[
        bool, typer.Option("--ome-tiff", help="The colours alone, as a pyramid with the size of the slide.")
    ] = False,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="Example patches of each cluster, or of the ends of a score.")
    ] = False,
    each: Annotated[int, typer.Option(help="Patches in a row of the contact sheet.")] = 8,
    palette: Annotated[str, typer.Option(metavar="NAME", help="viridis, cividis or magma.")] = "viridis",
    opacity: Annotated[float, typer.Option(help="Of the patches on the picture, 0 to 1.")] = 0.6,
    size: Annotated[int, typer.Option(help="Longer side of the slide on the picture, in pixels.")] = 1600,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where pictures are written. Default: OUT/figures.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of the slide encoder, for attention. Default: those that the embeddings state."),
    ] = None,
    device: options.Device = "auto",
    recursive: options.Recursive = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that exist.")] = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Draw attention, similarity, clusters or a column over slides.

    Example: exaonepath heatmap results --by cluster --contact-sheet
    """
    from exaonepath.slides.cohort.inputs import cohort_inputs
    from exaonepath.slides.encode import each_slide
    from exaonepath.viz.figures import FigureMaker, Look
    from exaonepath.viz.values.patch_values import Question

    if column is not None and by == "attention":
        by = "column"
    forms = [
        form for form, wanted in (("png", picture), ("ome-tiff", ome_tiff), ("contact-sheet", contact_sheet)) if wanted
    ]
    x, y = (float(part) for part in at.split(",")) if at else (0.0, 0.0)
    question = Question(by, patch, (x, y) if at else None, vectors, clusters, block, column)  # type: ignore[arg-type]
    look = Look(tuple(forms), palette, opacity, size, each)  # type: ignore[arg-type]
    found = cohort_inputs(slides, recursive=recursive) if slides else None
    for problem in found.problems if found is not None else ():
        say(f"warning: {problem}")
    given = () if found is None else found.slides
    with FigureMaker(out, given, table=table, weights=weights, device=device) as maker:
        entries = maker.slides(ids or ())
        if question.of_one_slide and len(entries) != 1:
            raise typer.BadParameter(f"a patch belongs to one slide, and {out} has {len(entries)}: name it with --id")
        failed = 0
        for entry, made in each_slide(
            entries, lambda entry: maker.make(entry, question, look, to, overwrite=overwrite)
        ):
            if isinstance(made, Exception):
                report(made, verbose, Path(entry.id))
                failed += 1
                continue
            for path in made:
                say_result(path, "", False, quiet)
    if failed:
        if len(entries) > 1:
            say(f"{failed} of {len(entries)} slides failed")
        raise typer.Exit(EXIT_ERROR)
    if not entries:
        say(f"{out} has no slide with results")
