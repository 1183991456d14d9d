"""The `exaonepath` command.

Exit status: 0 done; 1 an error, told in one line each; 2 wrong usage; 3 done, but some patches could not be read;
130 interrupted (the same command resumes).
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from exaonepath.errors import ExaonePathError
from exaonepath.version import __version__

EXIT_ERROR, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 3, 130
DEFAULT_WEIGHTS = "LGAI-EXAONE/EXAONE-Path-2.5"

logger = logging.getLogger(__name__)
# Results go to stdout, everything said about the work to stderr: a pipe gets results alone.
_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)

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
PatchLevel = Annotated[int, typer.Option(help="Pyramid level the grid is laid for.")]
Otsu = Annotated[bool, typer.Option("--otsu", help="Otsu's threshold in place of a fixed one.")]
SegDownsample = Annotated[float, typer.Option(help="Shrink the image that is segmented, for flat slides.")]
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
        _set_up_logging(verbose, quiet)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            command(*args, verbose=verbose, quiet=quiet, **kwargs)
        except ExaonePathError as exc:
            if verbose:
                logger.exception("failed")
            _say_error(exc)
            raise typer.Exit(EXIT_ERROR) from exc
        except KeyboardInterrupt as exc:
            _err.print("interrupted; finished work is kept: the same command resumes")
            raise typer.Exit(EXIT_INTERRUPTED) from exc
        finally:
            signal.signal(signal.SIGTERM, previous)

    return run  # type: ignore[return-value]


def _show_version(value: bool) -> None:
    if value:
        _out.print(__version__)
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
    resize: Resize = 256,
    batch_size: BatchSize = 32,
    num_workers: Workers = None,
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Slides to embeddings, all stages. Finished stages are kept, an interrupted run resumes."""
    from exaonepath.feature_extraction.preprocessing import PreprocessingConfig
    from exaonepath.models.device import resolve_device, resolve_dtype
    from exaonepath.models.loading import load_patch_encoder, load_slide_encoder
    from exaonepath.pipeline import encode_slide, find_slides
    from exaonepath.storage import ensure_folder

    files = find_slides(slides)
    target = resolve_device(device)
    resolve_dtype(dtype, target)
    preprocessing = PreprocessingConfig(resize=resize)
    patching = _patching(patch_size, step_size, patch_level, otsu, seg_downsample)
    ensure_folder(out)
    with _status("loading weights", quiet):
        patch_encoder = load_patch_encoder(weights, device=target)
        slide_encoder = load_slide_encoder(weights, device=target)
    _announce_random(patch_encoder.is_random, weights, quiet)

    status = 0
    for file in files:
        try:
            with _progress(f"{file.name}", quiet) as progress:
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
                    overwrite=overwrite,
                    progress=progress,
                )
        except ExaonePathError as exc:
            # One bad slide must not cost a lab the other hundred.
            if verbose:
                logger.exception("%s failed", file)
            _say_error(exc)
            status = EXIT_ERROR
            continue
        _print_result(str(result.embedding_path), f"{result.n_patches} patches", "slide" in result.reused, quiet)
        if result.n_failed:
            _err.print(
                f"{result.n_failed} patches of {file} could not be read; they are listed in {result.features_path}"
            )
            status = status or EXIT_UNREADABLE
    if status:
        raise typer.Exit(status)


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
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Find tissue and lay the patch grid: <out>/patches/<id>.h5 and <out>/masks/<id>.jpg."""
    from exaonepath.patches import patchfy
    from exaonepath.pipeline import find_slides

    failed = False
    for file in find_slides(slides):
        try:
            path, coords, _ = patchfy(
                file,
                out,
                **_patching(patch_size, step_size, patch_level, otsu, seg_downsample),
                auto_skip=not overwrite,
            )
        except ExaonePathError as exc:
            if verbose:
                logger.exception("%s failed", file)
            _say_error(exc)
            failed = True
            continue
        _print_result(str(path), f"{len(coords)} patches", False, quiet)
    if failed:
        raise typer.Exit(EXIT_ERROR)


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
    from exaonepath.feature_extraction.extract import extract_features
    from exaonepath.feature_extraction.preprocessing import PreprocessingConfig
    from exaonepath.models.device import resolve_device, resolve_dtype
    from exaonepath.models.loading import load_patch_encoder
    from exaonepath.patches import SlideImage

    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    preprocessing = PreprocessingConfig(resize=resize)
    with SlideImage(slide) as opened:
        with _status("loading weights", quiet):
            encoder = load_patch_encoder(weights, device=target)
        _announce_random(encoder.is_random, weights, quiet)
        with _progress(slide.name, quiet) as progress:
            result = extract_features(
                opened,
                patches,
                out,
                encoder.model,
                weights=encoder.weights,
                weights_fingerprint=encoder.fingerprint,
                preprocessing=preprocessing,
                batch_size=batch_size,
                num_workers=num_workers,
                device=target,
                dtype=compute,
                progress=progress,
                overwrite=overwrite,
            )
    _print_result(str(result.path), f"{result.n_features} patches", result.reused, quiet)
    if result.failures:
        _err.print(f"{len(result.failures)} patches of {slide} could not be read; they are listed in {result.path}")
        raise typer.Exit(EXIT_UNREADABLE)


@app.command("slide")
@_guarded
def slide_stage(
    features_file: Annotated[Path, typer.Argument(metavar="FEATURES", help="Features file (HDF5) of one slide.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Embedding file (HDF5) to write.")],
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Slide embedding from a features file."""
    from exaonepath.models.device import resolve_device, resolve_dtype
    from exaonepath.models.loading import load_slide_encoder
    from exaonepath.slide_embedding import embed_features_file

    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    with _status("loading weights", quiet):
        encoder = load_slide_encoder(weights, device=target)
    _announce_random(encoder.is_random, weights, quiet)
    with _status("slide encoder", quiet):
        path, reused = embed_features_file(features_file, out, encoder, dtype=compute, overwrite=overwrite)
    _print_result(str(path), "", reused, quiet)


