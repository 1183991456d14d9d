"""Patch features of one slide, from the shell, with the original's flags.

    python -m exaonepath.feature_extraction.extract_single_slide_feature \\
        --slide_path S --coords_h5_path C --out_h5_path O --batch_size_per_gpu 32 [--repo_id R]

Exit status: 0 done; 1 an error, told in one line; 2 wrong usage; 3 done, but some patches could not be read; 130
interrupted (the same command resumes).
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from exaonepath.errors import ExaonePathError

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS = "LGAI-EXAONE/EXAONE-Path-2.5"
EXIT_OK, EXIT_ERROR, EXIT_UNREADABLE, EXIT_INTERRUPTED = 0, 1, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: `sys.argv[1:]`) and return its exit status."""
    args = _parser().parse_args(argv)
    level = logging.ERROR if args.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # A scheduler's polite kill ends the run like Ctrl-C: threads stopped, files closed, 130.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _extract(args)
    except ExaonePathError as exc:
        if args.verbose:
            logger.exception("failed")
        _say(f"error: {exc}")
        return EXIT_ERROR
    except KeyboardInterrupt:
        _say("interrupted; what was done is kept: the same command resumes")
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _extract(args: argparse.Namespace) -> int:
    # torch and transformers take seconds to import: not for --help, nor for a wrong flag.
    from exaonepath.feature_extraction.extract import extract_features
    from exaonepath.feature_extraction.preprocessing import PreprocessingConfig
    from exaonepath.feature_extraction.progress import progress_bar
    from exaonepath.models.device import resolve_device, resolve_dtype
    from exaonepath.models.loading import load_patch_encoder
    from exaonepath.patches.slide import SlideImage

    preprocessing = PreprocessingConfig(resize=args.resize)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    with SlideImage(args.slide_path) as slide:  # first: a wrong path should not wait for the weights
        encoder = load_patch_encoder(args.weights, device=device)
        if encoder.is_random and not args.quiet:
            _say(f"note: {args.weights} are random weights, for trying out; the features mean nothing")
        with progress_bar(f"{slide.name}: features", disable=args.quiet) as progress:
            result = extract_features(
                slide,
                args.coords_h5_path,
                args.out_h5_path,
                encoder.model,
                weights=encoder.weights,
                weights_fingerprint=encoder.fingerprint,
                preprocessing=preprocessing,
                batch_size=args.batch_size_per_gpu,
                num_workers=args.num_workers,
                device=device,
                dtype=dtype,
                progress=progress,
                overwrite=args.overwrite,
            )
    if not args.quiet:
        done = "already there" if result.reused else "written"
        resumed = f", {result.resumed_from} from an earlier run" if result.resumed_from else ""
        sys.stdout.write(f"{result.path}: features of {result.n_features} patches {done}{resumed}\n")
    if result.failures:
        _say(
            f"{len(result.failures)} of {result.n_patches} patches of {args.slide_path} could not be read; they are "
            f"listed in {result.path} (failed_index, failed_coords, failed_reason); the same command tries them again"
        )
        return EXIT_UNREADABLE
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exaonepath.feature_extraction.extract_single_slide_feature",
        description="Patch features of one slide.",
        epilog="Exit status: 0 done, 1 error, 2 usage, 3 done but some patches could not be read, 130 interrupted.",
    )

    def flag(name: str, *more: str, **options: object) -> None:
        dashed = [f"--{name.replace('_', '-')}"] if "_" in name else []
        parser.add_argument(f"--{name}", *dashed, *more, dest=name, **options)  # type: ignore[arg-type]

    flag("slide_path", required=True, type=Path, metavar="FILE", help="the slide")
    flag("coords_h5_path", required=True, type=Path, metavar="FILE", help="patch coordinates, from patchfy")
    flag("out_h5_path", required=True, type=Path, metavar="FILE", help="features file to write")
    flag("batch_size_per_gpu", type=int, default=32, metavar="N", help="patches in one call of the encoder (32)")
    flag(
        "weights",
        "--repo_id",
        "--repo-id",
        default=DEFAULT_WEIGHTS,
        metavar="WEIGHTS",
        help=f"Hub id, folder, or random:SEED ({DEFAULT_WEIGHTS})",
    )
    flag("device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    flag("dtype", default="auto", help="auto, float32, bfloat16 or float16 (auto: bfloat16 on CUDA, else float32)")
    flag("resize", type=int, default=256, metavar="PX", help="shorter side before the crop of 224 (256)")
    flag("num_workers", type=int, default=None, metavar="N", help="reading threads (one per core)")
    flag("overwrite", action="store_true", help="start over, whatever is stored")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice: everything")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    sys.exit(main())
