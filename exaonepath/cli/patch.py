"""`exaonepath patch`."""

from __future__ import annotations

from pathlib import Path

from exaonepath.cli import options
from exaonepath.cli.console import say_result
from exaonepath.cli.guard import each
from exaonepath.errors import SlideOpenError


def patch(
    slides: options.Slides,
    out: options.Out,
    patch_size: options.PatchSize = 256,
    step_size: options.StepSize = None,
    patch_level: options.PatchLevel = 0,
    otsu: options.Otsu = False,
    seg_downsample: options.SegDownsample = 1.0,
    strict_scale: options.StrictScale = False,
    reader: options.Reader = "auto",
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Find tissue and compute the patch grid: <out>/patches/<id>.h5 and <out>/masks/<id>.jpg."""
    from exaonepath.slides.encode import find_slides
    from exaonepath.slides.image import SlideImage
    from exaonepath.slides.patches.pipeline import patchfy

    arguments = options.patching(patch_size, step_size, patch_level, otsu, seg_downsample, strict_scale)

    def patch_one(file: Path) -> int:
        with SlideImage(file, reader) as slide:
            path, coords, _ = patchfy(slide, out, **arguments, overwrite=overwrite)
        assert path is not None
        say_result(path, f"{len(coords)} patches", False, quiet)
        return 0

    problems: list[SlideOpenError] = []
    each(find_slides(slides, problems), patch_one, problems, verbose)
