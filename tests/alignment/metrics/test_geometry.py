"""Effective rank, uniformity and alignment at values known in closed form."""

import math

import numpy as np
import pytest
import torch

from exaonepath.alignment.metrics.geometry import alignment, effective_rank, uniformity
from exaonepath.errors import SettingsError


def test_effective_rank_counts_directions():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(20, 5)) == pytest.approx(1)
    assert effective_rank(torch.eye(4).repeat(10, 1)[:, :2]) == pytest.approx(2)
    # Singular values 3 and 1 of three rows along one axis and... nine and one: shares 3/4 and 1/4.
    rows = np.array([[1.0, 0.0]] * 9 + [[0.0, 1.0]])
    assert effective_rank(rows) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(rows * 1e-8) == pytest.approx(effective_rank(rows))
    assert math.isnan(effective_rank(np.zeros((0, 3))))
    assert math.isnan(effective_rank(np.full((3, 3), np.nan)))


def test_uniformity():
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0, abs=1e-12)
    # Two opposite points: squared distance 4.
    assert uniformity(np.array([[1.0], [-1.0]])) == pytest.approx(-8)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    expected = math.log(torch.exp(-2 * torch.pdist(unit) ** 2).mean())
    assert uniformity(x) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(uniformity(torch.ones(1, 3)))


def test_alignment():
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(np.eye(4), np.roll(np.eye(4), 1, 0)) == pytest.approx(2)
    assert alignment(x, -x, alpha=1) == pytest.approx(2)
    with pytest.raises(SettingsError, match="one by one"):
        alignment(x, x[:3])
