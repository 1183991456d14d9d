"""`exaonepath encode`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import typer

from exaonepath.cli import options
from exaonepath.cli.cohort_report import CohortReport
from exaonepath.cli.collect import keep_collected
from exaonepath.cli.console import cohort_bars, note_random, status
from exaonepath.cli.dry_run import dry_run as show_plan
from exaonepath.cli.guard import EmptySlides
from exaonepath.cli.job_script import print_sbatch as write_sbatch
from exaonepath.cli.logs import set_up_logging

if TYPE_CHECKING:
    import torch

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
    devices: options.Devices = None,
    jobs: options.Jobs = 1,
    engine: options.Engine = "local",
    address: options.Address = None,
    readers: options.Readers = None,
    encoders: options.EncodersOption = None,
    wait_for_nodes: options.WaitForNodes = 30.0,
    shard: options.ShardOption = None,
    stage: options.Stage = None,
    retry_failed: options.RetryFailed = False,
    stale_after: options.StaleAfter = 120.0,
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
    Several processes, on several machines, may work on one output folder: each slide is done by one of them.
    Example: exaonepath encode slides/ --out results --devices all
    """
    if json and not dry_run:
        raise typer.BadParameter("--json is about --dry-run; `exaonepath status OUT --json` tells what was done")
    found = options.inputs(slides, manifest, recursive, quiet)
    if not found.slides:
        raise found.problems[0]
    if print_sbatch:  # before devices are looked up: the machine from which jobs are submitted may have none
        write_sbatch(context, len(found.slides), device)
        return
    from exaonepath.device import resolve_device, resolve_dtype
    from exaonepath.encoders import loading
    from exaonepath.processors import usable_processors
    from exaonepath.slides.cohort.batch_system import parse_shard, shard_of_job
    from exaonepath.slides.cohort.dispatch import CohortWork
    from exaonepath.slides.cohort.encoders import EncoderPair
    from exaonepath.slides.cohort.plan import PlanSettings
    from exaonepath.slides.cohort.ray_cluster import ray_options
    from exaonepath.slides.cohort.ray_engine import encode_on_ray
    from exaonepath.slides.cohort.run import encode_cohort
    from exaonepath.slides.cohort.run_options import RunOptions
    from exaonepath.slides.cohort.slide_settings import by_weights
    from exaonepath.slides.cohort.worker import limit_threads
    from exaonepath.slides.cohort.worker_devices import worker_devices
    from exaonepath.slides.cohort.workers import encode_with_workers
    from exaonepath.slides.features.identity import check_feature_dtype
    from exaonepath.slides.features.preprocessing import PreprocessingConfig
    from exaonepath.slides.keep import check_keep
    from exaonepath.slides.outputs import choose_layout
    from exaonepath.slides.stages import EncodeSettings

    def load(weights: str, device: torch.device) -> EncoderPair:
        with status("loading weights", quiet):
            patch_encoder = loading.load_patch_encoder(weights, device=device)
            slide_encoder = loading.load_slide_encoder(weights, device=device)
        note_random(patch_encoder.is_random, weights, quiet)
        return EncoderPair(patch_encoder, slide_encoder)

    cluster = ray_options(engine, device, devices, jobs, address, readers, encoders, wait_for_nodes)
    # On a cluster, nothing is encoded by this process.
    workers = worker_devices(devices, device, jobs) if cluster is None else ["cpu"]
    target = resolve_device(workers[0])
    if cluster is None:
        resolve_dtype(dtype, target)
    how = RunOptions(
        shard_of_job() if shard is None else parse_shard(shard), stage, retry_failed, stale_after=stale_after
    )
    patching = options.patching(
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
    run = EncodeSettings(
        patching=patching,
        preprocessing=PreprocessingConfig(resize=resize),
        batch_size=options.batch_size(batch_size),
        num_workers=num_workers,
        dtype=dtype,
        compile=compile,
        max_memory=max_memory,
        reader=reader,
        feature_dtype=check_feature_dtype(feature_dtype),
        keep=check_keep(keep),
        overwrite=overwrite,
    )
    if dry_run:
        show_plan(
            found,
            out,
            PlanSettings(
                patching,
                reader,
                weights,
                run.preprocessing,
                resolve_dtype(dtype, target),
                run.feature_dtype,
                run.keep,
                overwrite,
            ),
            threads=num_workers,
            as_json=json,
            verbose=verbose,
            quiet=quiet,
        )
        return
    choose_layout(out, len(found.slides), options.layout(layout))  # fails, if it must, before the weights are loaded
    ordered = by_weights(found.slides, weights)
    # If all slides state weights of their own, those of the run are not needed.
    first = weights if any(slide.weights is None for slide in ordered) else str(ordered[0].weights)
    arguments = {"arguments": sys.argv[1:]}
    with cohort_bars(len(ordered), disable=quiet) as bars:

        def progress(slide: CohortSlide, done: int, total: int) -> None:
            if bars is not None:
                bars.progress(slide.id, done, total)

        initialize = partial(set_up_logging, verbose, quiet)
        work = CohortWork(ordered, out, first, run, how, initialize=initialize, arguments=arguments)
        if cluster is None and len(workers) == 1:
            limit_threads(usable_processors())
            pair = load(first, target)
            outcomes = encode_cohort(ordered, out, pair, run, how, load=load, arguments=arguments, progress=progress)
        else:
            note_random(first.startswith("random:"), first, quiet)
            if cluster is None:
                outcomes = encode_with_workers(work, workers, progress)
            else:
                outcomes = encode_on_ray(work, cluster, progress)
        report = CohortReport(len(ordered), found.problems, EmptySlides(fail_on_empty, quiet), verbose, quiet, bars)
        for outcome in outcomes:
            report.add(outcome)
    keep_collected(out, ordered)
    code = report.exit_code()
    if code:
        raise typer.Exit(code)
