"""The `exaonepath` command.

Exit status: 0 done; 1 an error, told in one line each; 2 wrong usage; 3 done, but some patches could not be read;
130 interrupted (the same command resumes).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
import typer
from rich.console import Console
from rich.markup import escape

from exaonepath.cli.alignment_commands import ablate, evaluate
from exaonepath.cli.demo import run_demo
from exaonepath.cli.doctor import examine
from exaonepath.cli.feature_command import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_UNREADABLE,
    interruptible,
    note_random,
    run_features,
    say,
    say_result,
    say_unreadable,
    set_up_logging,
)
from exaonepath.cli.progress import progress_bar
from exaonepath.cli.train import train
from exaonepath.device import resolve_device, resolve_dtype
from exaonepath.encoders import loading
from exaonepath.encoders.loading import DEFAULT_WEIGHTS
from exaonepath.encoders.memory_plan import parse_memory
from exaonepath.errors import ExaonePathError, SlideOpenError
from exaonepath.files.atomic import ensure_folder
from exaonepath.slides.embed import embed_features_file
from exaonepath.slides.encode import encode_slide, find_slides
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="exaonepath",
    help="Whole-slide pathology images to slide embeddings.",
    epilog="Exit status: 0 done, 1 error, 2 usage, 3 done but some patches could not be read, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Slides = Annotated[list[Path], typer.Argument(help="Slide files, or folders of slides.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Weights = Annotated[str, typer.Option(help="Hub id, directory, or random:SEED (for trying out).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16.")]
Resize = Annotated[int, typer.Option(help="Shorter side of a patch before the centre crop, in pixels.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Patches in one call of the patch encoder.")]
Workers = Annotated[int | None, typer.Option("--num-workers", min=0, help="Reading threads; default: one per core.")]
PatchSize = Annotated[int, typer.Option(help="Side of a patch, in pixels at 0.5 um per pixel.")]
StepSize = Annotated[int | None, typer.Option(help="Distance between patches; default: the patch size.")]
PatchLevel = Annotated[
    int, typer.Option(help="Pyramid level the grid is laid for; the original's option, 0 for nearly everyone.")
]
Otsu = Annotated[bool, typer.Option("--otsu", help="Otsu's threshold in place of a fixed one.")]
SegDownsample = Annotated[
    float, typer.Option(help="Shrink the image that is segmented: for flat (single-level) slides, 4 to 16.")
]
StrictScale = Annotated[
    bool, typer.Option("--strict-scale", help="An assumed or implausible pixel size is an error, not a warning.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="What the slide encoder may use on its device, as 12GB or 800MB; a slide that needs more is refused "
        "beforehand. Default: what is free on a GPU, no limit on a CPU."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo finished work.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice: everything.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]

F = TypeVar("F", bound=Callable[..., None])


def main() -> None:
    """Entry point of the `exaonepath` command."""
    app()


def _guarded(command: F) -> F:
    """Logging as asked for, one line for an error of ours, 130 for Ctrl-C or a scheduler's SIGTERM."""

    @functools.wraps(command)
    def run(*args: Any, verbose: int = 0, quiet: bool = False, **kwargs: Any) -> None:
        set_up_logging(verbose, quiet)
        try:
            with interruptible():
                command(*args, verbose=verbose, quiet=quiet, **kwargs)
        except (click.exceptions.ClickException, typer.Exit, typer.Abort):
            raise
        # The one line and the status that scripts rely on, whatever a library or a strange file came up with.
        except Exception as exc:
            _report(exc, verbose)
            raise typer.Exit(EXIT_ERROR) from exc
        except KeyboardInterrupt as exc:
            say("interrupted; finished work is kept: the same command resumes")
            raise typer.Exit(EXIT_INTERRUPTED) from exc

    return run  # type: ignore[return-value]


