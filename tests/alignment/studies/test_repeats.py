"""Repeated splits: each has other test patients, runs are reused, and intervals know that training patients overlap."""

import json
from dataclasses import replace

import numpy as np
import pytest

from exaonepath.alignment.evaluate import EvaluationSettings
from exaonepath.alignment.studies import repeats
from exaonepath.alignment.studies.repeats import corrected_interval, repeat, repeats_table, summarize
from exaonepath.errors import SettingsError


@pytest.fixture(scope="module")
def quick(base):
    data = replace(base.data, modalities=("rna", "methylation"))
    return replace(base, data=data, model=replace(base.model, wsi={}), run=replace(base.run, steps=2))


def test_every_split_is_trained_and_evaluated_once(quick, tmp_path, monkeypatch):
    trained = []
    real = repeats.train
    monkeypatch.setattr(repeats, "train", lambda settings, out: trained.append(settings) or real(settings, out))
    wanted = EvaluationSettings(labels=("subtype",))
    found = repeat(quick, tmp_path, splits=2, evaluation=wanted)
    splits = [json.loads(path.read_text())["parts"] for path in sorted((tmp_path / "splits").iterdir())]
    assert len(trained) == len(splits) == 2
    assert splits[0]["test"] != splits[1]["test"]
    measure = found["measures"]["recall@1 methylation x rna"]
    assert set(measure) == {"ours", "CCA", "ridge", "PLS"}
    difference = measure["CCA"]["difference"]["value"]
    assert difference == pytest.approx(measure["ours"]["value"]["value"] - measure["CCA"]["value"]["value"])
    assert "difference" in found["measures"]["subtype from fused"]["PCA + logistic regression (all)"]
    text = (tmp_path / "repeats.md").read_text()
    assert text == repeats_table(json.loads((tmp_path / "repeats.json").read_text()))
    assert "| subtype from rna | PCA + logistic regression (rna) |" in text
    assert repeat(quick, tmp_path, splits=2, evaluation=wanted) == found
    assert len(trained) == 2


def test_settings_that_cannot_be_repeated_are_errors(quick, tmp_path):
    with pytest.raises(SettingsError, match=r"remove data\.split"):
        repeat(replace(quick, data=replace(quick.data, split="s.json")), tmp_path, splits=2)
    with pytest.raises(SettingsError, match="two or more"):
        repeat(quick, tmp_path, splits=1)
    with pytest.raises(SettingsError, match="test_share"):
        repeat(replace(quick, data=replace(quick.data, test_share=0.0)), tmp_path, splits=2)
    assert not list(tmp_path.iterdir())


def test_the_correction_covers_where_the_uncorrected_interval_does_not():
    """A rule is fitted on a random half of 60 patients and scored on the others, ten times; truth: fresh patients. 95 %
    of corrected intervals are asked to hold it, within three errors of 300 trials; of uncorrected ones, far fewer do.
    """
    covered = {0.0: 0, 1.0: 0}
    for trial in range(300):
        rng = np.random.default_rng(trial)
        x = rng.standard_normal(60)
        scores = []
        for _ in range(10):
            order = rng.permutation(60)
            fitted = x[order[:30]].mean()
            scores.append(float(np.square(x[order[30:]] - fitted).mean()))
        truth = 1 + 1 / 30
        for share in covered:
            interval = corrected_interval(scores, share)
            covered[share] += interval.low <= truth <= interval.high
    assert covered[1.0] / 300 > 0.91
    assert covered[0.0] / 300 < 0.85


def test_few_splits_and_missing_measures():
    assert np.isnan(corrected_interval([], 0.2).value)
    single = corrected_interval([0.3], 0.2)
    assert single.value == 0.3
    assert np.isnan(single.low)
    rows = [{("a", "ours"): 0.5, ("a", "CCA"): 0.4}, {("a", "ours"): 0.7}]
    found = summarize(rows, 0.2)["a"]
    assert (found["ours"]["splits"], found["CCA"]["splits"]) == (2, 1)
    assert found["CCA"]["difference"]["value"] == pytest.approx(0.1)
    assert "| a | CCA | 0.400 | +0.100 |" in repeats_table({"splits": 2, "measures": {"a": found}})
    json.dumps(found, allow_nan=False)
