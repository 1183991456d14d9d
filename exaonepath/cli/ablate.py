"""`exaonepath ablate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options
from exaonepath.errors import SettingsError

_TRAINED = ("frope", "loss", "frozen", "modalities")
_ANALYSES = ("missing", "projections", "attention")


def ablate(
    studies: Annotated[
        list[str], typer.Argument(help=f"{', '.join((*_TRAINED, *_ANALYSES))}, or all.", metavar="STUDY...")
    ],
    settings: Annotated[
        Path | None, typer.Option(help="Settings of the base run (TOML); default: a small model on a synthetic cohort.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; runs in it are reused.")] = Path("ablations"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = 3,
    draws: Annotated[
        int, typer.Option(min=1, help="Draws of the synthetic cohort; all differ in patients and effects.")
    ] = 1,
    label: options.Labels = None,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Train variants of a model to answer an open question; one JSON file, one table and one figure each.

    Runs are kept in <out>/runs by the hash of their settings: finished runs are not trained again, interrupted ones
    continue. Writes <out>/<study>.json, <study>.md and ablation-<study>.png.
    Example: exaonepath ablate all --out ablations
    """
    wanted = [*_TRAINED, *_ANALYSES] if "all" in studies else list(dict.fromkeys(studies))
    if unknown := [name for name in wanted if name not in (*_TRAINED, *_ANALYSES)]:
        raise SettingsError(f"no study {', '.join(unknown)}; there are {', '.join((*_TRAINED, *_ANALYSES))} and all")
    from exaonepath.alignment.studies.ablations import StudyBase
    from exaonepath.alignment.studies.studies import run_analysis, run_and_draw
    from exaonepath.alignment.training.settings_file import read_settings

    labels = list(label or ())
    if settings is None:
        from exaonepath.alignment.studies.defaults import LABELS, synthetic_base

        labels = labels or list(LABELS)
        chosen = [synthetic_base(out / ("cohort" if not draw else f"cohort-{draw}"), draw) for draw in range(draws)]
    elif draws > 1:
        raise SettingsError(
            "--draws is for the synthetic cohort; exaonepath repeat trains on several splits of your own"
        )
    else:
        chosen = [read_settings(settings)]
    bases = [StudyBase.open(one, out, labels) for one in chosen]

    def report(line: str) -> None:
        if not quiet:
            sys.stderr.write(line + "\n")

    for name in wanted:
        run = run_and_draw if name in _TRAINED else run_analysis
        path = run(name, bases, out, seeds=range(seeds), labels=labels, report=report)
        if not quiet:
            sys.stdout.write(f"{path}\n")
