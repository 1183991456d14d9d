"""`exaonepath patch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exaonepath.cli import options
from exaonepath.cli.console import say_result
from exaonepath.cli.guard import EmptySlides, each

if TYPE_CHECKING:
    from exaonepath.slides.cohort.cohort_slide import CohortSlide


def patch(
    out: options.Out,
    slides: options.Slides = None,
    manifest: options.Manifest = None,
    recursive: options.Recursive = False,
    layout: options.Layout = None,
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
    found = options.inputs(slides, manifest, recursive, quiet)
    from exaonepath.slides.cohort.slide_settings import patching_of
    from exaonepath.slides.image import SlideImage
    from exaonepath.slides.outputs import choose_layout
    from exaonepath.slides.patches.pipeline import patchfy
    from exaonepath.slides.stages import why_no_patch

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
        found.slides,
        patch_level=patch_level,
        use_otsu=otsu,
        seg_downsample=options.seg_downsample(seg_downsample),
        mpp=mpp,
        strict_scale=strict_scale,
        save_contours=contours,
    )

    empty = EmptySlides(fail_on_empty, quiet)

    def patch_one(slide: CohortSlide) -> int:
        settings = patching_of(slide, arguments)
        with SlideImage(slide.path, reader, settings.pop("mpp"), slide.id) as image:
            path, coords, _ = patchfy(image, out, **settings, overwrite=overwrite)
        assert path is not None
        say_result(path, f"{len(coords)} patches", False, quiet)
        if not len(coords):
            empty.add(slide.path, why_no_patch(path))
        return 0

    if found.slides:
        choose_layout(out, len(found.slides), options.layout(layout))
    each(found.slides, patch_one, found.problems, verbose, empty)
