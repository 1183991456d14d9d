"""Studies: variants get their settings, runs are reused and resumed, and the figure shows what was measured."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.figures import draw_missing, draw_outcome, draw_projections
from exaonepath.alignment.studies import ablations, studies
from exaonepath.alignment.studies.ablations import Outcome, StudyBase, run_folder, run_study, with_overrides
from exaonepath.alignment.studies.outcome_table import outcome_table
from exaonepath.alignment.studies.questions import STUDIES, Study, Variant
from exaonepath.alignment.training.run import prepare
from exaonepath.cli.app import app
from exaonepath.errors import ConfigError, SettingsError


@pytest.fixture(scope="module")
def quick(base):
    return replace(base, run=replace(base.run, steps=2))


SMALL = Study("frope", "A question?", (Variant("full"), Variant("off", {"model.rope_mode": "off"})))


def test_a_study_trains_each_variant_once(quick, tmp_path, monkeypatch):
    trained = []
    real = ablations.train
    monkeypatch.setattr(ablations, "train", lambda settings, out: trained.append(settings) or real(settings, out))
    opened = StudyBase.open(quick, tmp_path, ["subtype", "spatial"])
    outcome = run_study(SMALL, opened, tmp_path, seeds=[0], labels=["subtype"])
    assert [(s.model.rope_mode, s.run.seed) for s in trained] == [("full", 0), ("off", 0)]
    assert all(len(values) == 1 for found in outcome.values.values() for values in found.values())
    assert outcome.chance["subtype from all modalities"] == 0.5
    assert 0 < outcome.chance["recall@1, all pairs"] < 0.1

    # A run that is finished is read; one whose measurements are lost is measured again; none is trained again.
    folder = run_folder(opened, with_overrides(opened.settings, {"run.seed": 0}), tmp_path / "runs")
    (folder / "measured.json").unlink()
    again = run_study(SMALL, opened, tmp_path, seeds=[0], labels=["subtype"])
    assert len(trained) == 2
    assert again.values == outcome.values

    # Another label asks for other measurements of the same runs.
    more = run_study(SMALL, opened, tmp_path, seeds=[0], labels=["spatial"])
    assert len(trained) == 2
    assert "spatial from slide tokens" in more.measures()

    draw_outcome(outcome, studies.shown(outcome), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_every_variant_of_every_study_is_a_valid_setting(base, tmp_path):
    opened = StudyBase.open(base, tmp_path, [])
    for make in STUDIES.values():
        study = make(opened.modalities)
        assert study.variants[0].overrides == {}
        hashes = {
            run_folder(opened, with_overrides(opened.settings, v.overrides), Path("runs")) for v in study.variants
        }
        assert len(hashes) == len(study.variants)
    with pytest.raises(ConfigError, match="rope_mod"):
        with_overrides(base, {"model.rope_mod": "off"})


def test_studies_are_of_the_modalities_that_are_there():
    """A base of three modalities: leaving one out brings no other in, and nothing is frozen that is not there."""
    found = STUDIES["modalities"](("wsi", "rna", "methylation"))
    left = [v.overrides["data.modalities"] for v in found.variants[1:]]
    assert left == [["rna", "methylation"], ["wsi", "methylation"], ["wsi", "rna"]]
    frozen = STUDIES["frozen"](("wsi", "rna", "methylation"))
    assert frozen.variants[2].overrides == {"model.frozen": ["rna", "methylation"]}
    with pytest.raises(SettingsError, match="none can be left out"):
        STUDIES["modalities"](("wsi", "rna"))
    for name in ("frope", "loss", "frozen"):
        with pytest.raises(SettingsError, match="rna, cnv only"):
            STUDIES[name](("rna", "cnv"))


def test_every_variant_holds_out_the_same_patients(base, tmp_path):
    opened = StudyBase.open(base, tmp_path, [])
    split = Split.load(opened.settings.data.split)
    for variant in STUDIES["modalities"](opened.modalities).variants:
        data = prepare(with_overrides(opened.settings, variant.overrides)).data
        for part, patients in data.split.parts.items():
            assert set(patients) <= set(split.parts[part])


def test_other_data_are_other_runs(base, cohort_folder, tmp_path):
    """The same paths with other values in the files: no earlier measurement is reported again."""
    folder = tmp_path / "cohort"
    shutil.copytree(cohort_folder, folder)
    paths = {f"data.{key}": str(folder / name) for key, name in
             (("mudata", "cohort.h5mu"), ("slides", "slides.csv"), ("labels", "labels.csv"))}  # fmt: skip
    settings = with_overrides(base, paths)
    before = StudyBase.open(settings, tmp_path, ["subtype"])
    rows = (folder / "slides.csv").read_text().splitlines()
    (folder / "slides.csv").write_text("\n".join(rows[:-3]) + "\n")
    after = StudyBase.open(settings, tmp_path, ["subtype"])
    assert run_folder(before, settings, tmp_path) != run_folder(after, settings, tmp_path)


def test_labels_are_asked_for_before_anything_is_trained(base, tmp_path):
    with pytest.raises(SettingsError, match="no label nosuch"):
        StudyBase.open(base, tmp_path, ["nosuch"])


def test_a_variant_may_lack_a_measure(tmp_path):
    study = Study("modalities", "?", (Variant("all"), Variant("without wsi")))
    outcome = Outcome(
        study, (0, 1), {"all": {"a": [0.5, 0.6], "b": [0.1, 0.2]}, "without wsi": {"b": [0.3, 0.1]}}, {"a": 0.1}
    )
    assert outcome.measures() == ["a", "b"]
    assert math.isnan(outcome.estimate("without wsi", "a").value)
    estimate = outcome.estimate("all", "a")
    assert (estimate.value, estimate.n) == (pytest.approx(0.55), 2)
    assert estimate.low < 0.5 < 0.6 < estimate.high
    wider = replace(outcome, intervals={"all": {"a": [(0.4, 0.7), (0.5, 0.8)]}}).estimate("all", "a")
    # Student's 0.635 and the mean of both runs' distances to their limits, in quadrature; a share is between 0 and 1.
    assert (wider.low, wider.high) == (0.0, 1.0)
    runs = {"all": {"a": [0.5, 0.52]}}
    near = replace(outcome, values=runs, intervals={"all": {"a": [(0.4, 0.7), (0.42, 0.72)]}}).estimate("all", "a")
    assert (near.low, near.high) == pytest.approx(
        (0.51 - np.hypot(0.12706, 0.1), 0.51 + np.hypot(0.12706, 0.2)), abs=1e-4
    )
    # A run without an interval of its own leaves the seeds to speak.
    assert replace(outcome, intervals={"all": {"a": [(0.2, 0.9), None]}}).estimate("all", "a") == estimate
    draw_outcome(outcome, ["a", "b"], tmp_path / "figure.png")
    assert json.loads(json.dumps(outcome.as_dict(), allow_nan=False))["estimates"]["all"]["a"]["n"] == 2


def test_the_table_marks_what_is_clear_after_correction():
    """Differences of 0.5 in all patients are, none is not; a measure that a variant lacks is an empty cell."""
    study = Study("loss", "?", (Variant("base"), Variant("worse"), Variant("same")))
    draws = range(4)
    base = [{"m": {f"P{draw}-{at}": float(at % 2) for at in range(20)}, "n": {"P": 1.0}} for draw in draws]
    worse = [{"m": {name: value - 0.5 + 0.01 * draw for name, value in run["m"].items()}} for draw, run in
             enumerate(base)]  # fmt: skip
    same = [{"m": dict(run["m"])} for run in base]
    values = {"base": {"m": [0.5] * 4, "n": [1.0] * 4}, "worse": {"m": [0.0] * 4}, "same": {"m": [0.5] * 4}}
    patients = {"base": base, "worse": worse, "same": same}
    rows = outcome_table(Outcome(study, (0,), values, {}, {}, patients, 4), ["m", "n"]).splitlines()
    assert rows[0] == "| | m | n |"
    assert rows[2].startswith("| base | 0.500 [")
    assert rows[3].startswith("| worse | 0.000: **-0.485 [")
    assert rows[3].endswith("]** |  |")
    assert rows[4].startswith("| same | 0.500: +0.000 [")


def test_means_of_other_pairs_are_not_compared(quick, tmp_path):
    """A mean over easier pairs is no better result: only the same pairs are compared."""
    study = Study("loss", "?", (Variant("all pairs"), Variant("slide's pairs", {"loss.pairs": "wsi"})))
    opened = StudyBase.open(quick, tmp_path, ["subtype"])
    found = run_study(study, opened, tmp_path, seeds=[0], labels=["subtype"])
    everything, slides = "recall@1, all pairs", "recall@1, pairs of the slide"
    assert {everything, slides} <= set(found.values["all pairs"])
    assert everything not in found.values["slide's pairs"]
    assert everything not in found.differences()["slide's pairs"]
    assert slides in found.differences()["slide's pairs"]
    pairs = [name for name in found.values["slide's pairs"] if name.startswith("recall@1 ")]
    assert all("wsi" in name for name in pairs)
    assert len(pairs) > 1
    mean = np.mean([found.values["slide's pairs"][name][0] for name in pairs])
    assert found.values["slide's pairs"][slides] == [pytest.approx(mean)]


def test_averages_over_draws_keep_the_shape():
    """Numbers are averaged, estimates combined, words and what only one draw has left alone or out."""
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    one = {
        "a": [1, 2.0],
        "t": {3: (1.0, 2)},
        "b": "word",
        "w": "yes",
        "c": estimate,
        "only": 1,
        "d": {"e": 0.25, "f": None},
        "flag": True,
    }
    other = {
        "a": [3, 4.0],
        "t": {3: (2.0, 4)},
        "b": "word",
        "w": "no",
        "c": {**estimate, "value": 0.7},
        "d": {"e": 0.75, "f": None},
        "flag": True,
    }
    found = studies.average_over_draws([one, other])
    assert studies.average_over_draws([one]) == one
    assert (found["a"], found["b"], found["d"]) == ([2.0, 3.0], "word", {"e": 0.5, "f": None})
    assert (found["t"], found["w"], found["flag"]) == ({3: [1.5, 3.0]}, None, True)
    assert "only" not in found
    assert found["c"]["value"] == pytest.approx(0.6)
    assert found["c"]["low"] < 0.4
    assert found["c"]["high"] > 0.8
    unknown = {"value": 0.5, "low": None, "high": None, "n": 10}
    assert (
        studies.average_over_draws([unknown, unknown])["low"] == 0.5
    )  # two equal draws, without intervals of their own


def test_draws_of_different_sizes_are_averaged(tmp_path):
    """A pair of n patients has at most n singular values; what only one draw could compute is null."""
    of_draws = []
    for n in (5, 3):
        spectrum = [1 / n] * n
        pair = {"left": "wsi", "right": "rna", "left_spectrum": spectrum, "right_spectrum": spectrum,
                "overlap": 0.5, "chance": 0.25, "correlation": 0.5, "n": n}  # fmt: skip
        of_draws.append({"pairs": [pair], "words": ["a"] * n, "some": {"x": 1.0} if n == 5 else None})
    for order in (of_draws, of_draws[::-1]):
        found = studies.average_over_draws(order)
        assert found["pairs"][0]["left_spectrum"] == [pytest.approx((1 / 5 + 1 / 3) / 2)] * 3
        assert (found["words"], found["some"]) == (None, None)
        assert draw_projections({"projections": found, "draws": 2}, tmp_path / "projections.png").is_file()


def test_a_label_without_a_curve_is_not_drawn(tmp_path):
    """A label with too few patients in one draw has no curve in the mean."""
    retrieval = {"rna": {"curve": {1: (0.1, 0.0, 0.2), 2: (0.2, 0.1, 0.3)}, "chance": 0.05}}
    curve = {"curve": {1: (0.5, 0.4, 0.6), 2: (0.6, 0.6, 0.6)}, "chance": 0.5}
    probes = {"refitted": curve, "deployed": curve}
    of_draws = [{"patients": 5, "retrieval": retrieval, "probes": {"a": found}} for found in (probes, {})]
    for order in (of_draws, of_draws[::-1]):
        found = {"missing": studies.average_over_draws(order), "draws": 2}
        assert draw_missing(found, tmp_path / "missing.png").is_file()


def test_analyses_cover_every_draw(quick, tmp_path):
    """Two draws that are the same: their mean is either of them."""
    opened = StudyBase.open(quick, tmp_path, ["subtype"])
    said = []
    for name in ("missing", "projections"):
        studies.run_analysis(name, [opened, opened], tmp_path, seeds=[0], labels=["subtype"], report=said.append)
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert stored["draws"] == 2
        assert stored["of_draws"][0] == stored["of_draws"][1]
        assert [run["cohort_hash"] for run in stored["runs"]] == [opened.cohort_hash] * 2
        assert (tmp_path / f"ablation-{name}.png").is_file()
    held_out = said[0].split(": ")[1]
    assert said == [f"{name}, draw {draw}: {held_out}" for name in ("missing", "projections") for draw in (0, 1)]
    stored = json.loads((tmp_path / "missing.json").read_text())
    for target, found in stored["of_draws"][0]["retrieval"].items():
        for size, values in found["curve"].items():
            np.testing.assert_allclose(stored["missing"]["retrieval"][target]["curve"][size], values)


def test_command(base, cohort_folder, tmp_path, monkeypatch):
    settings = tmp_path / "settings.toml"
    lines = [f'[data]\nmudata = "{cohort_folder}/cohort.h5mu"', f'slides = "{cohort_folder}/slides.csv"']
    lines += [f'labels = "{cohort_folder}/labels.csv"', "test_share = 0.3\n[model]\nprojection_dim = 8"]
    lines += ['wsi = { embed_dim = 16, depth = 2, num_heads = 1, n_storage_tokens = 1, ffn_layer = "swiglu" }']
    lines += ["omics = { embed_dim = 16 }\n[run]\nsteps = 2\nbatch_size = 50"]
    lines += ['device = "cpu"\ntensorboard = false']
    settings.write_text("\n".join(lines))
    monkeypatch.setitem(STUDIES, "frope", lambda modalities: SMALL)
    out = tmp_path / "out"
    command = ["ablate", "frope", "attention", "projections", "--settings", str(settings), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--seeds", "1", "--label", "subtype"])
    assert done.exit_code == 0, done.output
    for name in ("frope", "attention", "projections"):
        assert (out / f"ablation-{name}.png").is_file()
        assert json.loads((out / f"{name}.json").read_text())
    assert len(list((out / "runs").iterdir())) == 2
    assert "| off |" in (out / "frope.md").read_text()
    found = json.loads((out / "frope.json").read_text())
    base_name, other = list(found["values"])
    for measure, difference in found["differences"][other].items():
        gap = found["values"][other][measure][0] - found["values"][base_name][measure][0]
        # Means over pairs of different patients weigh patients otherwise than the mean over patients.
        close = 0.02 if measure.startswith("recall@1,") else 1e-9
        assert difference["difference"]["value"] == pytest.approx(gap, abs=close), measure
    wrong = CliRunner().invoke(app, ["ablate", "nothing", "--out", str(out)])
    assert wrong.exit_code == 1
    assert "no study nothing" in wrong.output