def _report(exc: Exception, verbose: int, slide: Path | None = None) -> None:
    """One line for an error; with -v its traceback as well."""
    if verbose:
        logger.error("failed", exc_info=exc)
    if isinstance(exc, ExaonePathError):
        first, *others = exc.lines
        say(f"error: {first}")
        for line in others:
            say(line)
        return
    about = "" if slide is None else f"{slide}: "
    reason = " ".join(str(exc).split())
    say(f"error: {about}unexpected {type(exc).__name__}{f': {reason}' if reason else ''} (-v shows where)")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Whole-slide pathology images to slide embeddings."""


@app.command()
@_guarded
def encode(
    slides: Slides,
    out: Out,
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    dtype: Dtype = "auto",
    patch_size: PatchSize = 256,
    step_size: StepSize = None,
    patch_level: PatchLevel = 0,
    otsu: Otsu = False,
    seg_downsample: SegDownsample = 1.0,
    strict_scale: StrictScale = False,
    resize: Resize = 256,
    batch_size: BatchSize = 32,
    num_workers: Workers = None,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Slides to embeddings, all stages; finished stages are kept, an interrupted run resumes.

    Writes <out>/embeddings/<id>.h5, and on the way <out>/patches/<id>.h5, <id>_features.h5 and <out>/masks/<id>.jpg.
    Example: exaonepath encode slides/ --out results --device cuda
    """
    problems: list[SlideOpenError] = []
    files = find_slides(slides, problems)
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    limit = None if max_memory is None else parse_memory(max_memory)
    preprocessing = PreprocessingConfig(resize=resize)
    patching = _patching(patch_size, step_size, patch_level, otsu, seg_downsample, strict_scale)
    if not files:
        raise problems[0]
    ensure_folder(out)
    with _status("loading weights", quiet):
        patch_encoder = loading.load_patch_encoder(weights, device=target)
        slide_encoder = loading.load_slide_encoder(weights, device=target)
    note_random(patch_encoder.is_random, weights, quiet)

    def encode_one(file: Path) -> int:
        with progress_bar(file.name, disable=quiet) as progress:
            result = encode_slide(
                file,
                out,
                patch_encoder,
                slide_encoder,
                patching=patching,
                preprocessing=preprocessing,
                batch_size=batch_size,
                num_workers=num_workers,
                dtype=dtype,
                max_memory=limit,
                overwrite=overwrite,
                progress=progress,
            )
        say_result(result.embedding_path, f"{result.n_patches} patches", "slide" in result.reused, quiet)
        if result.n_failed:
            say_unreadable(result.n_failed, result.n_patches + result.n_failed, file, result.features_path)
        return EXIT_UNREADABLE if result.n_failed else 0

    _each(files, encode_one, problems, verbose)


