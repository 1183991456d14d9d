"""`exaonepath slide`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options
from exaonepath.cli.console import note_random, say_result, status


def slide(
    features_file: Annotated[Path, typer.Argument(metavar="FEATURES", help="Features file (HDF5) of one slide.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Embedding file (HDF5) to write.")],
    weights: options.Weights = options.DEFAULT_WEIGHTS,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_memory: options.MaxMemory = None,
    overwrite: options.Overwrite = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Slide embedding from a features file."""
    from exaonepath.device import resolve_device, resolve_dtype
    from exaonepath.encoders import loading
    from exaonepath.encoders.memory_plan import parse_memory
    from exaonepath.slides.embed import embed_features_file

    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    limit = None if max_memory is None else parse_memory(max_memory)
    with status("loading weights", quiet):
        encoder = loading.load_slide_encoder(weights, device=target)
    note_random(encoder.is_random, weights, quiet)
    with status("slide encoder", quiet):
        path, reused = embed_features_file(
            features_file, out, encoder, dtype=compute, max_memory=limit, overwrite=overwrite
        )
    say_result(path, "", reused, quiet)
