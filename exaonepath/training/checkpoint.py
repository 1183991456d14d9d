"""Checkpoints: a folder a step, complete or not there at all; tensors as safetensors, the rest as JSON, no pickle."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from exaonepath.errors import WeightsError
from exaonepath.files.atomic import ensure_folder, output_error

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder. step: optimiser steps done.
        state: what was given to `save_checkpoint`.
        tensors: group ("model", "optimizer", "ema") to name to tensor, on the CPU.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `folder`/step-<step>, whole or not at all, then delete all but the newest `keep`.

    Args:
        folder: of the run's checkpoints.
        step: optimiser steps done.
        tensors: group to name to tensor; each group is one file.
        state: plain JSON types.
        keep: at least 1.

    Raises:
        OutputError: the disk is full, or nothing may be written there.
    """
    ensure_folder(folder)
    target = folder / f"step-{step:08d}"
    try:
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        try:
            for group, named in tensors.items():
                contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
                save_file(contiguous, work / f"{group}.safetensors")
            text = json.dumps({"step": step, "groups": sorted(tensors), "state": dict(state)})
            (work / _STATE).write_text(text, encoding="utf-8")
            for path in (*work.iterdir(), work):
                _sync(path)
            work.chmod(0o755)
            if target.exists():
                # The same step again, after resuming: what is there is set aside until the new one has its name.
                shutil.rmtree(work.with_suffix(".old"), ignore_errors=True)
                target.rename(work.with_suffix(".old"))
            work.rename(target)
            _sync(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(work.with_suffix(".old"), ignore_errors=True)
    except (OSError, SafetensorError) as exc:
        raise output_error(target, exc if isinstance(exc, OSError) else OSError(str(exc))) from exc
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return target


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of `folder`, or None where there is none; a damaged one is passed over, logged.

    Raises:
        WeightsError: there are checkpoints, and none can be read.
    """
    problems = []
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            content = json.loads((path / _STATE).read_text(encoding="utf-8"))
            tensors = {group: load_file(path / f"{group}.safetensors") for group in content["groups"]}
            return Checkpoint(path, int(content["step"]), content["state"], tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as exc:
            logger.warning("checkpoint %s cannot be read (%s); trying the one before it", path, exc)
            problems.append(f"{path.name}: {exc}")
    if problems:
        raise WeightsError(
            f"no checkpoint in {folder} can be read ({'; '.join(problems)}); delete the folder to start over"
        )
    return None


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process was writing."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as "parameter/entry" to tensor."""
    out = {}
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            out[f"{names[parameter]}/{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return out


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put `optimizer_tensors` back.

    Raises:
        WeightsError: the state is of another set of parameters.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = value
    trained = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    if stray := sorted(set(by_name) - set(trained)):
        raise WeightsError(f"the optimiser state holds parameters that are not trained here: {', '.join(stray[:5])}")
    for name, entries in by_name.items():
        parameter = trained[name]
        # AdamW keeps its step count on the host.
        optimizer.state[parameter] = {
            entry: value.clone() if entry == "step" else value.to(parameter.device, copy=True)
            for entry, value in entries.items()
        }


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
