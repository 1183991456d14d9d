"""PairwiseSigmoidLoss and the cached-gradient step."""

import logging
import math
from itertools import permutations

import pytest
import torch
from torch import nn

from exaonepath import log_once
from exaonepath.alignment.model.cached_gradients import cached_gradient_step
from exaonepath.alignment.model.loss import PairwiseSigmoidLoss
from exaonepath.errors import SettingsError
from exaonepath.reference.sigmoid_loss import dense_sigmoid_loss

WIDTHS = {"wsi": 6, "rna": 5, "cnv": 4}


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return PairwiseSigmoidLoss(WIDTHS, 8, **options).to(dtype)


def batch(n_rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(n_rows, width, generator=generator, dtype=dtype) for name, width in WIDTHS.items()}


def reference(loss, embeddings, patient, availability, **options):
    names = list(WIDTHS)
    projections = {(i, j): loss.projection(names[i], names[j]) for i, j in permutations(range(3), 2)}
    return dense_sigmoid_loss(
        [embeddings[name] for name in names], projections, loss.log_t, loss.bias, patient, availability, **options
    )


def test_starts_where_the_paper_does():
    loss = make()
    assert loss.pairs == (("wsi", "rna"), ("wsi", "cnv"), ("rna", "cnv"))
    assert loss.log_t.tolist() == pytest.approx([math.log(10)] * 3)
    assert loss.bias.tolist() == [-10.0] * 3
    assert {name for name, _ in loss.named_parameters()} == {"log_t", "bias"} | {
        f"projections.{a}_to_{b}" for a, b in permutations(WIDTHS, 2)
    }
    assert loss.projection("rna", "cnv").shape == (5, 8)


@pytest.mark.parametrize("pos_weight", [None, 2.0, "balanced"])
def test_equals_the_definition(pos_weight):
    loss, h = make(pos_weight=pos_weight), batch(17)
    patient = torch.arange(17) // 2
    available = torch.rand(3, 17, generator=torch.Generator().manual_seed(2)) > 0.4
    output = loss(h, patient, available)
    truth = reference(loss, h, patient, available, pos_weight=pos_weight)
    torch.testing.assert_close(output.loss, truth[0], rtol=1e-12, atol=0)  # float64 sums in another order
    torch.testing.assert_close(output.pair_losses, truth[1].detach(), rtol=1e-12, atol=0)
    assert output.n_positive.tolist() == truth[2].tolist()
    parameters = list(loss.parameters())
    for found, exact in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(truth[0], parameters), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-13)


def test_availability_by_name_as_tensor_or_by_absence():
    loss, h = make(), batch(9)
    there = torch.tensor([True] * 6 + [False] * 3)
    everywhere = torch.ones(9, dtype=torch.bool)
    by_name = loss(h, None, {"rna": there})
    as_tensor = loss(h, torch.arange(9), torch.stack([everywhere, there, everywhere]))
    assert torch.equal(by_name.loss, as_tensor.loss)
    absent = loss({"wsi": h["wsi"], "rna": None, "cnv": h["cnv"]})
    as_tensor = loss(h, None, torch.stack([everywhere, ~everywhere, everywhere]))
    assert torch.equal(absent.loss, as_tensor.loss)
    assert absent.n_positive.tolist() == [0, 9, 0]
    assert absent.missing.tolist() == [1.0, 0.0, 1.0]


def test_pair_weights_by_either_order():
    h = batch(9)
    weighted = make(pair_weights={("cnv", "wsi"): 0.0, ("wsi", "rna"): 2.0})
    losses = make()(h).pair_losses
    found = weighted(h)
    torch.testing.assert_close(found.loss, (2 * losses[0] + losses[2]) / 3, rtol=1e-12, atol=0)
    assert found.pair_losses[1].isnan()


def test_several_rows_of_one_patient_are_positives():
    h = batch(8)
    assert make()(h, torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])).n_positive.tolist() == [9 + 4 + 3] * 3