@app.command()
@_guarded
def patch(
    slides: Slides,
    out: Out,
    patch_size: PatchSize = 256,
    step_size: StepSize = None,
    patch_level: PatchLevel = 0,
    otsu: Otsu = False,
    seg_downsample: SegDownsample = 1.0,
    strict_scale: StrictScale = False,
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Find tissue and lay the patch grid: <out>/patches/<id>.h5 and <out>/masks/<id>.jpg."""
    arguments = _patching(patch_size, step_size, patch_level, otsu, seg_downsample, strict_scale)

    def patch_one(file: Path) -> int:
        path, coords, _ = patchfy(file, out, **arguments, overwrite=overwrite)
        assert path is not None
        say_result(path, f"{len(coords)} patches", False, quiet)
        return 0

    problems: list[SlideOpenError] = []
    _each(find_slides(slides, problems), patch_one, problems, verbose)


@app.command()
@_guarded
def features(
    slide: Annotated[Path, typer.Argument(help="The slide file.")],
    patches: Annotated[Path, typer.Argument(help="Its patch coordinates, as `patch` writes them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Features file (HDF5) to write.")],
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    dtype: Dtype = "auto",
    resize: Resize = 256,
    batch_size: BatchSize = 32,
    num_workers: Workers = None,
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Patch features of one slide."""
    status = run_features(
        slide,
        patches,
        out,
        weights=weights,
        device=device,
        dtype=dtype,
        resize=resize,
        batch_size=batch_size,
        num_workers=num_workers,
        overwrite=overwrite,
        quiet=quiet,
    )
    if status:
        raise typer.Exit(status)


@app.command("slide")
@_guarded
def slide_stage(
    features_file: Annotated[Path, typer.Argument(metavar="FEATURES", help="Features file (HDF5) of one slide.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Embedding file (HDF5) to write.")],
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Slide embedding from a features file."""
    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    limit = None if max_memory is None else parse_memory(max_memory)
    with _status("loading weights", quiet):
        encoder = loading.load_slide_encoder(weights, device=target)
    note_random(encoder.is_random, weights, quiet)
    with _status("slide encoder", quiet):
        path, reused = embed_features_file(
            features_file, out, encoder, dtype=compute, max_memory=limit, overwrite=overwrite
        )
    say_result(path, "", reused, quiet)


@app.command()
@_guarded
def doctor(verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Versions, devices, and which backends serve here and why."""
    findings = examine()
    console = Console(soft_wrap=True, highlight=False)
    topic = ""
    for finding in findings if not quiet else []:
        if finding.topic != topic:
            topic = finding.topic
            console.print(f"[bold]{topic}[/bold]")
        mark = {True: "[green]ok[/green]", False: "[red]!![/red]", None: "  "}[finding.ok]
        console.print(f"  {mark} {finding.name:<24}{escape(finding.value)}")


@app.command()
@_guarded
def demo(
    out: Out = Path("demo-output"),
    weights: Weights = "random:0",
    slide: Annotated[
        Path | None, typer.Option(help="Your own slide; default: a real one from the package index.")
    ] = None,
    device: Device = "auto",
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask the package index; use a made-up slide.")
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Encode a real slide and draw what came out."""

    def report(line: str) -> None:
        if not quiet:
            say(line)

    with progress_bar("encoding patches", disable=quiet) as progress:
        result = run_demo(
            out, weights=weights, slide=slide, device=device, offline=offline, progress=progress, report=report
        )
    note_random(weights.startswith("random:"), weights, quiet)
    for path, meaning in result.files:
        say_result(path, meaning, False, False)


app.command()(_guarded(train))
app.command()(_guarded(evaluate))
app.command()(_guarded(ablate))


def _each(files: list[Path], work: Callable[[Path], int], problems: list[SlideOpenError], verbose: int) -> None:
    """Work through files: one bad slide must not cost a lab the other hundred. Exits with the worst status."""
    statuses = {EXIT_ERROR} if problems else set()
    failed = len(problems)
    for problem in problems:
        _report(problem, verbose)
    for file in files:
        try:
            statuses.add(work(file))
        # A slide is the boundary of a fault, whatever its bytes make a library raise, MemoryError included.
        except Exception as exc:  # noqa: BLE001
            _report(exc, verbose, file)
            statuses.add(EXIT_ERROR)
            failed += 1
            # The traceback holds the frames, and with them the arrays, of what failed for want of memory.
            exc.__traceback__ = None
    if failed and len(files) + len(problems) > 1:
        say(f"{failed} of {len(files) + len(problems)} slides failed")
    for status in (EXIT_ERROR, EXIT_UNREADABLE):
        if status in statuses:
            raise typer.Exit(status)


def _patching(
    patch_size: int, step_size: int | None, patch_level: int, otsu: bool, seg_downsample: float, strict_scale: bool
) -> dict[str, Any]:
    return {
        "patch_size": patch_size,
        "step_size": patch_size if step_size is None else step_size,
        "patch_level": patch_level,
        "use_otsu": otsu,
        "seg_downsample": seg_downsample,
        "strict_scale": strict_scale,
    }


@contextmanager
def _status(text: str, quiet: bool) -> Iterator[None]:
    if quiet or not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(text):
        yield
