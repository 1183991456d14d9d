"""`exaonepath features`, and the stage that it shares with the script of EXAONE Path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from exaonepath.cli import options
from exaonepath.cli.console import note_random, progress_bar, say_result, say_unreadable
from exaonepath.cli.guard import EXIT_OK, EXIT_UNREADABLE


def features(
    slide: Annotated[Path, typer.Argument(help="The slide file.")],
    patches: Annotated[Path, typer.Argument(help="Its patch coordinates, as `patch` writes them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Features file (HDF5) to write.")],
    weights: options.Weights = options.DEFAULT_WEIGHTS,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    reader: options.Reader = "auto",
    resize: options.Resize = 256,
    batch_size: options.BatchSize = "32",
    num_workers: options.Workers = None,
    compile: options.Compile = False,
    feature_dtype: options.FeatureDtype = "float32",
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
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
        batch_size=options.batch_size(batch_size),
        num_workers=num_workers,
        compile=compile,
        feature_dtype=feature_dtype,
        overwrite=overwrite,
        quiet=quiet,
        reader=reader,
    )
    if status:
        raise typer.Exit(status)


def run_features(
    slide: Path,
    patches: Path,
    out: Path,
    *,
    weights: str,
    device: str,
    dtype: str,
    resize: int,
    batch_size: int | Literal["auto"],
    num_workers: int | None,
    overwrite: bool,
    quiet: bool,
    compile: bool = False,
    feature_dtype: str = "float32",
    reader: str = "auto",
) -> int:
    """Run the features stage of one slide as a command; results are written to stdout, notes to stderr.

    Returns:
        The exit code.

    Raises:
        ExaonePathError: see `extract_features`.
    """
    from exaonepath.device import resolve_device, resolve_dtype
    from exaonepath.encoders import loading
    from exaonepath.slides.features.extract import extract_features
    from exaonepath.slides.features.identity import check_feature_dtype
    from exaonepath.slides.features.preprocessing import PreprocessingConfig
    from exaonepath.slides.image import SlideImage

    preprocessing = PreprocessingConfig(resize=resize)
    stored_as = check_feature_dtype(feature_dtype)
    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    with SlideImage(slide, reader) as opened:  # opened first: a wrong path must fail before the weights are loaded
        encoder = loading.load_patch_encoder(weights, device=target)
        note_random(encoder.is_random, weights, quiet)
        with progress_bar(f"{opened.name}: features", disable=quiet) as progress:
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
                compile=compile,
                feature_dtype=stored_as,
                progress=progress,
                overwrite=overwrite,
            )
    resumed = f", {result.resumed_from} from an earlier run" if result.resumed_from else ""
    say_result(result.path, f"{result.n_features} patches{resumed}", result.reused, quiet)
    if result.failures:
        say_unreadable(len(result.failures), result.n_patches, slide, result.path)
        return EXIT_UNREADABLE
    return EXIT_OK