def test_nothing_in_common_is_zero_with_zero_gradients_and_said_once(caplog):
    log_once.forget()
    loss, h = make(), batch(4)
    halves = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    with caplog.at_level(logging.WARNING):
        loss(h, None, halves)
        output = loss(h, None, halves)
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())
    assert len([r for r in caplog.records if "no valid positive" in r.message]) == 1


def test_a_temperature_that_overflows_names_its_pair():
    loss = make(torch.float32)
    with torch.no_grad():
        loss.log_t[1] = 100.0
    with pytest.raises(SettingsError, match=r"\(wsi, cnv\).*t = 100"):
        loss(batch(4, torch.float32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"wsi": 3},), "two or more"),
        (({"wsi": 3, "rna": 0},), "positive width"),
        (({"wsi": 3, "rna": 2}, 0), "positive projection_dim"),
        (({"a.b": 3, "rna": 2},), "without dots"),
        (({"a": 1, "b_to_c": 1, "a_to_b": 1, "c": 1},), "distinct"),
    ],
)
def test_bad_settings(arguments, words):
    with pytest.raises(SettingsError, match=words):
        PairwiseSigmoidLoss(*arguments)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({("wsi", "mri"): 1.0}, r"unknown \[\('wsi', 'mri'\)\]"),
        ({("wsi", "rna"): 1.0, ("rna", "wsi"): 2.0}, "given twice"),
        ({("wsi", "rna"): -1.0}, "finite and >= 0"),
    ],
)
def test_bad_pair_weights(weights, words):
    with pytest.raises(SettingsError, match=words):
        make(pair_weights=weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: ({**h, "mri": h["wsi"]},), "unknown modality mri"),
        (lambda h: ({},), "every modality is missing"),
        (lambda h: ({**h, "rna": h["rna"][:2]},), "2 rows"),
        (lambda h: ({**h, "rna": h["cnv"]},), "as wide as"),
        (lambda h: (h, torch.arange(3)), "patient must be"),
        (lambda h: (h, None, torch.ones(2, 5).bool()), r"bool \[3, 5\]"),
        (lambda h: (h, None, {"mri": torch.ones(5).bool()}), "availability of unknown modality mri"),
        (lambda h: (h, None, {"rna": torch.ones(4).bool()}), r"availability of rna must be bool \[5\]"),
        (lambda h: (h, None, {"rna": torch.ones(5)}), "availability of rna must be bool"),
    ],
)
def test_bad_batches(change, words):
    with pytest.raises(SettingsError, match=words):
        make()(*change(batch(5)))


def test_distributed_without_a_process_group_is_refused():
    with pytest.raises(SettingsError, match="init_process_group"):
        make(distributed=True)(batch(3), torch.arange(3))


