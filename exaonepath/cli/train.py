"""`exaonepath train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exaonepath.cli import options
from exaonepath.cli.console import say

if TYPE_CHECKING:
    from exaonepath.alignment.training.settings import TrainSettings


def train(
    config: Annotated[Path | None, typer.Argument(metavar="SETTINGS", help="Settings file (TOML).")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one resumes it.")] = Path("run"),
    mudata: Annotated[str | None, typer.Option(help="Molecular profiles (.h5mu); data.mudata.")] = None,
    slides: Annotated[str | None, typer.Option(help="Table of slides; data.slides.")] = None,
    labels: Annotated[str | None, typer.Option(help="Table of labels; data.labels.")] = None,
    id_column: options.PatientColumn = None,
    epochs: Annotated[int | None, typer.Option(help="run.epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patients of a step; run.batch_size.")] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Patients encoded at once; run.chunk_size.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; optimizer.lr.")] = None,
    seed: Annotated[int | None, typer.Option(help="run.seed.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; run.device.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16; run.precision.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: section.key=value; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all inputs; print what would be trained, and its time and memory.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again if the folder already holds a run.")
    ] = False,
    verbose: options.Verbose = 0,
    quiet: options.Quiet = False,
) -> None:
    """Align slides with molecular profiles; options override the settings file, and the same command resumes.

    Writes <out>/model, <out>/best, <out>/checkpoints, <out>/metrics.jsonl, <out>/tensorboard.
    Example: exaonepath train settings.toml --out run
    Several GPUs: torchrun --nproc-per-node 4 -m exaonepath train settings.toml --out run
    """
    from exaonepath.alignment.early_checks import check_headers
    from exaonepath.alignment.training.settings_file import read_settings, read_tables

    flags = {
        "data.mudata": mudata,
        "data.slides": slides,
        "data.labels": labels,
        "data.id_column": id_column,
        "run.epochs": epochs,
        "run.batch_size": batch_size,
        "run.chunk_size": chunk_size,
        "optimizer.lr": lr,
        "run.seed": seed,
        "run.device": device,
        "run.precision": precision,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    check_headers(read_tables(config, settings or (), values=given).get("data"))
    chosen = read_settings(config, settings or (), values=given)
    quiet = quiet or int(os.environ.get("RANK", "0")) > 0
    if dry_run:
        _say_prepared(chosen, out)
        return
    # Cohorts need additional packages; --help and errors in the settings do not.
    from exaonepath.alignment.training.run import train as run

    with _bar(quiet) as progress:
        result = run(chosen, out, overwrite=overwrite, progress=progress, report=None if quiet else _say_lines)
    _leave_group()
    if not result.finished:
        raise KeyboardInterrupt
    if not quiet:
        best = "" if result.best is None else f", best {chosen.run.select} {result.best:.3f} at step {result.best_step}"
        sys.stdout.write(f"{out / 'model'}  {result.step} steps{best}\n")


def _leave_group() -> None:
    """Destroy the process group if a launcher started several processes; otherwise the backend warns at exit."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _say_prepared(settings: TrainSettings, out: Path) -> None:
    from exaonepath.alignment.training.run import check, estimate

    prepared = check(settings, out)
    _say_lines(prepared.summary())
    if (found := estimate(prepared, out)) is not None:
        _say_lines(found.summary())


def _say_lines(text: str) -> None:
    for line in text.splitlines():
        say(line)


@contextmanager
def _bar(quiet: bool) -> Iterator[Any]:
    """Show a bar with the loss on a terminal, and an occasional line elsewhere."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():

        def line(step: int, total: int, row: Mapping[str, Any]) -> None:
            if row["kind"] == "slide_start":
                if row["slide_step"] in (1, row["slide_steps"]):
                    say(f"start of the slide encoder {row['slide_step']}/{row['slide_steps']}  loss {row['loss']:.4f}")
            elif step == total or step % max(1, total // 20) == 0:
                say(f"step {step}/{total}  loss {row['loss']:.4f}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"))

        def update(step: int, total: int, row: Mapping[str, Any]) -> None:
            start = row["kind"] == "slide_start"
            done, of = (row["slide_step"], row["slide_steps"]) if start else (step, total)
            bar.update(
                task, completed=done, total=of, loss=row["loss"], description="slide start" if start else "training"
            )

        yield update
