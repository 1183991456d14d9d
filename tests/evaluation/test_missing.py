"""Curves over missing modalities: more of them help, and the subsets are all there."""

import numpy as np
import pytest

from exaonepath.errors import SettingsError
from exaonepath.evaluation.missing import by_size, probe_from_subsets, retrieval_from_subsets, subsets

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
