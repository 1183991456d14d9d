"""The analyses by name, and how they are run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from exaonepath.alignment.analyses.calibration import calibrate
from exaonepath.alignment.analyses.context import BECAUSE, Analysis, Context
from exaonepath.alignment.analyses.expression import expression
from exaonepath.alignment.analyses.few_shot import few_shot
from exaonepath.alignment.analyses.slide_search import slide_search
from exaonepath.alignment.analyses.zero_shot import zero_shot
from exaonepath.errors import SettingsError

logger = logging.getLogger(__name__)

ANALYSES: dict[str, Analysis] = {
    "few-shot": few_shot,
    "zero-shot": zero_shot,
    "expression": expression,
    "calibration": calibrate,
    "slide-search": slide_search,
}


def run_analyses(context: Context, names: Sequence[str]) -> dict[str, Any]:
    """Name to the result of each analysis, and "not_evaluated": name to the reasons for what is missing in it."""
    out: dict[str, Any] = {}
    reasons: dict[str, list[str]] = {}
    for name in names:
        context.notes.clear()
        try:
            if found := ANALYSES[name](context):
                out[name] = found
        except SettingsError as exc:
            context.notes.append(f"{BECAUSE} {exc}")
        if context.notes:
            reasons[name] = list(context.notes)
            for note in context.notes:
                logger.info("%s: %s", name, note)
    return {**out, "not_evaluated": reasons}
