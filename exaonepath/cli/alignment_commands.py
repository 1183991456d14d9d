"""`exaonepath evaluate` and `exaonepath ablate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from exaonepath.errors import SettingsError

_TRAINED = ("frope", "loss", "frozen", "modalities")
_ANALYSES = ("missing", "projections", "attention")

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice: everything.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="Column to probe; may be given again.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a trained alignment model's.")],
    cohort: Annotated[
        Path | None,
        typer.Argument(help="Folder with cohort.h5mu, slides.csv, labels.csv, or a settings file; default: the run's."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("evaluation"),
    split: Annotated[Path | None, typer.Option(help="Split of COHORT; default: all of it is held out.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the labels with patient ids.")] = None,
    label: Labels = None,
    time: Annotated[str, typer.Option(help="Column of survival times.")] = "time",
    event: Annotated[str, typer.Option(help="Column that is 1 where the event was seen.")] = "event",
    missing: Annotated[bool, typer.Option(help="Curves over modalities missing at inference.")] = True,
    figures: Annotated[bool, typer.Option(help="Draw figures (matplotlib).")] = True,
    export: Annotated[bool, typer.Option("--export", help="Also write embeddings as Patho-Bench reads them.")] = False,
    by_name: Annotated[bool, typer.Option("--by-name", help="Take a cohort that lacks features of the model.")] = False,
    device: Device = "auto",
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Retrieval, probes, survival, missing modalities, projections and attention of a trained model.

    Writes <out>/evaluation.json, <out>/evaluation.md, figures, and with --export <out>/embeddings/.
    Example: exaonepath evaluate run --out evaluation
    """
    # Cohorts need packages of their own; --help does not.
    from exaonepath.alignment.evaluate import EvaluationSettings
    from exaonepath.alignment.report import export_embeddings, write_report
    from exaonepath.alignment.subject import open_subject

    subject = open_subject(model, cohort, split=split, by_name=by_name, device=device, id_column=id_column)
    settings = EvaluationSettings(labels=tuple(label or ()), time=time, event=event, missing=missing)
    write_report(subject, out, settings, figures=figures)
    if export:
        export_embeddings(subject, out / "embeddings")
    if not quiet:
        sys.stdout.write((out / "evaluation.md").read_text(encoding="utf-8"))


def ablate(
    studies: Annotated[
        list[str], typer.Argument(help=f"{', '.join((*_TRAINED, *_ANALYSES))}, or all.", metavar="STUDY...")
    ],
    settings: Annotated[
        Path | None, typer.Option(help="Settings of the base run (TOML); default: a small model on a synthetic cohort.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; runs in it are reused.")] = Path("ablations"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = 3,
    label: Labels = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Answer an open question by training variants side by side: JSON and a figure each.

    Runs are kept in <out>/runs by the hash of their settings: what is there is not trained again, what was stopped goes
    on. Writes <out>/<study>.json and <out>/ablation-<study>.png.
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

        chosen, labels = synthetic_base(out / "cohort"), labels or list(LABELS)
    else:
        chosen = read_settings(settings)
    base = StudyBase.open(chosen, out, labels)

    def report(line: str) -> None:
        if not quiet:
            sys.stderr.write(line + "\n")

    for name in wanted:
        run = run_and_draw if name in _TRAINED else run_analysis
        path = run(name, base, out, seeds=range(seeds), labels=labels, report=report)
        if not quiet:
            sys.stdout.write(f"{path}\n")
