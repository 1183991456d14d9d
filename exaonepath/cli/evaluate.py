"""`exaonepath evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from exaonepath.cli import options


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a trained alignment model's.")],
    cohort: Annotated[
        Path | None,
        typer.Argument(help="Folder with cohort.h5mu, slides.csv, labels.csv, or a settings file; default: the run's."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("evaluation"),
    split: Annotated[Path | None, typer.Option(help="Split of COHORT; default: all of it is held out.")] = None,
    id_column: options.PatientColumn = None,
    label: options.Labels = None,
    time: Annotated[str, typer.Option(help="Column of survival times.")] = "time",
    event: Annotated[str, typer.Option(help="Column that is 1 where the event was seen.")] = "event",
    missing: Annotated[bool, typer.Option(help="Curves over modalities missing at inference.")] = True,
    baselines: Annotated[bool, typer.Option(help="Fit baselines on the training patients of the split.")] = True,
    probes: Annotated[
        str,
        typer.Option(
            help="train: fit probes on training patients; held-out: cross-validate within the held-out.",
            callback=options.one_of("train", "held-out"),
        ),
    ] = "train",
    site: Annotated[
        str | None, typer.Option(help="Column that tells the site, or tcga for barcodes; default: a usual name.")
    ] = None,
    analyses: Annotated[
        str, typer.Option(help="Comma-separated: few-shot, zero-shot, expression, calibration, slide-search; or none.")
    ] = "all",
    expression: Annotated[
        str, typer.Option("--expression-of", help="Modality whose features are predicted from the slide.")
    ] = "rna",
    external: Annotated[
        Path | None, typer.Option(help="Another cohort, tested as a whole next to the test patients.")
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw figures (matplotlib).")] = True,
    export: Annotated[
        bool, typer.Option("--export", help="Also write embeddings in the format that Patho-Bench reads.")
    ] = False,
    by_name: Annotated[
        bool, typer.Option("--by-name", help="Accept a cohort that lacks some features of the model.")
    ] = False,
    device: options.Device = "auto",
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Retrieval, probes, survival, missing modalities, projections and attention of a trained model.

    The numbers of test patients are compared with simple baselines. Further analyses: labels from few patients or from
    none, single genes from the slide, calibration, slides that find slides, and an external cohort.

    Writes <out>/evaluation.json, <out>/evaluation.md, <out>/expression.csv, figures, and with --export
    <out>/embeddings/. Example: exaonepath evaluate run --out evaluation
    """
    from exaonepath.alignment.early_checks import check_folders, check_headers, tables_of_evaluation

    check_folders(model, cohort)
    check_folders(model, external)
    check_headers(tables_of_evaluation(model, cohort, id_column), label or ())
    # This import takes seconds, so it comes after the checks.
    from exaonepath.alignment.analyses.registry import ANALYSES
    from exaonepath.alignment.evaluate import EvaluationSettings
    from exaonepath.alignment.report import export_embeddings, write_report
    from exaonepath.alignment.subject import open_subject

    names = {"all": tuple(ANALYSES), "none": ()}.get(analyses, tuple(filter(None, map(str.strip, analyses.split(",")))))
    settings = EvaluationSettings(
        labels=tuple(label or ()),
        time=time,
        event=event,
        missing=missing,
        baselines=baselines,
        probes=probes,
        site=site,
        analyses=names,
        expression=expression,
        external=None if external is None else str(external),
    )
    subject = open_subject(model, cohort, split=split, by_name=by_name, device=device, id_column=id_column)
    write_report(subject, out, settings, figures=figures)
    if export:
        export_embeddings(subject, out / "embeddings")
    if not quiet:
        sys.stdout.write((out / "evaluation.md").read_text(encoding="utf-8"))
