"""`exaonepath patch`."""

from __future__ import annotations

from pathlib import Path

from exaonepath.cli import options
from exaonepath.cli.console import say_result
from exaonepath.cli.guard import EmptySlides, each
from exaonepath.errors import SlideOpenError


def patch(
    slides: options.Slides,
    out: options.Out,
    patch_size: options.PatchSize = 256,
    step_size: options.StepSize = None,
    patch_level: options.PatchLevel = 0,
    segmenter: options.Segmenter = None,
    otsu: options.Otsu = False,
    seg_downsample: options.SegDownsample = "1",
    mpp: options.Mpp = None,
    strict_scale: options.StrictScale = False,
    reader: options.Reader = "auto",
    mask: options.Mask = None,
    mask_class: options.MaskClass = None,
    exclude: options.Exclude = None,
    exclude_class: options.ExcludeClass = None,
    remove: options.Remove = None,
    geojson_origin: options.GeojsonOrigin = "slide",
    contours: options.Contours = True,
    fail_on_empty: options.FailOnEmpty = False,
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Find tissue and compute the patch grid: <out>/patches/<id>.h5, masks/<id>.jpg and contours/<id>.geojson."""
    from exaonepath.slides.encode import one_mask_per_slide, why_no_patch
    from exaonepath.slides.find import find_slides
    from exaonepath.slides.image import SlideImage
    from exaonepath.slides.patches.pipeline import patchfy

    arguments = options.patching(
        patch_size,
        step_size,
        {
            "segmenter": segmenter,
            "mask": mask,
            "mask_class": mask_class or (),
            "exclude": exclude,
            "exclude_class": exclude_class or (),
            "remove": remove or (),
            "geojson_origin": geojson_origin,
        },
        patch_level=patch_level,
        use_otsu=otsu,
        seg_downsample=options.seg_downsample(seg_downsample),
        mpp=mpp,
        strict_scale=strict_scale,
        save_contours=contours,
    )

    empty = EmptySlides(fail_on_empty, quiet)

    def patch_one(file: Path) -> int:
        with SlideImage(file, reader, mpp) as slide:
            path, coords, _ = patchfy(slide, out, **arguments, overwrite=overwrite)
        assert path is not None
        say_result(path, f"{len(coords)} patches", False, quiet)
        if not len(coords):
            empty.add(file, why_no_patch(path))
        return 0

    problems: list[SlideOpenError] = []
    files = find_slides(slides, problems)
    one_mask_per_slide(files, mask, exclude)
    each(files, patch_one, problems, verbose, empty)
