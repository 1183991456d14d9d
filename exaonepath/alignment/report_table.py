"""The report of an evaluation as Markdown: every number with its interval, and the baselines next to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    known = report["provenance"]["split_known"]
    lines = [
        "# Evaluation",
        "",
        f"{report['held_out']} patients held out from training."
        if known
        else f"{report['held_out']} patients; as far as is known, none of them is in the training data of the model.",
    ]
    if used := report["provenance"].get("model_used"):
        lines.append(f"Model: {used}.")
    lines += [
        "Intervals: 95 %, bootstrap over patients; Wilson where no patient, or every patient, is a hit. Differences "
        "are paired: ours minus the baseline, on the same patients.",
        "",
    ]
    lines += _retrieval(report)
    lines += _retrieval_baselines(report)
    lines += _site(report)
    lines += _probes(report)
    lines += _gains(report)
    lines += _survival(report)
    return "\n".join(lines).rstrip() + "\n"


def _retrieval(report: Mapping[str, Any]) -> Iterator[str]:
    for part, found in report["parts"].items():
        if not found["retrieval"]:
            continue
        yield from (f"## Retrieval, {part} ({found['patients']} patients)", "")
        yield from _rows(
            ("direction", "recall@1", "chance", "recall@5", "recall@10", "median rank", "of"),
            [
                (
                    _direction(name),
                    _interval(score["recall"]["1"]),
                    _number(score["chance"]["1"]),
                    _interval(score["recall"]["5"]),
                    _interval(score["recall"]["10"]),
                    _number(score["median_rank"], 1),
                    str(score["n_gallery"]),
                )
                for name, score in found["retrieval"].items()
            ],
        )


def _retrieval_baselines(report: Mapping[str, Any]) -> Iterator[str]:
    baselines = (report.get("baselines") or {}).get("retrieval", {})
    if not baselines:
        return
    ours = report["parts"]["test"]["retrieval"]
    yield from ("## Retrieval of test patients compared with baselines: recall@1", "")
    yield from (
        "Baselines are fitted on the training patients; validation patients choose their hyperparameters. In brackets "
        "after the baseline: ours minus the baseline.",
        "",
    )
    yield from _rows(
        ("direction", "ours", *baselines),
        [
            (
                _direction(name),
                _interval(score["recall"]["1"]),
                *(_with_baseline(found[name]) if name in found else "-" for found in baselines.values()),
            )
            for name, score in ours.items()
        ],
    )


def _with_baseline(found: Mapping[str, Any]) -> str:
    return f"{_number(found['recall']['1']['value'])} ({_signed(found['difference']['1'])})"


def _site(report: Mapping[str, Any]) -> Iterator[str]:
    site = report.get("site") or {}
    if not site:
        return
    found = site["retrieval"]
    yield from (f"## Site ({found['sites']} sites of the patients asked for)", "")
    yield from _rows(
        ("all pairs", "recall@1", "recall@1 within the site", "chance", "wrong answers from the own site", "chance"),
        [
            (
                "**suspicious**" if found["suspicious"] else "",
                _interval(found["recall"]),
                _interval(found["within"]),
                _number(found["within_chance"]),
                _interval(found["wrong_from_own_site"]),
                _number(found["chance"]),
            )
        ],
    )
    if site["probes"]:
        yield from _rows(
            ("probe of the site from", "balanced accuracy", "AUROC", "chance", "n"),
            [
                (
                    name,
                    _interval(score["balanced_accuracy"]),
                    _interval(score["auroc"]),
                    _number(score["chance"]),
                    str(score["n"]),
                )
                for name, score in site["probes"].items()
            ],
        )


def _probes(report: Mapping[str, Any]) -> Iterator[str]:
    where = report.get("probe_patients", "held-out")
    how = "fitted on training patients, scored on test patients" if where == "test" else "held-out patients; 5 folds"
    baselines = (report.get("baselines") or {}).get("probes", {})
    for label, found in report["probes"].items():
        if not found:
            continue
        yield from (f"## {label} ({how})", "")
        yield from _rows(
            ("embedding", "linear: balanced accuracy", "linear: AUROC", "kNN: balanced accuracy", "chance", "n"),
            [
                (
                    name,
                    _interval(score["linear"]["balanced_accuracy"]),
                    _interval(score["linear"]["auroc"]),
                    _interval(score["knn"]["balanced_accuracy"]),
                    _number(score["linear"]["chance"]),
                    str(score["linear"]["n"]),
                )
                for name, score in found.items()
            ],
        )
        if label in baselines:
            yield from _rows(
                ("baseline", "balanced accuracy", "AUROC", "ours", "ours - baseline: balanced accuracy", "AUROC"),
                [_label_row(method, theirs) for method, theirs in baselines[label].items()],
            )


def _label_row(method: str, theirs: Mapping[str, Any]) -> tuple[str, ...]:
    difference = theirs.get("difference")
    return (
        method,
        _interval(theirs["balanced_accuracy"]),
        _interval(theirs["auroc"]),
        theirs["compared_with"],
        "-" if difference is None else _signed(difference["balanced_accuracy"]),
        "-" if difference is None else _signed(difference["auroc"]),
    )


def _gains(report: Mapping[str, Any]) -> Iterator[str]:
    for label, found in (report["missing"] or {"probes": {}})["probes"].items():
        if "gain_over_single" in found:
            yield from (f"## {label}: all modalities compared with each alone (patients with all modalities)", "")
            alone = found["refitted"]["subsets"]
            yield from _rows(
                ("modality", "balanced accuracy alone", "gain with all modalities (paired)"),
                [(name, _interval(alone[name]), _interval(gain)) for name, gain in found["gain_over_single"].items()],
            )


def _survival(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["survival"]:
        return
    where = report.get("probe_patients", "held-out")
    how = "fitted on training patients, scored on test patients" if where == "test" else "cross-validated"
    yield from (f"## Survival (Cox probe, {how}; 0.5 is chance)", "")
    yield from _rows(
        ("embedding", "c-index", "patients", "events"),
        [(name, _interval(s["c_index"]), str(s["n"]), str(s["events"])) for name, s in report["survival"].items()],
    )
    if baselines := (report.get("baselines") or {}).get("survival", {}):
        yield from _rows(
            ("baseline", "c-index", "ours", "ours - baseline"),
            [
                (
                    method,
                    _interval(theirs["c_index"]),
                    theirs["compared_with"],
                    _signed(theirs["difference"]) if "difference" in theirs else "-",
                )
                for method, theirs in baselines.items()
            ],
        )


def _direction(name: str) -> str:
    return name.replace("->", " to ")


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def _interval(estimate: Mapping[str, Any]) -> str:
    value = _number(estimate["value"])
    return value if estimate["low"] is None else f"{value} [{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _signed(estimate: Mapping[str, Any]) -> str:
    """A difference with its sign."""
    value = "-" if estimate["value"] is None else f"{estimate['value']:+.3f}"
    return value if estimate["low"] is None else f"{value} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
