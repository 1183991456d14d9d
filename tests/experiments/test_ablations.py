"""Studies: variants get their settings, runs are reused and resumed, and the figure shows what was measured."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exaonepath.cli import app
from exaonepath.errors import ConfigError
from exaonepath.experiments import ablations, studies
from exaonepath.experiments.ablations import STUDIES, Outcome, Study, Variant, run_folder, run_study, with_overrides
from exaonepath.experiments.figures import draw_outcome


@pytest.fixture(scope="module")
def quick(base):
    return replace(base, run=replace(base.run, steps=2))


SMALL = Study("frope", "A question?", (Variant("full"), Variant("off", {"model.rope_mode": "off"})))


def test_a_study_trains_each_variant_once(quick, tmp_path, monkeypatch):
    trained = []
    real = ablations.train
    monkeypatch.setattr(ablations, "train", lambda settings, out: trained.append(settings) or real(settings, out))
    outcome = run_study(SMALL, quick, tmp_path, seeds=[0], labels=["subtype"])
    assert [(s.model.rope_mode, s.run.seed) for s in trained] == [("full", 0), ("off", 0)]
    assert all(len(values) == 1 for found in outcome.values.values() for values in found.values())
    assert outcome.chance["subtype from all modalities"] == 0.5
    assert 0 < outcome.chance["recall@1, all pairs"] < 0.1

    # A run that is finished is read; one whose measurements are lost is measured again; none is trained again.
    folder = run_folder(with_overrides(quick, {"run.seed": 0}), tmp_path / "runs")
    (folder / "measured.json").unlink()
    again = run_study(SMALL, quick, tmp_path, seeds=[0], labels=["subtype"])
    assert len(trained) == 2
    assert again.values == outcome.values

    # Another label asks for other measurements of the same runs.
    more = run_study(SMALL, quick, tmp_path, seeds=[0], labels=["spatial"])
    assert len(trained) == 2
    assert "spatial from slide tokens" in more.measures()

    draw_outcome(outcome, studies.shown(outcome), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_every_variant_of_every_study_is_a_valid_setting(base):
    for study in STUDIES.values():
        assert study.variants[0].overrides == {}
        hashes = {run_folder(with_overrides(base, v.overrides), Path("runs")) for v in study.variants}
        assert len(hashes) == len(study.variants)
    with pytest.raises(ConfigError, match="rope_mod"):
        with_overrides(base, {"model.rope_mod": "off"})


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
    wider = replace(outcome, intervals={"all": {"a": [(0.2, 0.9), (0.3, 0.8)]}}).estimate("all", "a")
    assert wider.low < estimate.low - 0.1
    assert wider.high > estimate.high + 0.1
    draw_outcome(outcome, ["a", "b"], tmp_path / "figure.png")
    assert json.loads(json.dumps(outcome.as_dict(), allow_nan=False))["estimates"]["all"]["a"]["n"] == 2


def test_command(base, cohort_folder, tmp_path, monkeypatch):
    settings = tmp_path / "settings.toml"
    lines = [f'[data]\nmudata = "{cohort_folder}/cohort.h5mu"', f'slides = "{cohort_folder}/slides.csv"']
    lines += [f'labels = "{cohort_folder}/labels.csv"', "test_share = 0.3\n[model]\nprojection_dim = 8"]
    lines += ['wsi = { embed_dim = 16, depth = 2, num_heads = 1, n_storage_tokens = 1, ffn_layer = "swiglu" }']
    lines += ["omics = { embed_dim = 16 }\n[run]\nsteps = 2\nbatch_size = 50"]
    lines += ['device = "cpu"\ntensorboard = false']
    settings.write_text("\n".join(lines))
    monkeypatch.setitem(STUDIES, "frope", SMALL)
    out = tmp_path / "out"
    command = ["ablate", "frope", "attention", "projections", "--settings", str(settings), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--seeds", "1", "--label", "subtype"])
    assert done.exit_code == 0, done.output
    for name in ("frope", "attention", "projections"):
        assert (out / f"ablation-{name}.png").is_file()
        assert json.loads((out / f"{name}.json").read_text())
    assert len(list((out / "runs").iterdir())) == 2
    wrong = CliRunner().invoke(app, ["ablate", "nothing", "--out", str(out)])
    assert wrong.exit_code == 1
    assert "no study nothing" in wrong.output
