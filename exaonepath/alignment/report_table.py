"""The report of an evaluation as Markdown: every number with its interval, and the baselines next to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exaonepath.alignment.analyses.tables import analyses_lines
from exaonepath.alignment.markdown import direction, interval, number, rows, signed


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
    lines += analyses_lines(report)
    return "\n".join(lines).rstrip() + "\n"


def _retrieval(report: Mapping[str, Any]) -> Iterator[str]:
    for part, found in report["parts"].items():
        if not found["retrieval"]:
            continue
        yield from (f"## Retrieval, {part} ({found['patients']} patients)", "")
        yield from rows(
            ("direction", "recall@1", "chance", "recall@5", "recall@10", "median rank", "of"),
            [
                (
                    direction(name),
                    interval(score["recall"]["1"]),
                    number(score["chance"]["1"]),
                    interval(score["recall"]["5"]),
                    interval(score["recall"]["10"]),
                    number(score["median_rank"], 1),
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
    yield from rows(
        ("direction", "ours", *baselines),
        [
            (
                direction(name),
                interval(score["recall"]["1"]),
                *(_with_baseline(found[name]) if name in found else "-" for found in baselines.values()),
            )
            for name, score in ours.items()
        ],
    )


def _with_baseline(found: Mapping[str, Any]) -> str:
    return f"{number(found['recall']['1']['value'])} ({signed(found['difference']['1'])})"


def _site(report: Mapping[str, Any]) -> Iterator[str]:
    site = report.get("site") or {}
    if not site:
        return
    found = site["retrieval"]
    yield from (f"## Site ({found['sites']} sites of the patients asked for)", "")
    yield from rows(
        ("all pairs", "recall@1", "recall@1 within the site", "chance", "wrong answers from the own site", "chance"),
        [
            (
                "**suspicious**" if found["suspicious"] else "",
                interval(found["recall"]),
                interval(found["within"]),
                number(found["within_chance"]),
                interval(found["wrong_from_own_site"]),
                number(found["chance"]),
            )
        ],
    )
    if site["probes"]:
        yield from rows(
            ("probe of the site from", "balanced accuracy", "AUROC", "chance", "n"),
            [
                (
                    name,
                    interval(score["balanced_accuracy"]),
                    interval(score["auroc"]),
                    number(score["chance"]),
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
        yield from rows(
            ("embedding", "linear: balanced accuracy", "linear: AUROC", "kNN: balanced accuracy", "chance", "n"),
            [
                (
                    name,
                    interval(score["linear"]["balanced_accuracy"]),
                    interval(score["linear"]["auroc"]),
                    interval(score["knn"]["balanced_accuracy"]),
                    number(score["linear"]["chance"]),
                    str(score["linear"]["n"]),
                )
                for name, score in found.items()
            ],
        )
        if label in baselines:
            yield from rows(
                ("baseline", "balanced accuracy", "AUROC", "ours", "ours - baseline: balanced accuracy", "AUROC"),
                [_label_row(method, theirs) for method, theirs in baselines[label].items()],
            )


def _label_row(method: str, theirs: Mapping[str, Any]) -> tuple[str, ...]:
    difference = theirs.get("difference")
    return (
        method,
        interval(theirs["balanced_accuracy"]),
        interval(theirs["auroc"]),
        theirs["compared_with"],
        "-" if difference is None else signed(difference["balanced_accuracy"]),
        "-" if difference is None else signed(difference["auroc"]),
    )


def _gains(report: Mapping[str, Any]) -> Iterator[str]:
    for label, found in (report["missing"] or {"probes": {}})["probes"].items():
        if "gain_over_single" in found:
            yield from (f"## {label}: all modalities compared with each alone (patients with all modalities)", "")
            alone = found["refitted"]["subsets"]
            yield from rows(
                ("modality", "balanced accuracy alone", "gain with all modalities (paired)"),
                [(name, interval(alone[name]), interval(gain)) for name, gain in found["gain_over_single"].items()],
            )


def _survival(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["survival"]:
        return
    where = report.get("probe_patients", "held-out")
    how = "fitted on training patients, scored on test patients" if where == "test" else "cross-validated"
    yield from (f"## Survival (Cox probe, {how}; 0.5 is chance)", "")
    yield from rows(
        ("embedding", "c-index", "patients", "events"),
        [(name, interval(s["c_index"]), str(s["n"]), str(s["events"])) for name, s in report["survival"].items()],
    )
    if baselines := (report.get("baselines") or {}).get("survival", {}):
        yield from rows(
            ("baseline", "c-index", "ours", "ours - baseline"),
            [
                (
                    method,
                    interval(theirs["c_index"]),
                    theirs["compared_with"],
                    signed(theirs["difference"]) if "difference" in theirs else "-",
                )
                for method, theirs in baselines.items()
            ],
        )
