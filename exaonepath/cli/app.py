"""The `exaonepath` command: each subcommand imports the modules that it needs only when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from exaonepath.cli.ablate import ablate
from exaonepath.cli.collect import collect
from exaonepath.cli.demo import demo
from exaonepath.cli.doctor import doctor
from exaonepath.cli.encode import encode
from exaonepath.cli.evaluate import evaluate
from exaonepath.cli.export import export
from exaonepath.cli.features import features
from exaonepath.cli.guard import guarded, interruptible
from exaonepath.cli.heatmap import heatmap
from exaonepath.cli.import_features import import_features
from exaonepath.cli.patch import patch
from exaonepath.cli.repeat import repeat
from exaonepath.cli.slide import slide
from exaonepath.cli.status import status
from exaonepath.cli.train import train
from exaonepath.cli.view import view
from exaonepath.version import __version__

app = typer.Typer(
    name="exaonepath",
    help="Whole-slide pathology images to slide embeddings.",
    epilog="Exit status: 0 done, 1 error, 2 usage, 3 done but some patches could not be read, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `exaonepath` command."""
    with interruptible():  # covers argument parsing too: paths are checked before the command starts
        app()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Whole-slide pathology images to slide embeddings."""


_IN_ORDER: tuple[Callable[..., None], ...] = (
    *(encode, patch, features, slide, status, collect, view, heatmap, export, import_features),
    *(doctor, demo, train, evaluate, ablate, repeat),
)
for command in _IN_ORDER:
    # Named like its function, apart from the one whose name Python reserves.
    app.command("import" if command is import_features else None)(guarded(command))
