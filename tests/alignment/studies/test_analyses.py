"""The analyses on a small trained run: what they report, what they compare with, and what they say they left out."""

import csv
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import exaonepath.alignment.analyses.expression as expression_module
import exaonepath.alignment.analyses.zero_shot as zero_shot_module
from exaonepath.alignment.analyses.context import NO_TRANSFER, Context
from exaonepath.alignment.analyses.expression import expression
from exaonepath.alignment.analyses.few_shot import few_shot
from exaonepath.alignment.analyses.figures import draw_analyses
from exaonepath.alignment.analyses.registry import ANALYSES, run_analyses
from exaonepath.alignment.analyses.slide_search import slide_search
from exaonepath.alignment.analyses.zero_shot import zero_shot
from exaonepath.alignment.baselines.profiles import read_profiles
from exaonepath.alignment.data.slides import SlideTable
from exaonepath.alignment.evaluate import EvaluationSettings, evaluate
from exaonepath.alignment.probing import embeddings_of, predict_labels
from exaonepath.alignment.report import write_report
from exaonepath.alignment.report_table import table
from exaonepath.alignment.subject import open_subject
from exaonepath.errors import SettingsError


@pytest.fixture(scope="module")
def subject(run):
    return open_subject(run, device="cpu")


@pytest.fixture(scope="module")
def parts(subject):
    return {name: subject.embed(ids) for name, ids in subject.parts.items()}


def context_of(subject, parts, labels=("subtype",), *, seed=0):
    """A context without baselines of labels, which take most of the time."""
    views = [embeddings_of(subject, parts[name]) for name in ("train", "val", "test")]
    return Context(
        subject, parts, views, labels, lambda label: predict_labels(subject, views, label, baselines=False), seed=seed
    )


