"""Checkpoints: one folder per step, either complete or absent; tensors as safetensors, the rest as JSON, no pickle."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from exaonepath.errors import WeightsError
from exaonepath.files.atomic import atomic_folder, ensure_folder, output_error, recover_folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder. step: optimiser steps done.
        state: the `state` of `save_checkpoint`.
        tensors: group ("model", "optimizer", "ema") to name to tensor, on the CPU.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `folder`/step-<step>, completely or not at all, then delete all but the newest `keep`.

    Args:
        folder: folder of the run's checkpoints.
        step: optimiser steps done.
        tensors: group to name to tensor; each group is one file.
        state: plain JSON types.
        keep: at least 1.

    Raises:
        OutputError: the disk is full, or the folder is not writable.
    """
    ensure_folder(folder)
    target = folder / f"step-{step:08d}"
    with atomic_folder(target) as work:
        for group, named in tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            try:
                save_file(contiguous, work / f"{group}.safetensors")
            except SafetensorError as exc:
                raise output_error(target, OSError(str(exc))) from exc
        content = {
            "step": step,
            "groups": sorted(tensors),
            "checksums": {group: _checksum(work / f"{group}.safetensors") for group in tensors},
            "state": dict(state),
        }
        content["crc32"] = zlib.crc32(json.dumps(content).encode())
        (work / _STATE).write_text(json.dumps(content), encoding="utf-8")
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return target


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of `folder`, or None if there is none; damaged ones are skipped with a warning.

    Raises:
        WeightsError: there are checkpoints, but none can be read.
    """
    problems = []
    for aside in folder.glob(".step-*.replaced"):
        recover_folder(folder / aside.name[1:].removesuffix(".replaced"))
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            content = _state(path / _STATE)
            checks = content.get("checksums")
            tensors = {group: _tensors(path / f"{group}.safetensors", checks) for group in content["groups"]}
            return Checkpoint(path, int(content["step"]), content["state"], tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as exc:
            logger.warning("checkpoint %s cannot be read (%s); trying the one before it", path, exc)
            problems.append(f"{path.name}: {exc}")
    if problems:
        raise WeightsError(
            f"no checkpoint in {folder} can be read ({'; '.join(problems)}); restore one, or ask to overwrite the run"
        )
    return None


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
    """Restore the state from `optimizer_tensors`.

    Raises:
        WeightsError: the state belongs to another set of parameters.
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
        # AdamW needs its step count on the host.
        optimizer.state[parameter] = {
            entry: value.clone() if entry == "step" else value.to(parameter.device, copy=True)
            for entry, value in entries.items()
        }


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def _state(path: Path) -> dict[str, Any]:
    """The content of a state file; raises `ValueError` if its checksum does not match."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check = content.pop("crc32", None)
    # The checksum is that of the text, but parsing and writing the JSON of this module gives the same text again.
    # Version 0.1 wrote neither of the two keys.
    if (check is None) != ("checksums" not in content) or (
        check is not None and check != zlib.crc32(json.dumps(content).encode())
    ):
        raise ValueError(f"the checksum of {path.name} does not match")
    return content


def _tensors(path: Path, checksums: Mapping[str, int] | None) -> dict[str, Tensor]:
    if checksums is not None and checksums[path.stem] != _checksum(path):
        raise ValueError(f"the checksum of {path.name} does not match")
    return load_file(path)


def _checksum(path: Path) -> int:
    check = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            check = zlib.crc32(block, check)
    return check
