"""Gradients of a batch: chunks equal the whole, dropout included; what is not finite is named."""

from contextlib import nullcontext

import pytest
import torch

from exaonepath.alignment.batch import PatientBatch, SlidePatches
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.model.configuration import ExaonePathAlignmentConfig
from exaonepath.alignment.model.objective import AlignmentObjective
from exaonepath.alignment.training.distributed import Processes
from exaonepath.alignment.training.step import Chunk, TrainingError, accumulate_gradients
from exaonepath.encoders.loading import randomize

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def model():
    """With dropout everywhere, float64 so that the order of sums does not show."""
    torch.manual_seed(0)
    wsi = {"input_dim": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu", "n_storage_tokens": 1}
    omics = {name: {"feature_names": ["a", "b", "c"], "embed_dim": 6, "dropout": 0.3} for name in ("rna", "cnv")}
    model = ExaonePathAlignmentModel(ExaonePathAlignmentConfig(wsi_cfg=wsi, omics=omics, projection_dim=4))
    randomize(model.slide_encoder, 0)
    return model.double().train()


def chunk(rows, seed):
    """Patients of these numbers; what they are depends on the number alone."""
    slides, profiles = [], []
    for row in rows:
        g = torch.Generator().manual_seed(row)
        n = 3 + row % 4
        coords = torch.randint(0, 20, (n, 2), generator=g) * 256
        features = torch.randn(n, 8, generator=g, dtype=torch.float64)
        slides.append([] if row == 2 else [SlidePatches(features, coords, torch.randint(0, 2, (n,), generator=g))])
        profiles.append(torch.randn(3, generator=g, dtype=torch.float64))
    there = {"cnv": torch.tensor([row % 3 != 0 for row in rows])}
    patients = tuple(f"P{row}" for row in rows)
    values = {"rna": torch.stack(profiles), "cnv": torch.stack(profiles)}
    return Chunk(PatientBatch.build(len(rows), slides, values, there, patients, torch.tensor(rows)), seed)


def gradients(model, chunks, **kwargs):
    model.zero_grad(set_to_none=True)
    output = accumulate_gradients(
        model, AlignmentObjective(model), chunks, autocast=nullcontext, processes=ALONE, **kwargs
    )
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_chunks_equal_one_graph_over_the_batch(model):
    """Two passes a chunk against one graph that holds every chunk, the same dropout in both."""
    chunks = [chunk([0, 1, 2], 11), chunk([3, 4], 12), chunk([5, 6, 7], 13)]
    output, found = gradients(model, chunks)
    parts = []
    for part in chunks:
        torch.manual_seed(part.seed)
        parts.append(model.embed(part.batch))
    embeddings = {name: torch.cat([part[name] for part in parts]) for name in model.modalities}
    available = {name: torch.cat([c.batch.available[name] for c in chunks]) for name in model.modalities}
    model.zero_grad(set_to_none=True)
    loss = AlignmentObjective(model)(embeddings, available, torch.arange(8)).loss
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    assert len(found) > 30
    # float64 throughout; the loss sums in float64.
    torch.testing.assert_close(output.objective.loss.detach(), loss.detach(), rtol=1e-10, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11)
    assert torch.equal(output.embeddings["rna"], embeddings["rna"].detach())
    # Dropout was on: without it the embeddings are others.
    plain = model.eval().embed(chunks[0].batch)
    assert not torch.allclose(plain["wsi"], parts[0]["wsi"])


def test_one_chunk_is_the_plain_step(model):
    """One forward only, and the very gradients of autograd."""
    calls = []
    embed = model.embed
    model.embed = lambda batch: calls.append(1) or embed(batch)
    one = chunk([0, 1, 2, 3], 5)
    _, found = gradients(model, [one])
    assert len(calls) == 1
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    AlignmentObjective(model)(embed(one.batch), one.batch.available, one.numbers).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_loss_scale_reaches_the_gradients_and_not_the_report(model):
    chunks = [chunk([0, 1, 2], 1), chunk([3, 4, 5], 2)]
    output, plain = gradients(model, chunks)
    scaled_output, scaled = gradients(model, chunks, loss_scale=1024.0)
    for name in plain:
        torch.testing.assert_close(scaled[name], 1024 * plain[name])
    torch.testing.assert_close(scaled_output.gradients["wsi"], output.gradients["wsi"])


def test_a_frozen_encoder_gets_no_gradient_and_the_others_keep_theirs(model):
    chunks = [chunk([0, 1, 2], 1), chunk([3, 4, 5], 2)]
    _, before = gradients(model, chunks)
    model.slide_encoder.requires_grad_(False)
    for some in (chunks, chunks[:1]):
        _, found = gradients(model, some)
        assert not any(name.startswith("slide_encoder") for name in found)
    _, found = gradients(model, chunks)
    torch.testing.assert_close(found["omics.rna.proj.weight"], before["omics.rna.proj.weight"])


@pytest.mark.parametrize("n_chunks", [1, 2])
def test_embeddings_that_are_not_finite_are_named(model, n_chunks):
    chunks = [chunk([0, 1, 4], 1), chunk([5, 7], 2)][:n_chunks]
    chunks[-1].batch.profiles["rna"][1] = torch.inf
    patient = chunks[-1].batch.patients[1]
    with pytest.raises(TrainingError, match=f"rna of {patient}$"):
        gradients(model, chunks)


def test_a_loss_that_is_not_finite_names_its_pairs(model):
    with torch.no_grad():
        model.loss.projection("wsi", "rna")[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"the loss is nan \(pairs: wsi-rna\)"):
        gradients(model, [chunk([0, 1, 4, 5], 1)])