@app.command()
@_guarded
def doctor(verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Versions, devices, and which backends serve here and why."""
    from exaonepath.doctor import examine

    findings = examine()
    topic = ""
    for finding in findings if not quiet else []:
        if finding.topic != topic:
            topic = finding.topic
            _out.print(f"[bold]{topic}[/bold]")
        mark = {True: "[green]ok[/green]", False: "[red]!![/red]", None: "  "}[finding.ok]
        _out.print(f"  {mark} {finding.name:<24}{escape(finding.value)}")
    if any(finding.ok is False and finding.topic == "backends" for finding in findings):
        raise typer.Exit(EXIT_ERROR)


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
    from exaonepath.demo import run_demo

    def report(line: str) -> None:
        if not quiet:
            _err.print(line)

    with _progress("encoding patches", quiet) as progress:
        result = run_demo(
            out, weights=weights, slide=slide, device=device, offline=offline, progress=progress, report=report
        )
    _announce_random(weights.startswith("random:"), weights, quiet)
    for path, meaning in result.files:
        _out.print(f"{path}  {meaning}", markup=False)


def _patching(
    patch_size: int, step_size: int | None, patch_level: int, otsu: bool, seg_downsample: float
) -> dict[str, Any]:
    return {
        "patch_size": patch_size,
        "step_size": patch_size if step_size is None else step_size,
        "patch_level": patch_level,
        "use_otsu": otsu,
        "seg_downsample": seg_downsample,
    }


def _print_result(path: str, what: str, reused: bool, quiet: bool) -> None:
    if quiet:
        return
    note = ", ".join(filter(None, [what, "already there" if reused else ""]))
    _out.print(f"{path}  {note}".rstrip(), markup=False)


def _announce_random(is_random: bool, weights: str, quiet: bool) -> None:
    if is_random and not quiet:
        _err.print(f"note: {weights} are random weights, for trying out: the embeddings carry no pathology")


def _say_error(exc: BaseException) -> None:
    _err.print(f"error: {exc}", markup=False)


@contextmanager
def _progress(description: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    from exaonepath.feature_extraction.progress import progress_bar

    with progress_bar(description, disable=quiet) as progress:
        yield progress


@contextmanager
def _status(text: str, quiet: bool) -> Iterator[None]:
    if quiet or not sys.stderr.isatty():
        yield
        return
    with _err.status(text):
        yield


def _set_up_logging(verbose: int, quiet: bool) -> None:
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=_err, show_path=False, show_time=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if level > logging.DEBUG:
        # Its reports repeat, at length, what our own errors say in one line; its bars would land in batch logs.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
