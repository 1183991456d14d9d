"""`exaonepath encode --print-sbatch`: the same command as an array job of SLURM."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

_MOST_TASKS = 8
_NOT_REPEATED = ("print_sbatch", "dry_run", "json", "shard")  # the shard follows from the number of the array task


def sbatch_script(context: typer.Context, n_slides: int, device: str) -> str:
    """A job script that runs the command of this context in several processes.

    Every process may take every slide: the number of the array task only decides where it begins. So any number of
    them does, they may begin and end at any time, and the script can be submitted again.

    Args:
        context: of the command; its options are repeated as they were given.
        n_slides: slides of the run.
        device: the option `--device`.
    """
    program = shutil.which("exaonepath") or "exaonepath"
    command = [program, str(context.info_name), *given_arguments(context)]
    gpu = "" if device == "cpu" else "#SBATCH --gres=gpu:1\n"
    return (
        "#!/bin/bash\n"
        "# Submit with: sbatch FILE. Adjust the limits to the cluster; any number of array tasks may be used, and the\n"
        "# script may be submitted again: finished slides are not encoded again.\n"
        "#SBATCH --job-name=exaonepath\n"
        f"#SBATCH --array=1-{max(1, min(_MOST_TASKS, n_slides))}\n"
        f"{gpu}"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --mem=32G\n"
        "#SBATCH --time=12:00:00\n"
        "#SBATCH --requeue\n"
        "#SBATCH --open-mode=append\n"
        "set -euo pipefail\n"
        f"cd {shlex.quote(str(Path.cwd()))}\n"
        # With exec, the signal that SLURM sends before the time is over reaches the program.
        f"exec {shlex.join(command)}\n"
    )


def given_arguments(context: typer.Context) -> list[str]:
    """The arguments that were given to the command of this context, as a command line."""
    options: list[str] = []
    positional: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in _NOT_REPEATED or source is None or source.name != "COMMANDLINE":
            continue
        value: Any = context.params[name]
        if parameter.param_type_name == "argument":
            positional += [str(each) for each in (value if isinstance(value, list | tuple) else [value])]
            continue
        flag = max(parameter.opts, key=len)
        if getattr(parameter, "count", False):
            options += [flag] * value
        elif isinstance(value, bool):
            options.append(flag if value else max(parameter.secondary_opts, key=len))
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                options += [flag, str(each)]
    if any(text.startswith("-") for text in positional):
        positional.insert(0, "--")
    return [*options, *positional]


def print_sbatch(context: typer.Context, n_slides: int, device: str) -> None:
    """Write the script to standard output."""
    sys.stdout.write(sbatch_script(context, n_slides, device))
