"""The folder of a training run: settings, checkpoints, metrics, the best and the final model.

settings.json       the settings, with the hashes of settings and cohort           split.json   patients of each split
metrics.jsonl       one JSON object per line: training steps, validations, warnings
tensorboard/        the same as event files
checkpoints/        step-<n>/, to resume from                                      best/ model/  `from_pretrained`
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from exaonepath.alignment.training.settings import differing_keys
from exaonepath.encoders.loading import no_bars
from exaonepath.errors import DataFileError, FileBusyError, OutputCollisionError, SettingsError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.atomic import (
    atomic_folder,
    ensure_folder,
    open_private,
    output_error,
    recover_folder,
    remove_abandoned,
    try_lock,
    write_text,
)
from exaonepath.version import __version__

logger = logging.getLogger(__name__)


_FOLDERS = ("checkpoints", "best", "model", "tensorboard")
# The settings are deleted last: while they exist, the folder is recognised as a run.
_FILES = ("metrics.jsonl", "split.json", "cohort_report.json", "settings.json")


class RunFolder:
    """Files of one run; see the module's description."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "settings.json"
        self.metrics_file = path / "metrics.jsonl"
        self.split_file = path / "split.json"
        self.report_file = path / "cohort_report.json"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.model = path / "model"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this run; raises `FileBusyError` if another process trains into it."""
        ensure_folder(self.path)
        with FileIO(open_private(self.path / ".lock"), "a+") as lock:
            if not try_lock(lock.fileno()):
                raise FileBusyError(f"another process is training into {self.path}")
            yield

    def claim(self, settings: Mapping[str, Any], cohort_hash: str, *, overwrite: bool) -> bool:
        """Use the folder for this run.

        Returns:
            True if the folder already has this run, which may be resumed.

        Raises:
            SettingsError: the folder has a run with other settings (they are named) or another cohort.
            OutputCollisionError: the folder has other content.
        """
        if overwrite and self.settings_file.exists():
            for name in _FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
        if self.check(settings, cohort_hash):
            return True
        content = {
            "settings": dict(settings),
            "settings_hash": settings_hash(settings),
            "cohort_hash": cohort_hash,
            "exaonepath_version": __version__,
        }
        write_text(self.settings_file, json.dumps(content, indent=1) + "\n")
        return False

    def check(self, settings: Mapping[str, Any], cohort_hash: str) -> bool:
        """Whether the folder already has this run, which may be resumed; nothing is written.

        Raises:
            SettingsError, OutputCollisionError: see `claim`. OutputError: the folder is not writable.
        """
        if self.settings_file.exists():
            stored = self._stored()
            if differing := differing_keys(stored["settings"], dict(settings)):
                raise SettingsError(
                    f"{self.path} holds a run of other settings ({', '.join(differing)}); resume with the same ones, "
                    "train into another folder, or ask to overwrite"
                )
            if stored["cohort_hash"] != cohort_hash:
                raise SettingsError(
                    f"the cohort has changed since the run in {self.path} was started, and a run cannot be resumed on "
                    "other data; train into another folder, or ask to overwrite"
                )
            return True
        existing = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise output_error(self.path, PermissionError(f"{existing} cannot be written to"))
        own = {*_FOLDERS, *_FILES}
        content = self.path.iterdir() if existing == self.path.absolute() else ()
        foreign = [p.name for p in content if p.name not in own and not p.name.startswith(".")]
        if foreign:
            raise OutputCollisionError(
                f"{self.path} is not empty and holds no training run ({', '.join(sorted(foreign)[:5])}); name a new one"
            )
        return False

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line to the metrics; numbers that are not finite become null."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(row)) + "\n")
        except OSError as exc:
            raise output_error(self.metrics_file, exc) from exc

    def rewind(self, step: int) -> None:
        """Delete the metrics after `step`, and an incomplete last line of a killed process."""
        rows = [line for line in self.metrics() if line["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics, in order."""
        if not self.metrics_file.exists():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break  # an incomplete line of a killed process; it is the last one
        return rows

    def save_model(self, model: PreTrainedModel, target: Path) -> None:
        """`save_pretrained` into `target`, completely or not at all; an earlier model in it is replaced."""
        with atomic_folder(target) as work, no_bars():
            try:
                model.save_pretrained(work)
            except SafetensorError as exc:
                raise output_error(target, OSError(str(exc))) from exc

    def clean(self) -> None:
        """Complete or delete files that a killed process was writing."""
        for target in (self.best, self.model):
            recover_folder(target)
        for folder in (self.path, self.checkpoints):
            remove_abandoned(folder)

    def _stored(self) -> dict[str, Any]:
        try:
            stored: dict[str, Any] = json.loads(self.settings_file.read_text(encoding="utf-8"))
            return {"settings": stored["settings"], "cohort_hash": stored["cohort_hash"]}
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise DataFileError(f"{self.settings_file} cannot be read ({exc}); ask to overwrite the run") from exc


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
