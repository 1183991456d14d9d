"""`exaonepath repeat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options


def repeat(
    settings: Annotated[Path, typer.Argument(help="Settings of the runs (TOML), without a split of their own.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; runs in it are reused.")] = Path("repeats"),
    splits: Annotated[int, typer.Option(min=2, help="Random splits, with a training on each.")] = 5,
    label: options.Labels = None,
    baselines: Annotated[bool, typer.Option(help="Fit baselines on the training patients of each split.")] = True,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Train and evaluate on several random splits of a cohort, and compare with baselines over all of them.

    Runs are kept in <out>/runs by the hash of their settings: finished runs are not trained again, interrupted ones
    continue. Writes <out>/repeats.json and <out>/repeats.md.
    Example: exaonepath repeat settings.toml --splits 5 --out repeats
    """
    from exaonepath.alignment.evaluate import EvaluationSettings
    from exaonepath.alignment.studies.repeats import repeat as run
    from exaonepath.alignment.training.settings_file import read_settings

    def report(line: str) -> None:
        if not quiet:
            sys.stderr.write(line + "\n")

    wanted = EvaluationSettings(labels=tuple(label or ()), baselines=baselines)
    run(read_settings(settings), out, splits=splits, evaluation=wanted, report=report)
    if not quiet:
        sys.stdout.write((out / "repeats.md").read_text(encoding="utf-8"))
