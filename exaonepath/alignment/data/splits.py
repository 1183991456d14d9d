"""Training, validation and test patients: split by patient, stratified, with a seed, independent of the row order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.atomic import write_text
from exaonepath.text import few

logger = logging.getLogger(__name__)

DEFAULT_FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.7, "val": 0.1, "test": 0.2})


@dataclass(frozen=True)
class Split:
    """A division of patients into parts.

    Attributes:
        parts: name ("train", "val", "test", ...) to sorted patient ids; no patient is in two parts.
        seed: seed of the split; None if the split was given.
        stratified_by: label column, or None.
    """

    parts: Mapping[str, tuple[str, ...]]
    seed: int | None = None
    stratified_by: str | None = None

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for name, patients in self.parts.items():
            for patient in patients:
                if patient in owner:
                    raise SettingsError(f"patient {patient!r} is in {owner[patient]} and in {name}; parts are disjoint")
                owner[patient] = name

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """Patients of a part; raises `SettingsError` if it does not exist."""
        if name not in self.parts:
            raise SettingsError(f"the split has no part {name!r}, only {', '.join(self.parts)}")
        return self.parts[name]

    def restricted_to(self, patients: Iterable[str]) -> Split:
        """The split with these patients only."""
        known = set(patients)
        parts = {name: tuple(p for p in part if p in known) for name, part in self.parts.items()}
        return Split(parts, self.seed, self.stratified_by)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; raises `OutputError` if that fails."""
        data = {
            "seed": self.seed,
            "stratified_by": self.stratified_by,
            "parts": {k: list(v) for k, v in self.parts.items()},
        }
        write_text(path, json.dumps(data, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Split:
        """Read a file of `save` (or one of the same form written by hand).

        Raises:
            DataFileError: the file is missing, no JSON, has no lists of ids, or a patient is in two parts.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            parts = {str(name): tuple(sorted(map(str, ids))) for name, ids in data["parts"].items()}
            return Split(parts, data.get("seed"), data.get("stratified_by"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise DataFileError(f"{path} cannot be read as a split ({exc})") from exc


def split_patients(
    patients: Iterable[str],
    labels: pd.Series | None = None,
    *,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Split:
    """Divide patients into parts.

    Within each label, patients are sorted by a hash of seed and id. Then each patient in turn is assigned to the part
    whose size is furthest below its fraction. So the sizes are exact to one patient, and within every label to one or
    two. Labels with fewer patients than parts cannot be in all parts: together they form one stratum.

    Args:
        patients: ids, in any order.
        labels: label of each patient (index: ids); patients without a label form a separate stratum. None: no strata.
            If most labels of the column have only one patient, a warning is logged.
        fractions: part to fraction, positive, with sum 1.
        seed: different seeds give different splits.
        groups: patient to group (for example, the site): a group is never divided, and sizes are only as exact as the
            groups allow. Then `labels` are not used. Patients without a group count as groups of one.

    Raises:
        SettingsError: fractions do not add up to 1, ids occur twice, or a part has no patients.
    """
    patients = sorted(patients)
    twice = sorted({a for a, b in pairwise(patients) if a == b})
    if twice:
        raise SettingsError(f"{len(twice)} patient id(s) occur more than once: {few(twice)}")
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise SettingsError(f"fractions must be positive and add up to 1, got {dict(fractions)}")
    if groups is not None:
        return _split_groups(patients, fractions, seed, groups)
    strata: dict[str, list[str]] = {}
    for patient in patients:
        label = None if labels is None else labels.get(patient)
        strata.setdefault("" if label is None or pd.isna(label) else str(label), []).append(patient)
    if labels is not None:
        _warn_of_singles(str(labels.name), {label: ids for label, ids in strata.items() if label})
    # As separate strata, a label with one patient would be in the same part for every seed.
    small = [label for label in strata if len(strata[label]) < len(fractions)]
    merged = sorted(patient for label in small for patient in strata.pop(label))
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    assigned = 0
    for stratum in (*(strata[label] for label in sorted(strata)), merged):
        for patient in sorted(stratum, key=lambda p: hashlib.sha256(f"{seed}\0{p}".encode()).digest()):
            assigned += 1
            lag = {name: share * assigned - len(parts[name]) for name, share in fractions.items()}
            parts[max(lag, key=lambda name: lag[name])].append(patient)
    nobody = [name for name, ids in parts.items() if not ids]
    if nobody:
        raise SettingsError(f"{len(patients)} patients are too few: nobody is left for {', '.join(nobody)}")
    column = None if labels is None else str(labels.name)
    return Split({name: tuple(sorted(ids)) for name, ids in parts.items()}, seed, column)


def _split_groups(
    patients: Sequence[str], fractions: Mapping[str, float], seed: int, groups: Mapping[str, str]
) -> Split:
    """Whole groups, the largest first, each to the part that is furthest below its size; equal ones by their hash."""
    members: dict[tuple[bool, str], list[str]] = {}
    for patient in patients:
        members.setdefault((patient in groups, groups.get(patient, patient)), []).append(patient)
    order = sorted(
        members.items(), key=lambda item: (-len(item[1]), hashlib.sha256(f"{seed}\0{item[0][1]}".encode()).digest())
    )
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    for _, ids in order:
        lag = {name: share * len(patients) - len(parts[name]) for name, share in fractions.items()}
        parts[max(lag, key=lambda name: lag[name])] += ids
    if nobody := [name for name, ids in parts.items() if not ids]:
        raise SettingsError(f"{len(members)} groups are too few: nobody is left for {', '.join(nobody)}")
    return Split({name: tuple(sorted(ids)) for name, ids in parts.items()}, seed)


def _warn_of_singles(column: str, strata: Mapping[str, Sequence[str]]) -> None:
    alone = [f"{label} ({ids[0]})" for label, ids in strata.items() if len(ids) == 1]
    if 2 * len(alone) > len(strata) > 2:
        logger.warning(
            "%d of the %d labels in the column %r have one patient each, such as %s: a split cannot be stratified by "
            "them; name a column of few classes",
            len(alone),
            len(strata),
            column,
            few(alone, 3),
        )
