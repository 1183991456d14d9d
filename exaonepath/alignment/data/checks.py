"""Checks of the table of one modality: ids, missing and infinite values, and whether the numbers match their scale."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from exaonepath.alignment.data.names import check_names
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.text import few

Missing = Literal["error", "mean"]
DuplicateFeatures = Literal["error", "mean"]

# Scales of each modality. The first is the default, if neither the user nor the file states the scale. "auto" infers it
# from the values.
SCALES: dict[str, tuple[str, ...]] = {
    "rna": ("auto", "counts", "tpm", "log", "any"),
    "snp": ("indicator", "any"),
    "cnv": ("copy-number", "any"),
    "methylation": ("beta", "m-value", "any"),
}
# Scales of further modalities, whose usual scale is not known.
_FURTHER_SCALES = ("any", "counts", "tpm", "log", "indicator", "copy-number", "beta", "m-value")
# log2(TPM + 1) of the most expressed gene is below 20, and natural logarithms are smaller. The largest TPM of a sample
# is always larger than this limit, because a million is distributed unevenly over about 20,000 genes.
_LARGEST_LOG = 25.0
# Counts of unassigned reads. Those of HTSeq begin with two underscores: __no_feature, __ambiguous, ...
_STAR_TALLIES = frozenset({"N_unmapped", "N_multimapping", "N_noFeature", "N_ambiguous"})
_LARGEST_COPY_NUMBER = 50.0
_LARGEST_M_VALUE = 30.0
_ROUNDING = 1e-4  # largest rounding error of beta values, in float32 and with four decimals


def scales_of(modality: str) -> tuple[str, ...]:
    """Scales that a modality can have; the first one is its default."""
    return SCALES.get(modality, _FURTHER_SCALES)


@dataclass
class Figures:
    """Statistics of a table, computed in one pass."""

    n: int
    minimum: float
    maximum: float
    n_missing: int
    n_infinite: int
    n_negative: int
    n_above_one: int
    n_fractional: int
    all_missing_rows: np.ndarray  # int64, rows without any value
    rows_missing: np.ndarray  # int64, rows with some value and some missing
    features_missing: np.ndarray  # int64, columns with a missing value in such a row
    rows_infinite: np.ndarray
    features_infinite: np.ndarray

    def share(self, count: int) -> str:
        """ "123 of 4000 values (3.1%)"."""
        return f"{count} of {self.n} values ({100 * count / max(1, self.n):.2g}%)"


def measure(table: ModalityTable) -> Figures:
    """`Figures` of a table, a block of rows at a time."""
    width = len(table.features)
    low, high = np.inf, -np.inf
    counts = dict.fromkeys(("n", "n_missing", "n_infinite", "n_negative", "n_above_one", "n_fractional"), 0)
    empty, partial, rows_infinite = [], [], []
    missing_features, infinite_features = np.zeros(width, bool), np.zeros(width, bool)
    for rows, block in table.row_blocks():
        missing, infinite = np.isnan(block), np.isinf(block)
        per_row = missing.sum(1)
        empty += (rows.start + np.flatnonzero(per_row == width)).tolist()
        partly = (per_row > 0) & (per_row < width)
        partial += (rows.start + np.flatnonzero(partly)).tolist()
        rows_infinite += (rows.start + np.flatnonzero(infinite.any(1))).tolist()
        missing_features |= missing[partly].any(0)
        infinite_features |= infinite.any(0)
        finite = block[~(missing | infinite)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        counts["n"] += finite.size
        counts["n_missing"] += int(per_row[partly].sum())
        counts["n_infinite"] += int(infinite.sum())
        counts["n_negative"] += int((finite < 0).sum())
        counts["n_above_one"] += int((finite > 1).sum())
        counts["n_fractional"] += int((finite != np.round(finite)).sum())
    return Figures(
        minimum=low,
        maximum=high,
        all_missing_rows=np.array(empty, np.int64),
        rows_missing=np.array(partial, np.int64),
        features_missing=np.flatnonzero(missing_features),
        rows_infinite=np.array(rows_infinite, np.int64),
        features_infinite=np.flatnonzero(infinite_features),
        **counts,
    )


def check_table(
    modality: str,
    table: ModalityTable,
    report: CohortReport,
    *,
    scale: str | None = None,
    missing: Missing = "error",
    duplicate_features: DuplicateFeatures = "error",
) -> ModalityTable:
    """Check a table with one row per patient, and determine its scale; findings are added to the report.

    Args:
        modality: "rna", "snp", "cnv", "methylation", or the name of a further one.
        table: the table.
        report: receives the findings.
        scale: scale of the numbers; None: that of the format, or the modality's usual scale.
        missing: "error": single missing values are an error; "mean": they are filled with the fitted mean later.
        duplicate_features: "error": two columns with the same name are an error; "mean": they are averaged.

    Returns:
        The table with its scale, without rows that have no values, and without columns that are no features.
    """
    if modality == "rna":
        table = _without_tallies(modality, table, report)
    table = _unique_features(modality, table, report, duplicate_features)
    check_names(modality, table.patients, table.features, report)
    figures = measure(table)
    if (scale or table.scale) in ("beta", "any") and scales_of(modality)[0] == "beta" and scale != "any":
        table, figures = _rounded_beta(modality, table, figures, report)
    _check_finite(modality, table, figures, report, missing)
    if len(figures.all_missing_rows):
        names = [table.patients[row] for row in figures.all_missing_rows]
        report.add(
            "note",
            "no-values",
            modality,
            f"{len(names)} patient(s) have no value at all and count as not measured: {few(names)}",
            patients=names,
        )
        table = table.take(np.setdiff1d(np.arange(len(table.patients)), figures.all_missing_rows))
    if modality not in SCALES and scale is None and table.scale == "any":
        _ask_for_scale(modality, figures, report)
    scale = scale or (table.scale if table.scale != "any" else scales_of(modality)[0])
    if scale == "auto":
        scale = _look(figures)
        report.add("note", "scale", modality, f"taken as {_SCALE_NAMES[scale]}; values {_span(figures)}")
    _check_scale(modality, scale, figures, report)
    return replace(table, scale=scale)


def _rounded_beta(
    modality: str, table: ModalityTable, figures: Figures, report: CohortReport
) -> tuple[ModalityTable, Figures]:
    """Clip beta values that are outside 0..1 by a rounding error, and report it."""
    if not (figures.n_negative or figures.n_above_one) or not (
        figures.minimum >= -_ROUNDING and figures.maximum <= 1 + _ROUNDING
    ):
        return table, figures
    count = figures.n_negative + figures.n_above_one
    values = table.values.copy()
    held = values.data if table.is_sparse else values
    np.clip(held, 0, 1, out=held)
    report.add(
        "note",
        "clipped",
        modality,
        f"{figures.share(count)} lie outside 0..1 by no more than {_ROUNDING:g} ({_span(figures)}), a rounding error: "
        "set to 0 and 1",
    )
    table = replace(table, values=values)
    return table, measure(table)


_SCALE_NAMES = {"counts": "counts (all integers)", "tpm": "TPM or similar", "log": "log values (not transformed)"}


def _ask_for_scale(modality: str, figures: Figures, report: CohortReport) -> None:
    """Warn if a further modality, whose scale was not stated, has numbers that need a logarithm."""
    if figures.n and not figures.n_negative and figures.maximum > _LARGEST_LOG:
        report.add(
            "warning",
            "no-scale",
            modality,
            f"no scale was stated, and {_span(figures)} looks like counts or intensities: without a transform, few "
            f"large values dominate; set data.scales.{modality} to {', '.join(scales_of(modality)[1:3])}, or to any if "
            "the values are meant",
        )


def _look(figures: Figures) -> str:
    if figures.n_negative or figures.maximum <= _LARGEST_LOG:
        return "log" if figures.n_fractional or figures.n_negative else "counts"
    return "tpm" if figures.n_fractional else "counts"


def _check_finite(
    modality: str, table: ModalityTable, figures: Figures, report: CohortReport, missing: Missing
) -> None:
    def patients(rows: np.ndarray) -> list[str]:
        return [table.patients[row] for row in rows]

    def features(columns: np.ndarray) -> list[str]:
        return [table.features[column] for column in columns]

    if figures.n_missing:
        who, what = patients(figures.rows_missing), features(figures.features_missing)
        done = (
            "they will be filled with the mean of the training patients"
            if missing == "mean"
            else "correct them, or set `missing: mean` to fill them with the mean of the training patients"
        )
        report.add(
            "warning" if missing == "mean" else "error",
            "missing-values",
            modality,
            f"{figures.n_missing} value(s) missing (NaN), in {len(who)} patient(s): {few(who)}; in {len(what)} "
            f"feature(s): {few(what)}; {done}",
            patients=who,
            features=what,
        )
    if figures.n_infinite:
        who, what = patients(figures.rows_infinite), features(figures.features_infinite)
        report.add(
            "error",
            "infinite-values",
            modality,
            f"{figures.n_infinite} value(s) are infinite, in patient(s) {few(who)}, feature(s) {few(what)}; possibly "
            "logarithms of zero",
            patients=who,
            features=what,
        )


def _check_scale(modality: str, scale: str, figures: Figures, report: CohortReport) -> None:
    if figures.n == 0:
        return
    problem = _scale_problem(scale, figures)
    if problem:
        report.add("warning", "wrong-scale", modality, f"declared as {scale}, but {problem}; values {_span(figures)}")


def _scale_problem(scale: str, figures: Figures) -> str | None:
    fractional, negative = figures.n_fractional, figures.n_negative
    if scale == "beta" and (negative or figures.n_above_one):
        outside = figures.share(negative + figures.n_above_one)
        if not fractional:
            return f"{outside} lie outside 0..1 and all are integers: these look like counts, not beta values"
        if negative and figures.maximum <= _LARGEST_M_VALUE:
            return f"{outside} lie outside 0..1: these look like M-values (`scale: m-value`), not beta values"
        return f"{outside} lie outside 0..1, the range of beta values"
    if scale == "m-value":
        if not negative and not figures.n_above_one:
            return "all lie in 0..1: these look like beta values (`scale: beta`)"
        if max(-figures.minimum, figures.maximum) > _LARGEST_M_VALUE:
            return f"they exceed +-{_LARGEST_M_VALUE:g}, the range of M-values"
    if scale in ("counts", "tpm"):
        if negative:
            return f"{figures.share(negative)} are negative: possibly log or standardised values (`scale: log`)"
        if fractional and figures.maximum <= _LARGEST_LOG:
            return f"none exceeds {_LARGEST_LOG:g}: these look like log values (`scale: log`); log1p is wrong for them"
    if scale == "counts" and fractional:
        return f"{figures.share(fractional)} are no integers: possibly TPM (`scale: tpm`)"
    if scale == "log" and figures.maximum > _LARGEST_LOG:
        return f"they exceed {_LARGEST_LOG:g}: these look like TPM or counts, not logarithms"
    if scale == "indicator" and (negative or fractional or figures.maximum > 2):
        return "0 and 1 (or 0, 1, 2 alleles) are expected"
    if scale == "copy-number" and max(-figures.minimum, figures.maximum) > _LARGEST_COPY_NUMBER:
        return f"they exceed +-{_LARGEST_COPY_NUMBER:g}: no copy numbers and no log ratios are so large"
    return None


def _span(figures: Figures) -> str:
    return f"range from {figures.minimum:.4g} to {figures.maximum:.4g}"


def _without_tallies(modality: str, table: ModalityTable, report: CohortReport) -> ModalityTable:
    """The table without the counts of unassigned reads, which belong to no gene and must not be part of a total."""
    tallies = [at for at, name in enumerate(table.features) if name.startswith("__") or name in _STAR_TALLIES]
    if not tallies or len(tallies) == len(table.features):
        return table
    names = [table.features[at] for at in tallies]
    report.add(
        "note",
        "no-features",
        modality,
        f"{len(names)} column(s) count unassigned reads (of HTSeq or STAR) and were left out: {few(names)}",
        features=names,
    )
    kept = np.setdiff1d(np.arange(len(table.features)), tallies)
    return replace(table, features=tuple(table.features[at] for at in kept), values=table.values[:, kept])


def _unique_features(
    modality: str, table: ModalityTable, report: CohortReport, choice: DuplicateFeatures
) -> ModalityTable:
    twice = sorted(name for name, count in Counter(table.features).items() if count > 1)
    unnamed = sum(not name for name in table.features)
    if unnamed:
        report.add("error", "empty-feature-name", modality, f"{unnamed} feature(s) have no name")
    if not twice:
        return table
    first: dict[str, int] = {}
    for at, name in enumerate(table.features):
        first.setdefault(name, at)
    kept = list(first.values())
    if choice == "error":
        report.add(
            "error",
            "duplicate-features",
            modality,
            f"{len(twice)} feature name(s) occur more than once: {few(twice)}; correct them, or set "
            "`duplicate_features: mean`",
            features=twice,
        )
        return replace(table, features=tuple(first), values=table.values[:, kept])
    report.add(
        "note",
        "duplicate-features",
        modality,
        f"{len(twice)} feature name(s) occur more than once and were averaged: {few(twice)}",
        features=twice,
    )
    columns: dict[str, list[int]] = {}
    for at, name in enumerate(table.features):
        columns.setdefault(name, []).append(at)
    at_of = {name: i for i, name in enumerate(first)}
    values = (table.values.tolil() if table.is_sparse else table.values)[:, kept]
    for name in twice:
        part = table.values[:, columns[name]]
        mean = part.toarray().mean(1) if table.is_sparse else part.mean(1)
        values[:, at_of[name]] = mean[:, None] if table.is_sparse else mean
    return replace(table, features=tuple(first), values=values.tocsr() if table.is_sparse else values)
