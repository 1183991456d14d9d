"""`exaonepath encode`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from exaonepath.cli import options
from exaonepath.cli.collect import keep_collected
from exaonepath.cli.console import note_random, progress_bar, say_result, say_unreadable, status
from exaonepath.cli.dry_run import dry_run as show_plan
from exaonepath.cli.guard import EXIT_UNREADABLE, EmptySlides, each
from exaonepath.cli.job_script import print_sbatch as write_sbatch

if TYPE_CHECKING:
    from exaonepath.encoders.loading import LoadedEncoder
    from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
    from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
    from exaonepath.slides.cohort.cohort_slide import CohortSlide


def encode(
    context: typer.Context,
    out: options.Out,
    slides: options.Slides = None,
    manifest: options.Manifest = None,
    recursive: options.Recursive = False,
    layout: options.Layout = None,
    weights: options.Weights = options.DEFAULT_WEIGHTS,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
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
    resize: options.Resize = 256,
    batch_size: options.BatchSize = "32",
    num_workers: options.Workers = None,
    compile: options.Compile = False,
    max_memory: options.MaxMemory = None,
    feature_dtype: options.FeatureDtype = "float32",
    keep: options.Keep = None,
    fail_on_empty: options.FailOnEmpty = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    print_sbatch: options.PrintSbatch = False,
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Slides to embeddings, all stages; finished stages are kept, an interrupted run resumes.

    Writes <out>/embeddings/<id>.h5, and on the way <out>/patches/<id>.h5, <id>_features.h5 and <out>/masks/<id>.jpg.
    Example: exaonepath encode slides/ --out results --device cuda
    """
    found = options.inputs(slides, manifest, recursive, quiet)
    from exaonepath.device import resolve_device, resolve_dtype
    from exaonepath.encoders import loading
    from exaonepath.encoders.memory_plan import parse_memory
    from exaonepath.slides.cohort.encoder_pool import EncoderPool
    from exaonepath.slides.cohort.plan import PlanSettings
    from exaonepath.slides.cohort.slide_settings import by_weights, patching_of
    from exaonepath.slides.encode import encode_slide
    from exaonepath.slides.features.identity import check_feature_dtype
    from exaonepath.slides.features.preprocessing import PreprocessingConfig
    from exaonepath.slides.keep import check_keep
    from exaonepath.slides.outputs import choose_layout

    stored_as, kept = check_feature_dtype(feature_dtype), check_keep(keep)
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    limit = None if max_memory is None else parse_memory(max_memory)
    preprocessing = PreprocessingConfig(resize=resize)
    settings = options.patching(
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
    if not found.slides:
        raise found.problems[0]
    if print_sbatch:
        write_sbatch(context, len(found.slides), device)
        return
    if dry_run:
        show_plan(
            found,
            out,
            PlanSettings(
                settings,
                reader,
                weights,
                preprocessing,
                resolve_dtype(dtype, target),
                stored_as,
                kept,
                overwrite,
            ),
            threads=num_workers,
            as_json=json,
            verbose=verbose,
            quiet=quiet,
        )
        return
    choose_layout(out, len(found.slides), options.layout(layout))  # fails, if it must, before the weights are loaded

    def load(
        weights: str,
    ) -> tuple[LoadedEncoder[ExaonePathPatchEncoderModel], LoadedEncoder[ExaonePathSlideEncoderModel]]:
        with status("loading weights", quiet):
            patch_encoder = loading.load_patch_encoder(weights, device=target)
            slide_encoder = loading.load_slide_encoder(weights, device=target)
        note_random(patch_encoder.is_random, weights, quiet)
        return patch_encoder, slide_encoder

    encoders = EncoderPool(load)
    ordered = by_weights(found.slides, weights)
    encoders.get(ordered[0].weights or weights)  # if the weights are wrong, one error is enough

    empty = EmptySlides(fail_on_empty, quiet)

    def encode_one(slide: CohortSlide) -> int:
        patch_encoder, slide_encoder = encoders.get(slide.weights or weights)
        with progress_bar(slide.path.name, disable=quiet) as progress:
            result = encode_slide(
                slide.path,
                out,
                patch_encoder,
                slide_encoder,
                name=slide.id,
                patient=slide.patient,
                patching=patching_of(slide, settings),
                preprocessing=preprocessing,
                batch_size=options.batch_size(batch_size),
                num_workers=num_workers,
                dtype=dtype,
                compile=compile,
                max_memory=limit,
                reader=reader,
                feature_dtype=stored_as,
                keep=kept,
                overwrite=overwrite,
                progress=progress,
            )
        say_result(result.embedding_path, f"{result.n_patches} patches", "slide" in result.reused, quiet)
        if result.no_patch:
            empty.add(slide.path, result.no_patch)
        if result.n_failed:
            say_unreadable(result.n_failed, result.n_patches + result.n_failed, slide.path, result.features_path)
        return EXIT_UNREADABLE if result.n_failed else 0

    try:
        each(ordered, encode_one, found.problems, verbose, empty)
    except typer.Exit:
        keep_collected(out, found.slides)
        raise
    keep_collected(out, found.slides)
