"""`exaonepath import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say_result

if TYPE_CHECKING:
    from exaonepath.slides.importing import ImportedSlide

FORMATS = ("trident", "clam", "slide2vec", "anndata", "parquet", "zarr")


def import_features(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder or file of the other tool.")],
    out: options.Out,
    format: Annotated[
        str, typer.Option("--format", "-f", callback=options.one_of(*FORMATS), help=f"{', '.join(FORMATS)}.")
    ],
    encoder: Annotated[
        str | None, typer.Option(help="What made the features, such as uni_v1, if the files do not state it.")
    ] = None,
    fragments: Annotated[
        str | None,
        typer.Option(
            metavar="grid|one",
            help="Which patches are of one piece of tissue, if the files do not state it: patches that touch, or all.",
        ),
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Side of a patch in level-0 pixels, if the files do not state it.")
    ] = None,
    mpp: options.Mpp = None,
    slide: Annotated[
        str | None, typer.Option("--slide", metavar="ID", help="Id of the slide, for files that do not name it.")
    ] = None,
    coords: Annotated[
        Path | None, typer.Option(help="Folder of the coordinates, if they do not lie where the layout has them.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Read patch features or coordinates of TRIDENT, CLAM, slide2vec, AnnData, Parquet or Zarr.

    Example: exaonepath import trident_job --out imported --format trident --fragments grid
    """
    from exaonepath.slides.importing import import_features as run

    def done(found: ImportedSlide) -> None:
        count = found.n_fragments
        what = f"{found.n_patches} patches, {count} fragment{'' if count == 1 else 's'}"
        say_result(found.features_path or found.patches_path, what, False, quiet)

    given: Any = {"format": format, "fragments": fragments}
    run(
        source,
        out,
        encoder=encoder,
        patch_size=patch_size,
        mpp=mpp,
        slide=slide,
        coords=coords,
        overwrite=overwrite,
        progress=done,
        **given,
    )
