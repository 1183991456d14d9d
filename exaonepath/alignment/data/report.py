"""What the checks of a cohort found: every problem in one list, so that a user mends a cohort in one go."""

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
    """One thing a check found.

    Attributes:
        level: "error" (the cohort cannot be used), "warning" (it can, but look), "note" (what was decided).
        code: a stable short name of the kind of finding, for scripts: "duplicate-patients", "wrong-scale", ...
        message: what, where, and what to do.
        where: the modality, or "slides", "labels", "cohort".
        patients, features: all ids concerned, not only those the message has room for.
    """

    level: Level
    code: str
    message: str
    where: str
    patients: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


@dataclass
class CohortReport:
    """Findings in the order they were made; filled by the loaders, frozen in spirit once they return it."""

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
        """The findings to look at."""
        return [f for f in self.findings if f.level == "warning"]

    def __str__(self) -> str:
        return "\n".join(f"{f.level}: {f.where}: {f.message}" for f in self.findings) or "nothing found"

    def as_dict(self) -> list[dict[str, Any]]:
        """Plain JSON types, one dict a finding."""
        return [{**vars(f), "patients": list(f.patients), "features": list(f.features)} for f in self.findings]

    def log(self) -> None:
        """Send every finding to the log at its own level."""
        for f in self.findings:
            logger.log(_LEVELS[f.level], "%s: %s", f.where, f.message)

    def raise_errors(self) -> None:
        """Raise `CohortError` with all errors where there is one."""
        if self.errors:
            raise CohortError(self)


class CohortError(ExaonePathError):
    """A cohort cannot be used; the message lists every reason, `report` holds them with all ids concerned."""

    def __init__(self, report: CohortReport) -> None:
        self.report = report
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """A head, and a line for each reason."""
        reasons = [f"{f.where}: {f.message}" for f in self.report.errors]
        head = "the cohort cannot be used" + (f", for {len(reasons)} reasons" if len(reasons) > 1 else "")
        return (f"{head}:", *(f"  - {reason}" for reason in reasons))

    def __reduce__(self) -> tuple[type[CohortError], tuple[CohortReport]]:
        return CohortError, (self.report,)  # from a worker process to the main one