@pytest.fixture(scope="module")
def written(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    settings = EvaluationSettings(labels=("subtype",), missing=False)
    return write_report(subject, out, settings), out


def with_labels(subject, **columns):
    new = {name: pd.Series(values, subject.cohort.patients) for name, values in columns.items()}
    cohort = replace(subject.cohort, labels=subject.cohort.labels.assign(**new))
    return replace(subject, data=replace(subject.data, cohort=cohort))


def test_every_analysis_is_there_with_a_baseline(written):
    report, out = written
    found = report["analyses"]
    json.dumps(report, allow_nan=False)
    assert set(found) == {*ANALYSES, "not_evaluated"}
    shots = [point["shots"] for point in found["few-shot"]["subtype"]["fused"]["points"]]
    assert shots[:3] == [1, 2, 4]
    assert shots[-1] is None
    for view in found["few-shot"]["subtype"].values():
        for point in view["points"]:
            gap = point["ours"]["value"] - point["baseline"]["value"]
            assert point["difference"]["value"] == pytest.approx(gap)
            assert point["ours"]["low"] <= point["ours"]["value"] <= point["ours"]["high"]
    zero = found["zero-shot"]["subtype"]
    assert set(zero["prototypes"]) == {"rna", "snp", "cnv", "methylation", "all"}
    assert zero["prototypes"]["rna"]["CCA"]["chance"] == 0.5
    probe = report["probes"]["subtype"]["wsi"]["linear"]
    assert zero["with_labelled_slides"]["linear probe of the slide"] == probe
    methods = found["calibration"]["subtype"]["methods"]
    assert {"fused", "wsi", "attention MIL (ABMIL)", "PCA + logistic regression (all)"} <= set(methods)
    assert methods["attention MIL (ABMIL)"]["compared_with"] == "wsi"
    assert found["slide-search"]["labels"]["subtype"]["chance"]["vote@1"] == pytest.approx(0.5, abs=0.06)
    assert sum(bin_["patients"] for bin_ in methods["fused"]["curve"]) == methods["fused"]["n"]
    assert {path.name for path in out.iterdir()} >= {
        "few-shot.png", "expression.png", "calibration.png", "expression.csv"
    }  # fmt: skip


def test_tables_show_everything_and_what_is_missing(written):
    out = written[1]
    text = (out / "evaluation.md").read_text()
    assert text == table(json.loads((out / "evaluation.json").read_text()))
    for head in ("Few labelled patients", "Labels of slides without", "Features of rna", "Calibration", "Slides that"):
        assert f"## {head}" in text
    assert "- slide-search: other slides of the same patient: not evaluated because no patient has two slides" in text
    assert "- few-shot: subtype from fused, 32 a class: not evaluated because" in text
    assert "All features: `expression.csv`." in text


def test_single_genes_are_in_a_file_and_not_in_the_report(written, subject):
    report, out = written
    found = report["analyses"]["expression"]
    assert "genes" not in found
    with (out / "expression.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gene"] for row in rows} == set(subject.data.standardizer.scalings["rna"].features)
    assert [row["gene"] for row in rows[:10]] == [gene["gene"] for gene in found["top"]]
    values = [float(row["pearson"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert np.mean(values) == pytest.approx(found["methods"]["slide embedding"]["mean_pearson"]["value"], abs=1e-5)
    assert found["methods"]["mean of training patients"]["mean_pearson"]["value"] is None
    assert found["methods"]["mean of training patients"]["explained"]["value"] <= 0


def test_an_evaluation_without_genes_removes_the_file_of_an_earlier_one(subject, tmp_path):
    (tmp_path / "expression.csv").write_text("of an earlier evaluation")
    settings = EvaluationSettings(labels=("subtype",), missing=False, baselines=False, analyses=())
    report = write_report(subject, tmp_path, settings, figures=False)
    assert report["analyses"] == {"not_evaluated": {}}
    assert not (tmp_path / "expression.csv").exists()


def planted(subject):
    """The subject with a site of methylation that is a patch feature, one of another patient's, and a constant one."""
    cohort = subject.cohort
    sites, scaling = cohort.modalities["methylation"], subject.data.standardizer.scalings["methylation"]
    assert scaling.transform == "none"
    slides = read_profiles(subject.data, sites.patients, "wsi")
    place = {patient: at for at, patient in enumerate(slides.patients)}
    feature = np.array([slides.values[place[p], 0] if p in place else np.nan for p in sites.patients])
    feature = (feature - np.nanmean(feature)) / np.nanstd(feature)
    values = np.array(sites.values)
    columns = [sites.features.index(name) for name in scaling.features[:3]]
    mixed = np.random.default_rng(0).permutation(np.nan_to_num(feature))
    for at, source in enumerate((np.nan_to_num(feature), mixed, 0 * mixed)):
        values[:, columns[at]] = scaling.mean[at] + 0.3 * scaling.std[at] * source
    table_ = replace(sites, values=values)
    data = replace(subject.data, cohort=replace(cohort, modalities={**cohort.modalities, "methylation": table_}))
    return replace(subject, data=data), scaling.features[:3]


def test_a_planted_gene_is_found_a_mixed_one_is_not_and_a_constant_one_is_noted(subject, parts):
    changed, (told, mixed, constant) = planted(subject)
    context = context_of(changed, parts)
    context.expression = "methylation"
    found = expression(context)
    genes = pd.DataFrame(found["genes"]).set_index("gene")
    assert genes.loc[told, "pearson_mean_patches"] > 0.95
    assert genes.loc[told, "q_mean_patches"] < 1e-6
    assert genes.loc[mixed, "q_mean_patches"] > 0.05
    assert pd.isna(genes.loc[constant, "pearson"])
    reason = "not evaluated because they are constant among the test patients"
    assert context.notes == [f"1 of 20 features of methylation: {reason}"]


def test_mixed_labels_are_at_chance(subject, parts, monkeypatch):
    """Labels of other patients: the intervals of few-shot, zero-shot and search hold chance, but for a few."""
    monkeypatch.setattr(zero_shot_module, "_cca_spaces", lambda *_: None)  # it takes most of the time
    outside, total = 0, 0
    for seed in range(4):
        mixed = np.random.default_rng(seed).permutation(subject.cohort.labels["subtype"].to_numpy())
        context = context_of(with_labels(subject, mixed=mixed), parts, ("mixed",), seed=seed)
        intervals = [point["ours"] for point in few_shot(context)["mixed"]["fused"]["points"]]
        intervals.append(zero_shot(context)["mixed"]["prototypes"]["rna"]["ours"]["balanced_accuracy"])
        for interval in intervals:
            outside += not interval["low"] <= 0.5 <= interval["high"]
            total += 1
        search = slide_search(context)["labels"]["mixed"]
        outside += not search["ours"]["vote@1"]["low"] <= search["chance"]["vote@1"] <= search["ours"]["vote@1"]["high"]
    assert outside <= 0.2 * total


def test_the_same_seed_gives_the_same_numbers(subject, parts):
    names = ("few-shot", "slide-search")
    first, second, other = (run_analyses(context_of(subject, parts, seed=seed), names) for seed in (0, 0, 1))
    assert json.dumps(first) == json.dumps(second)
    assert json.dumps(first["few-shot"]) != json.dumps(other["few-shot"])


def test_rare_classes_and_unusable_labels_are_noted(subject, parts):
    split = subject.data.split
    rare = dict.fromkeys(subject.cohort.patients, "common")
    rare[split["train"][0]] = "single"
    few_known = dict.fromkeys(subject.cohort.patients)
    for at, part in enumerate((split["train"], split["test"])):
        for number in range(6 - 2 * at):
            few_known[part[number]] = "ab"[number % 2]
    changed = with_labels(
        subject,
        rare=[rare[p] for p in subject.cohort.patients],
        few=[few_known[p] for p in subject.cohort.patients],
    )
    found = run_analyses(context_of(changed, parts, ("rare", "few")), ("few-shot", "zero-shot", "calibration"))
    for notes in found["not_evaluated"].values():
        assert any(note.startswith("rare: not evaluated because a probe needs two classes") for note in notes)
    assert "few" not in found.get("calibration", {})
    assert any("4 test patients have it, 20 are needed" in n for n in found["not_evaluated"]["calibration"])
    assert any("4, 8, 16, 32 a class" in note for note in found["not_evaluated"]["few-shot"])
    assert [point["shots"] for point in found["few-shot"]["few"]["fused"]["points"]] == [1, 2, None]


def test_without_labels_slides_or_training_patients_there_is_a_reason(subject, parts):
    without = context_of(subject, parts, ())
    notes = run_analyses(without, ("few-shot", "zero-shot", "calibration"))["not_evaluated"]
    assert all("the cohort has no label" in reasons[-1] for reasons in notes.values())
    cohort = replace(subject.cohort, slides=SlideTable())
    no_slides = replace(subject, data=replace(subject.data, cohort=cohort))
    notes = run_analyses(context_of(no_slides, parts), ("zero-shot", "expression", "slide-search"))["not_evaluated"]
    assert all("has no slides" in reasons[0] for reasons in notes.values())
    alone = Context(subject, {"test": parts["test"]}, [], ("subtype",), lambda label: None)
    notes = run_analyses(alone, ("few-shot", "zero-shot", "expression", "calibration"))["not_evaluated"]
    assert all(reasons == [f"not evaluated because {NO_TRANSFER}"] for reasons in notes.values())


def test_what_cannot_be_asked_for(subject, parts, monkeypatch):
    with pytest.raises(SettingsError, match=r"unknown analyses fewshot; there are few-shot"):
        EvaluationSettings(analyses=("fewshot",))
    context = context_of(subject, parts)
    context.expression = "protein"
    with pytest.raises(SettingsError, match="have no protein; they have wsi, rna"):
        expression(context)
    context.expression = "rna"
    monkeypatch.setattr(expression_module, "_MOST_FEATURES", 29)
    with pytest.raises(SettingsError, match=r"rna has 30 features, more than 29; train with data\.top_variance"):
        expression(context)


def test_slides_of_one_patient_find_each_other(subject, parts):
    """Two slide ids with the same features file: the other slide is the first that is found."""
    cohort = subject.cohort
    test = set(subject.data.split["test"])
    twins = [replace(s, slide=f"{s.slide}-again") for s in cohort.slides.slides if s.patient in test]
    table_ = SlideTable((*cohort.slides.slides, *twins))
    changed = replace(subject, data=replace(subject.data, cohort=replace(cohort, slides=table_)))
    found = slide_search(context_of(changed, parts))
    assert found["slides"] == 2 * len(twins)
    for side in ("ours", "baseline"):
        assert found["same_patient"][side]["hit@1"]["value"] == pytest.approx(1)
        assert found["same_patient"][side]["hit@1"]["low"] < 1
    single = slide_search(context_of(subject, parts))
    assert "same_patient" not in single
    # The own patient's slides do not help to find the label.
    assert found["labels"]["subtype"]["ours"]["hit@1"]["value"] == pytest.approx(
        single["labels"]["subtype"]["ours"]["hit@1"]["value"]
    )


def test_slide_embeddings_are_those_of_the_patients(subject, parts):
    patients = subject.data.split["test"]
    found = subject.embed_slides(patients)
    owners = dict(subject.slides_of(patients))
    rows = [patients.index(owners[slide]) for slide in found.patients]
    np.testing.assert_allclose(found.modality["wsi"], parts["test"].modality["wsi"][rows], atol=1e-5)
    np.testing.assert_allclose(found.fused, subject.fuse(parts["test"], ("wsi",))[rows], atol=1e-5)


def test_figures_of_parts_that_are_missing_are_not_drawn(tmp_path):
    (tmp_path / "few-shot.png").write_bytes(b"of an earlier evaluation")
    assert draw_analyses({"analyses": {"not_evaluated": {}}}, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_many_labels_that_nobody_named_are_limited(subject):
    many = {f"label{k}": [f"v{(k + at) % 2}" for at in range(len(subject.cohort.patients))] for k in range(6)}
    settings = EvaluationSettings(missing=False, baselines=False, analyses=("calibration",))
    report = evaluate(with_labels(subject, **many), settings)
    assert len(report["analyses"]["calibration"]) == 5
    assert "only the first 5 labels are used" in report["analyses"]["not_evaluated"]["labels"][0]
    assert len(report["probes"]) > 5
