"""Tables of the analyses in the report, each with what it is compared with, and what was not evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exaonepath.alignment.markdown import direction, interval, number, rows, signed


def analyses_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """All sections of the analyses and of the external cohort."""
    found = report.get("analyses") or {}
    for name, section in (
        ("few-shot", _few_shot),
        ("zero-shot", _zero_shot),
        ("expression", _expression),
        ("calibration", _calibration),
        ("slide-search", _slide_search),
    ):
        if name in found:
            yield from section(found[name])
    yield from external_lines(report)
    notes = [
        f"- {name}: {reason}." for name, reasons in (found.get("not_evaluated") or {}).items() for reason in reasons
    ]
    if notes:
        yield from ("## Not evaluated", "", *notes, "")


def _few_shot(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Few labelled patients: balanced accuracy", "")
    yield from (
        "Labelled training patients a class; mean over draws, the same for both; intervals over draws and test "
        "patients. Fixed penalty, no validation patients.",
        "",
    )
    for label, views in found.items():
        for name, view in views.items():
            yield from rows(
                (f"{label} from {name}", "draws", "ours", view["baseline"], "ours - baseline", "chance"),
                [
                    (
                        f"{point['shots']} a class" if point["shots"] else f"all {point['patients']}",
                        str(point["draws"]),
                        interval(point["ours"]),
                        interval(point["baseline"]),
                        signed(point["difference"]),
                        number(view["chance"]),
                    )
                    for point in view["points"]
                ],
            )


def _zero_shot(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Labels of slides without labelled slides: balanced accuracy", "")
    yield from (
        "A class is the mean embedding of labelled training patients in another modality; a slide gets the class that "
        "is nearest by cosine in the space shared with it. CCA: the same with mean patch features.",
        "",
    )
    for label, entry in found.items():
        body = []
        for name, scores in entry["prototypes"].items():
            theirs, difference = scores.get("CCA"), scores.get("difference")
            body.append(
                (
                    f"prototypes from {name}",
                    interval(scores["ours"]["balanced_accuracy"]),
                    interval(theirs["balanced_accuracy"]) if theirs else "-",
                    signed(difference["balanced_accuracy"]) if difference else "-",
                    number(entry["chance"]),
                    str(scores["ours"]["n"]),
                )
            )
        body += [
            (f"with labelled slides: {name}", interval(scores["balanced_accuracy"]), "-", "-", number(entry["chance"]),
             str(scores["n"]))
            for name, scores in entry["with_labelled_slides"].items()
        ]  # fmt: skip
        yield from rows((label, "ours", "CCA", "ours - CCA", "chance", "n"), body)


def _expression(found: Mapping[str, Any]) -> Iterator[str]:
    target, total = found["target"], next(iter(found["methods"].values()))["genes"]
    yield from (f"## Features of {target} predicted from the slide ({found['test']} test patients)", "")
    yield from (
        f"Ridge regression of {total} features, fitted on {found['train']} training patients. Significant: one-sided, "
        "5 % false discoveries (Benjamini & Hochberg); in brackets after permuting the patients, mean and largest of "
        f"100. Ours has the higher correlation in {found['better']} features.",
        "",
    )
    yield from rows(
        ("from", "mean Pearson", "ours - this one", "mean Spearman", "explained variance", "significant"),
        [
            (
                name,
                interval(scores["mean_pearson"]),
                signed(scores["difference"]) if "difference" in scores else "",
                number(scores["mean_spearman"]),
                interval(scores["explained"]),
                f"{scores['significant']} ({scores['significant_permuted']['mean']:.1f}, "
                f"{scores['significant_permuted']['most']})",
            )
            for name, scores in found["methods"].items()
        ],
    )
    if found["top"]:
        yield from ("The best by the same test patients, so their correlations are too high by the selection:", "")
        yield from rows(
            ("feature", "Pearson", "Spearman", "q", "Pearson from mean patch features"),
            [
                (
                    gene["gene"],
                    _limits(gene, "pearson", ""),
                    _limits(gene, "spearman", ""),
                    "-" if gene["q"] is None else f"{gene['q']:.1g}",
                    _limits(gene, "pearson", "_mean_patches"),
                )
                for gene in found["top"]
            ],
        )
    if "file" in found:
        yield from (f"All features: `{found['file']}`.", "")


def _limits(gene: Mapping[str, Any], name: str, suffix: str) -> str:
    keys = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
    return interval({key: gene[column + suffix] for key, column in keys.items()})


def _calibration(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Calibration of the probabilities", "")
    yield from (
        "Expected calibration error in bins of equal numbers of patients, for the class shares of the training "
        "patients; it is above 0 for perfect probabilities of so few patients: see the column with its mean for labels "
        "drawn from the probabilities, and the share of those (p) with an error as large.",
        "",
    )
    for label, entry in found.items():
        yield from rows(
            (label, "calibration error", "if perfect", "p", "without class shares", "Brier", "of the class shares",
             "Brier, ours - baseline"),
            [
                (
                    name,
                    interval(scores["error"]),
                    number(scores["error_if_perfect"]),
                    number(scores["p"]),
                    number(scores["error_as_fitted"]["value"]),
                    interval(scores["brier"]),
                    number(scores["brier_of_shares"]),
                    f"{signed(scores['difference'])} ({scores['compared_with']})" if "difference" in scores else "",
                )
                for name, scores in entry["methods"].items()
            ],
        )  # fmt: skip


def _slide_search(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## Slides that find slides ({found['slides']} of {found['patients']} {found['part']} patients)", "")
    yield from (
        "By label: among the slides of other patients; mean average precision, one of the first k with the label, "
        "majority of the first k. Same patient: the other slides of the patient.",
        "",
    )
    searches = [
        *found["labels"].items(),
        *([("same patient", found["same_patient"])] if "same_patient" in found else []),
    ]
    for label, scores in searches:
        yield from rows(
            (f"{label} ({scores['queries']} slides)", "ours", "mean patch features", "ours - baseline", "chance"),
            [
                (
                    name,
                    interval(scores["ours"][name]),
                    interval(scores["baseline"][name]),
                    signed(scores["difference"][name]),
                    number(scores["chance"][name]),
                )
                for name in scores["ours"]
            ],
        )


def external_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The external cohort next to the test patients of the run's cohort."""
    found = report.get("external") or {}
    if not found:
        return
    yield from (f"## External cohort ({found['patients']} patients)", "")
    yield from (
        "Everything is fitted on the training patients of the run's cohort, and tested on its test patients "
        "(internal) and on all patients of the external cohort. In brackets: ours minus the baseline, paired.",
        "",
    )
    for name, features in found["features"].items():
        text = f"{features['missing']} of {features['of']} features are missing, and count as the training mean"
        yield f"- {name}: {text if features['missing'] else 'all ' + str(features['of']) + ' features are available'}."
        if features["totals"]:
            yield f"- {name}: **{features['totals']}**."
    if found["left_out"]:
        yield f"- {found['left_out']} patients with ids of the run's cohort are left out."
    yield ""
    internal = report.get("baselines") or {}
    yield from _external_retrieval(report, internal.get("retrieval", {}), found)
    yield from _external_labels(report, internal.get("probes", {}), found)
    yield from _external_survival(report, internal.get("survival", {}), found)
    if found["not_evaluated"]:
        yield from (*(f"- {note}." for note in found["not_evaluated"]), "")