class Encoders(nn.Module):
    """One small network per modality, with dropout: what a chunk draws must be drawn again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.networks = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(7, 10), nn.Dropout(0.4), nn.GELU(), nn.Linear(10, width))
                for name, width in WIDTHS.items()
            }
        )

    def forward(self, chunk):
        return {name: self.networks[name](x) for name, x in chunk.items()}


def inputs(n_rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(n_rows, 7, generator=generator, dtype=dtype) for name in WIDTHS}


def split(data, sizes):
    parts = {name: x.split(sizes) for name, x in data.items()}
    return [{name: part[k] for name, part in parts.items()} for k in range(len(sizes))]


def gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1] * 11])
def test_a_cached_step_is_a_plain_step(sizes):
    """Dropout included: the plain step embeds the same chunks in the same order, all with a graph at once."""
    chunks = split(inputs(11), sizes)
    patient = torch.arange(11) // 2
    plain_encoders, plain_loss = Encoders().double(), make()
    torch.manual_seed(5)
    parts = [plain_encoders(chunk) for chunk in chunks]
    whole = {name: torch.cat([part[name] for part in parts]) for name in WIDTHS}
    plain = plain_loss(whole, patient)
    plain.loss.backward()
    next_plain = torch.rand(1)

    encoders, loss = Encoders().double(), make()
    torch.manual_seed(5)
    output = cached_gradient_step(encoders, chunks, lambda h: loss(h, patient))
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(torch.rand(1), next_plain)  # the step after draws what it would have drawn
    for found, exact in zip(gradients(encoders, loss), gradients(plain_encoders, plain_loss), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-14)  # float64, summed chunk by chunk


def test_a_cached_step_adds_to_what_is_there():
    chunks = split(inputs(6), [3, 3])
    encoders, loss = Encoders().double().eval(), make()
    step = lambda: cached_gradient_step(encoders, chunks, loss)  # noqa: E731
    step()
    once = [g.clone() for g in gradients(encoders, loss)]
    step()
    for twice, g in zip(gradients(encoders, loss), once, strict=True):
        torch.testing.assert_close(twice, 2 * g, rtol=1e-12, atol=1e-15)


def test_a_cached_step_scales_and_keeps_graphs_apart():
    """A scaled backward scales every gradient; only one chunk's graph is alive at a time."""
    chunks = split(inputs(6), [2, 2, 2])
    encoders, loss = Encoders().double().eval(), make()
    cached_gradient_step(encoders, chunks, loss)
    plain = [g.clone() for g in gradients(encoders, loss)]
    encoders.zero_grad()
    loss.zero_grad()
    rows_with_graph = []

    def encode(chunk):
        out = encoders(chunk)
        rows_with_graph.append(sum(len(x) for x in out.values() if x.requires_grad))
        return out

    cached_gradient_step(encode, chunks, loss, backward=lambda x: (1024 * x).backward())
    for scaled, g in zip(gradients(encoders, loss), plain, strict=True):
        assert torch.equal(scaled, 1024 * g)  # a power of two
    assert rows_with_graph == [0, 0, 0, 6, 6, 6]


def test_a_cached_step_under_autocast():
    """Autocast caches the casts of the first, graphless pass; taken again they would leave the weights without one."""
    chunks = split(inputs(6, torch.float32), [3, 3])
    encoders, loss = Encoders().eval(), make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached_gradient_step(encoders, chunks, loss)
    assert all(g is not None and g.any() for g in gradients(encoders, loss))


def test_a_cached_step_leaves_frozen_encoders_alone():
    chunks = split(inputs(6), [3, 3])
    encoders, loss = Encoders().double(), make()
    encoders.networks["rna"].requires_grad_(False)
    cached_gradient_step(encoders, chunks, loss)
    assert all(p.grad is None for p in encoders.networks["rna"].parameters())
    assert all(p.grad.any() for p in encoders.networks["wsi"].parameters())
    encoders.requires_grad_(False)
    cached_gradient_step(encoders, chunks, loss)  # the loss's own parameters still learn
    assert loss.log_t.grad.any()


def test_ddp_modules_synchronise_in_the_last_chunk_only():
    entered = []

    class Wrapped(Encoders):
        def no_sync(self):
            entered.append(len(chunks_seen))
            return torch.enable_grad()

    chunks_seen = []
    encoders, loss = Wrapped().double(), make()

    def encode(chunk):
        if torch.is_grad_enabled():
            chunks_seen.append(chunk)
        return encoders(chunk)

    cached_gradient_step(encode, split(inputs(6), [2, 2, 2]), loss, no_sync=[encoders])
    assert entered == [0, 1]


def test_bad_cached_steps():
    encoders, loss = Encoders().double(), make()
    with pytest.raises(SettingsError, match="at least one chunk"):
        cached_gradient_step(encoders, [], loss)
    first, second = split(inputs(6), [3, 3])
    del second["rna"]
    with pytest.raises(SettingsError, match="chunk 1 gives cnv, wsi"):
        cached_gradient_step(encoders, [first, second], loss)
    with pytest.raises(SettingsError, match="scalar"):
        cached_gradient_step(encoders, [first], lambda h: h["wsi"])
