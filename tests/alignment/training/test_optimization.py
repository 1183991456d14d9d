"""Learning rate, decay groups, averaged weights."""

import itertools
import math

import pytest
import torch
from torch import nn

from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig
from exaonepath.alignment.training.optimization import (
    AveragedWeights,
    build_optimizer,
    gradient_norm,
    learning_rate,
    lr_share,
    set_learning_rate,
)
from exaonepath.alignment.training.settings import OptimizerSettings


def test_warmup_then_half_a_cosine():
    settings = OptimizerSettings(lr=2.0, warmup=4, min_lr_share=0.1)
    rates = [learning_rate(step, 24, settings) for step in range(25)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[24] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    shares = OptimizerSettings(lr=2.0, warmup=0.25, min_lr_share=0.1)
    assert [learning_rate(s, 16, shares) for s in range(16)] == [
        learning_rate(s, 16, OptimizerSettings(lr=2.0, warmup=4, min_lr_share=0.1)) for s in range(16)
    ]


def test_decay_for_matrices_only():
    wsi = {"input_dim": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu"}
    omics = {"rna": {"feature_names": ["a", "b"], "embed_dim": 4}}
    model = ExaonePathAlignmentModel(ExaonePathAlignmentConfig(wsi_cfg=wsi, omics=omics, projection_dim=4))
    model.omics_encoder("rna").norm.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerSettings(weight_decay=0.3, logit_lr_share=0.5))
    names = {p: n for n, p in model.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.0]
    assert groups[2] == {"loss.log_t", "loss.bias"}
    assert all("norm" not in n and "bias" not in n and "token" not in n for n in groups[0])
    assert {"loss.projections.wsi_to_rna", "loss.projections.rna_to_wsi", "omics.rna.proj.weight"} <= groups[0]
    tokens = {n for n in groups[1] if "token" in n}
    assert len(tokens) == 2
    assert set().union(*groups) == {n for p, n in names.items() if p.requires_grad}
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1]


def test_averaged_weights_follow_and_swap():
    model = nn.Linear(2, 1)
    average = AveragedWeights(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight += 1
        average.update(model, step)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * model.weight.detach()
    now = model.weight.detach().clone()
    average.swap(model)
    # A lerp rounds differently from the two products: 40 steps of float32 around 40.
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=0)
    average.swap(model)
    assert torch.equal(model.weight, now)


def test_gradient_norm():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    assert gradient_norm([a, b]) == 0
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert gradient_norm([a, b]) == pytest.approx(5)
    b.grad = torch.tensor([math.inf])
    assert not torch.isfinite(gradient_norm([a, b]))


def test_projections_of_the_slide_have_a_share_of_their_own():
    settings = OptimizerSettings(projection_lr_share=0.1, slide_projection_lr_share=0.7)
    shares = {
        name: lr_share(f"loss.projections.{name}", settings) for name in ("wsi_to_rna", "rna_to_wsi", "rna_to_snp")
    }
    assert shares == {"wsi_to_rna": 0.7, "rna_to_wsi": 0.7, "rna_to_snp": 0.1}
