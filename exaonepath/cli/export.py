"""`exaonepath export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say, say_result

FORMATS = ("qupath", "anndata", "spatialdata", "trident", "clam", "patho-bench", "slide2vec", "parquet", "zarr")


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Output folder of exaonepath encode, or one features or embeddings file."),
    ],
    to: Annotated[
        Path,
        typer.Option(
            help="Folder to write; one .h5ad, .parquet or .zarr holds all slides, one .geojson a single slide."
        ),
    ],
    format: Annotated[
        str, typer.Option("--format", "-f", callback=options.one_of(*FORMATS), help=f"{', '.join(FORMATS)}.")
    ],
    slides: Annotated[
        list[Path] | None, typer.Argument(help="Slide files or folders, if slides have moved: for their pictures.")
    ] = None,
    slide: Annotated[
        list[str] | None, typer.Option("--slide", metavar="ID", help="Only this slide; may be given again.")
    ] = None,
    vectors: Annotated[
        str,
        typer.Option(
            callback=options.one_of("features", "embeddings"),
            help="Vectors of patches: features of the patch encoder, or embeddings (with the slide encoder's output).",
        ),
    ] = "features",
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|float16", help="Type of the vectors. Default: as stored.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            metavar="pca|clusters[:N]|similarity:PATCH", help="More values of the patches; may be given again."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="CSV file with values of patches: columns x and y, or patch; slide, if of several."),
    ] = None,
    classify: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="qupath: the class of a tile: cluster, fragment or a column of the table."),
    ] = None,
    batch_axis: Annotated[bool, typer.Option("--batch-axis", help="trident, clam: features as [1, N, C].")] = False,
    encoder: Annotated[
        str | None,
        typer.Option(help="Name of the encoder in the export. Default: the weights, as the results state them."),
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Side of a patch in level-0 pixels, if the files do not state it.")
    ] = None,
    target_size: Annotated[
        int | None, typer.Option(min=1, help="The same in pixels at 0.5 um, if the files do not state it.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="anndata, spatialdata: a small picture of each slide.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Write results for other tools: QuPath, scanpy and squidpy, TRIDENT, CLAM, Patho-Bench, slide2vec, and others.

    Example: exaonepath export results --to patches.h5ad --format anndata
    """
    from exaonepath.cli.exported_values import values_of
    from exaonepath.slides.exporting import export_slides

    more: Any = {"format": format, "vectors": vectors, "dtype": dtype}
    export_slides(
        source,
        to,
        slides=slide or (),
        values=values_of(values or (), table),
        classify=classify,
        batch_axis=batch_axis,
        encoder=encoder,
        patch_size=patch_size,
        target_size=target_size,
        slide_files=_slide_files(slides),
        pictures=pictures,
        overwrite=overwrite,
        progress=lambda path: say_result(path, "", False, quiet),
        **more,
    )


def _slide_files(slides: list[Path] | None) -> dict[str, Path]:
    if not slides:
        return {}
    from exaonepath.slides.cohort.inputs import cohort_inputs

    found = cohort_inputs(slides)
    for problem in found.problems:
        say(f"warning: {problem}")
    return {slide.id: slide.path for slide in found.slides}
