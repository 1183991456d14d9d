"""Computes the patch features of one slide from the shell, with the original's flags.

    python -m exaonepath.feature_extraction.extract_single_slide_feature \\
        --slide_path S --coords_h5_path C --out_h5_path O --batch_size_per_gpu 32 [--repo_id R]

Exit status: 0 success; 1 an error, reported in one line; 2 wrong usage; 3 success, but some patches could not be read;
130 interrupted (the same command resumes).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from exaonepath.cli.console import say
from exaonepath.cli.features import run_features
from exaonepath.cli.guard import EXIT_ERROR, EXIT_INTERRUPTED, interruptible, report
from exaonepath.cli.logs import set_up_logging
from exaonepath.encoders.published import DEFAULT_WEIGHTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: `sys.argv[1:]`) and return its exit status."""
    args = _parser().parse_args(argv)
    set_up_logging(args.verbose, args.quiet)
    try:
        with interruptible():
            return run_features(
                args.slide_path,
                args.coords_h5_path,
                args.out_h5_path,
                weights=args.weights,
                device=args.device,
                dtype=args.dtype,
                resize=args.resize,
                batch_size=args.batch_size_per_gpu,
                num_workers=args.num_workers,
                overwrite=args.overwrite,
                quiet=args.quiet,
            )
    # Scripts rely on the one line and the exit code, whatever error a library or an unusual file raises.
    except Exception as exc:  # noqa: BLE001
        report(exc, args.verbose)
        return EXIT_ERROR
    except KeyboardInterrupt:
        say("interrupted; what was done is kept: the same command resumes")
        return EXIT_INTERRUPTED


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
    parser.add_argument("-v", "--verbose", action="count", default=0, help="more output; repeat for debug output")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