def _external_retrieval(report: Mapping[str, Any], internal: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    inside = (report["parts"].get("test") or {"retrieval": {}})["retrieval"]
    external = found["baselines"]["retrieval"]
    body = []
    for name, score in found["retrieval"].items():
        known, theirs = inside.get(name), external.get("CCA", {}).get(name)
        before = internal.get("CCA", {}).get(name)
        body.append(
            (
                direction(name),
                "-" if known is None else interval(known["recall"]["1"]),
                "-" if before is None else number(before["recall"]["1"]["value"]),
                "-" if known is None else number(known["chance"]["1"]),
                interval(score["recall"]["1"]),
                "-" if theirs is None else _brackets(theirs["recall"]["1"], theirs["difference"]["1"]),
                number(score["chance"]["1"]),
            )
        )
    head = ("recall@1", "internal: ours", "CCA", "chance", "external: ours", "CCA", "chance")
    return rows(head, body) if body else []


def _external_labels(report: Mapping[str, Any], internal: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for label, embeddings in found["probes"].items():
        theirs = found["baselines"]["probes"].get(label) or {}
        before, inside = internal.get(label) or {}, report["probes"].get(label) or {}
        body = []
        for name, score in embeddings.items():
            known = inside.get(name)
            body.append(
                (
                    f"{name}: ours",
                    "-" if known is None else interval(known["linear"]["balanced_accuracy"]),
                    interval(score["linear"]["balanced_accuracy"]),
                    interval(score["linear"]["auroc"]),
                    str(score["linear"]["n"]),
                )
            )
        for method, score in theirs.items():
            known, difference = before.get(method), score.get("difference")
            outside = score["balanced_accuracy"]
            body.append(
                (
                    method,
                    "-" if known is None else interval(known["balanced_accuracy"]),
                    interval(outside) if difference is None else _brackets(outside, difference["balanced_accuracy"]),
                    interval(score["auroc"]) if difference is None else _brackets(score["auroc"], difference["auroc"]),
                    str(score["n"]),
                )
            )
        chance = next((score["linear"]["chance"] for score in embeddings.values()), None)
        yield from rows(
            (f"{label} (chance {number(chance)})", "internal: balanced accuracy", "external: balanced accuracy",
             "external: AUROC", "n"),
            body,
        )  # fmt: skip


def _external_survival(report: Mapping[str, Any], internal: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    inside = report.get("survival") or {}
    body = [
        (f"{name}: ours", interval(inside[name]["c_index"]) if name in inside else "-", interval(score["c_index"]))
        for name, score in found["survival"].items()
    ]
    for method, score in found["baselines"]["survival"].items():
        known, difference = internal.get(method), score.get("difference")
        outside = score["c_index"]
        body.append(
            (
                method,
                "-" if known is None else interval(known["c_index"]),
                interval(outside) if difference is None else _brackets(outside, difference),
            )
        )
    return rows(("survival, C (0.5 is chance)", "internal", "external"), body) if body else []


def _brackets(value: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    return f"{number(value['value'])} ({signed(difference)})"
