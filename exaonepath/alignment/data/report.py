"""Findings of the checks of a cohort: all problems in one list, so that a user can correct all of them at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from exaonepath.errors import ExaonePathError

logger = logging.getLogger(__name__)

Level = Literal["error", "warning", "note"]
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


@dataclass(frozen=True)
class Finding:
    """One finding of a check.

    Attributes:
        level: "error" (the cohort cannot be used), "warning" (it can be used, but may be wrong), "note" (a decision).
        code: a stable short name of the kind of finding, for scripts: "duplicate-patients", "wrong-scale", ...
        message: the problem and what to do.
        where: the modality, or "slides", "labels", "cohort".
        patients, features: all affected ids; the message shows only some of them.
    """

    level: Level
    code: str
    message: str
    where: str
    patients: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


@dataclass
class CohortReport:
    """Findings in the order of the checks. The loaders fill it; it must not be changed after they return it."""

    findings: list[Finding] = field(default_factory=list)

    def add(
        self,
        level: Level,
        code: str,
        where: str,
        message: str,
        *,
        patients: Iterable[str] = (),
        features: Iterable[str] = (),
    ) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, code, message, where, tuple(patients), tuple(features)))

    @property
    def errors(self) -> list[Finding]:
        """The findings that make the cohort unusable."""
        return [f for f in self.findings if f.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that the user should read."""
        return [f for f in self.findings if f.level == "warning"]

    def __str__(self) -> str:
        return "\n".join(f"{f.level}: {f.where}: {f.message}" for f in self.findings) or "nothing found"

    def as_dict(self) -> list[dict[str, Any]]:
        """Plain JSON types, one dict per finding."""
        return [{**vars(f), "patients": list(f.patients), "features": list(f.features)} for f in self.findings]

    def log(self) -> None:
        """Log every finding at its level."""
        for f in self.findings:
            logger.log(_LEVELS[f.level], "%s: %s", f.where, f.message)

    def raise_errors(self) -> None:
        """Raise `CohortError` with all errors, if there are any."""
        if self.errors:
            raise CohortError(self)


class CohortError(ExaonePathError):
    """A cohort cannot be used; the message lists every reason, and `report` contains them with all affected ids."""

    def __init__(self, report: CohortReport) -> None:
        self.report = report
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """A first line, and a line for each reason."""
        reasons = [f"{f.where}: {f.message}" for f in self.report.errors]
        head = "the cohort cannot be used" + (f", for {len(reasons)} reasons" if len(reasons) > 1 else "")
        return (f"{head}:", *(f"  - {reason}" for reason in reasons))

    def __reduce__(self) -> tuple[type[CohortError], tuple[CohortReport]]:
        return CohortError, (self.report,)  # pickle needs it, to send the error from a worker process
