"""Curves over missing modalities: more of them help, and the subsets are all there."""

import numpy as np
import pandas as pd
import pytest

from exaonepath.alignment.metrics.missing import (
    by_size,
    gain_over_single,
    probe_from_subsets,
    retrieval_from_subsets,
    subsets,
)
from exaonepath.errors import SettingsError

NAMES = ("wsi", "rna", "snp")


def test_subsets():
    assert subsets(NAMES) == [
        ("wsi",), ("rna",), ("snp",), ("wsi", "rna"), ("wsi", "snp"), ("rna", "snp"), NAMES,
    ]  # fmt: skip


def spaces(noise, n=150, seed=0):
    """Every pair sees the patient's latent with the modality's noise."""
    rng = np.random.default_rng(seed)
    out = {}
    for i, a in enumerate(NAMES):
        for b in NAMES[i + 1 :]:
            latent = rng.normal(size=(n, 12))
            u, v = (latent + noise[m] * rng.normal(size=latent.shape) for m in (a, b))
            out[a, b] = tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    return out


def test_retrieval_from_subsets():
    found = retrieval_from_subsets(spaces({"wsi": 1.2, "rna": 0.2, "snp": 2.0}), range(150), "rna")
    assert list(found) == [("wsi",), ("snp",), ("wsi", "snp")]
    recall = {subset: score.recall[1].value for subset, score in found.items()}
    assert recall["snp",] < recall["wsi",] < recall["wsi", "snp"]
    with pytest.raises(SettingsError, match="cnv"):
        retrieval_from_subsets(spaces(dict.fromkeys(NAMES, 1.0)), range(150), "cnv")


@pytest.mark.parametrize("refit", [False, True])
def test_probe_from_subsets(refit):
    """Three noisy views of the label: the more of them, the better; a missing one is zeros, as in the fused space."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    views = {
        m: rng.normal(size=(400, 4)) + s * (2 * y[:, None] - 1) for m, s in zip(NAMES, (0.5, 0.3, 0.15), strict=True)
    }

    def fused(subset):
        rows = np.concatenate([views[m] if m in subset else np.zeros((400, 4)) for m in NAMES], axis=1)
        return rows[:250], rows[250:]

    found = probe_from_subsets(fused, NAMES, y[:250], y[250:], refit=refit)
    assert list(found) == subsets(NAMES)
    value = {subset: score.balanced_accuracy.value for subset, score in found.items()}
    assert value[NAMES] > value["wsi",] > value["snp",]
    assert value[NAMES] > 0.85
    curve = by_size(value)
    assert list(curve) == [1, 2, 3]
    assert curve[1][0] < curve[2][0] < curve[3][0]
    assert curve[1][1] <= curve[1][0] <= curve[1][2]
    assert curve[3] == (value[NAMES],) * 3


def test_gain_over_single_modalities():
    """The difference of two probes' balanced accuracies, with an interval of the pairs; no gain is possible."""
    rng = np.random.default_rng(0)
    y = np.array(["a", "b", "c"], object)[rng.integers(0, 3, 500)]
    code = np.eye(3)[np.searchsorted(["a", "b", "c"], y.astype(str))]
    strength = dict(zip(NAMES, (8.0, 0.9, 0.6), strict=True))

    def fused_from(strength):
        views = {m: rng.normal(size=(500, 3)) + s * code for m, s in strength.items()}

        def fused(subset):
            rows = np.concatenate([views[m] if m in subset else np.zeros((500, 3)) for m in NAMES], axis=1)
            return rows[:300], rows[300:]

        return fused

    fused = fused_from(strength)
    gain = gain_over_single(fused, NAMES, y[:300], y[300:])
    score = probe_from_subsets(fused, NAMES, y[:300], y[300:], refit=True)
    for name in NAMES:
        difference = score[NAMES].balanced_accuracy.value - score[name,].balanced_accuracy.value
        assert gain[name].value == pytest.approx(difference, abs=1e-12)
        assert gain[name].low <= gain[name].value <= gain[name].high
    assert gain["wsi"].low <= 0 <= gain["wsi"].high  # it knows everything by itself
    assert gain["snp"].low > 0.2
    unknown = y[300:].copy()
    unknown[::4] = float("nan")
    assert gain_over_single(fused, NAMES, y[:300], unknown)["snp"].n == 150
    # As pandas writes it, and with a class of one training patient, whom no probe can be fitted on.
    unknown[unknown != unknown] = pd.NA
    trained = y[:300].copy()
    trained[0], unknown[1] = "alone", "alone"
    assert gain_over_single(fused, NAMES, trained, unknown)["snp"].n == 149
    with pytest.raises(SettingsError, match="'d'"):
        gain_over_single(fused, NAMES, y[:300], np.full(200, "d"))
