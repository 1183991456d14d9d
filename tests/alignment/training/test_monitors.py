"""Each monitor fires on the failure it is for, and none does on a healthy run."""

import json
import math

import numpy as np
import pytest
import torch

from exaonepath.alignment.metrics.retrieval import PairEmbeddings
from exaonepath.alignment.training.monitors import HealthMonitors, MonitorSettings, monitor_settings
from exaonepath.encoders.configuration import ExaonePathSlideEncoderConfig
from exaonepath.encoders.leakage import fragment_leakage
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel
from exaonepath.errors import SettingsError

NAMES = ("wsi", "rna", "snp", "cnv")
PAIRS = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]


def batch(seed, rows=64, width=32):
    """A healthy batch: a mean direction, as real embeddings have, and variation around it; equal pulls and losses."""
    g = torch.Generator().manual_seed(seed)
    embeddings = {name: torch.randn(rows, width, generator=g) + 0.5 for name in NAMES}
    gradients = {name: 0.01 * torch.randn(rows, width, generator=g) for name in NAMES}
    losses = {pair: 3 + torch.rand((), generator=g).item() for pair in PAIRS}
    return embeddings, gradients, losses


def observe(monitors, embeddings, gradients, losses, step=0, **kwargs):
    return monitors.observe(step, embeddings, gradients=gradients, pair_losses=losses, **kwargs)


def checks(warnings):
    return {(w.check, w.subject) for w in warnings}


def test_silent_on_a_healthy_run():
    monitors = HealthMonitors()
    for step in range(30):
        assert observe(monitors, *batch(step), step=step) == []
    metrics = monitors.metrics()
    assert {f"effective_rank/{n}" for n in NAMES} <= set(metrics)
    assert sum(metrics[f"gradient_share/{n}"] for n in NAMES) == pytest.approx(1)
    assert sum(metrics[f"loss_share/{a} x {b}"] for a, b in PAIRS) == pytest.approx(1)


@pytest.mark.parametrize("collapsed", ["one point", "a line", "nearly one point", "nan"])
def test_collapse(collapsed):
    embeddings, gradients, losses = batch(0)
    centre = torch.ones(32)
    embeddings["rna"] = {
        "one point": centre.expand(64, 32),
        "a line": torch.linspace(-1, 1, 64)[:, None] * centre,
        "nearly one point": centre + 0.1 * torch.randn(64, 32),
        "nan": torch.full((64, 32), math.nan),
    }[collapsed]
    assert checks(observe(HealthMonitors(), embeddings, gradients, losses)) == {("collapse", "rna")}


def test_rows_of_a_missing_modality_do_not_count():
    """Zeros stand where a modality is missing; they are no collapse."""
    embeddings, gradients, losses = batch(0)
    there = torch.arange(64) % 4 == 0
    embeddings["snp"] = embeddings["snp"] * there[:, None]
    assert observe(HealthMonitors(), embeddings, gradients, losses, availability={"snp": there}) == []
    embeddings["snp"] = torch.where(there[:, None], torch.ones(32), embeddings["snp"] + torch.randn(64, 32))
    found = observe(HealthMonitors(), embeddings, gradients, losses, availability={"snp": there})
    assert checks(found) == {("collapse", "snp")}


def test_dominant_modality():
    monitors = HealthMonitors()
    found = []
    for step in range(12):
        embeddings, gradients, losses = batch(step)
        gradients["cnv"] = gradients["cnv"] * 50
        found += observe(monitors, embeddings, gradients, losses, step=step)
    assert checks(found) == {("dominant_modality", "cnv")}
    assert found[0].value > 0.9
    assert found[0].step == MonitorSettings().warmup


def test_the_scale_of_an_embedding_is_no_dominance():
    """The loss normalises: twice the embedding halves the gradient, and nothing else changes."""
    monitors = HealthMonitors()
    for step in range(12):
        embeddings, gradients, losses = batch(step)
        embeddings["cnv"], gradients["cnv"] = embeddings["cnv"] / 1000, gradients["cnv"] * 1000
        assert observe(monitors, embeddings, gradients, losses, step=step) == []


def test_one_bad_batch_is_no_dominance():
    monitors = HealthMonitors()
    for step in range(20):
        embeddings, gradients, losses = batch(step)
        if step == 12:
            gradients["cnv"] = gradients["cnv"] * 50
        assert observe(monitors, embeddings, gradients, losses, step=step) == []


def test_dominant_pair():
    monitors, found = HealthMonitors(), []
    for step in range(12):
        embeddings, gradients, losses = batch(step)
        losses["wsi", "rna"] = 200.0
        losses["snp", "cnv"] = math.nan  # a pair without positives in this batch
        found += observe(monitors, embeddings, gradients, losses, step=step)
    assert checks(found) == {("dominant_pair", "wsi x rna")}


def retrieval_pairs(noise_of, present, names=NAMES, seed=0):
    """Pairs whose rows are a patient's latent plus noise by (patient, modality)."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(len(present), 16))
    rows = {m: [p for p, there in enumerate(present) if m in there] for m in names}
    embedding = {m: np.array([latent[p] + noise_of(p, m) * rng.normal(size=16) for p in rows[m]]) for m in names}
    return [
        PairEmbeddings(a, b, embedding[a], embedding[b], rows[a], rows[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]


def test_bias_against_patients_with_few_modalities():
    present = [NAMES if p % 2 else ("wsi", "rna") for p in range(160)]
    monitors = HealthMonitors()
    fair = retrieval_pairs(lambda p, m: 0.4, present)
    assert monitors.observe_retrieval(0, fair, dict(enumerate(present))) == []
    biased = retrieval_pairs(lambda p, m: 0.4 if p % 2 else 1.5, present)
    found = monitors.observe_retrieval(1, biased, dict(enumerate(present)))
    assert checks(found) == {("few_modalities", "2 modalities")}


def test_harder_pairs_and_a_handful_of_patients_are_no_bias():
    """Patients without RNA cannot take part in the easy pairs: fewer of them are found, through no fault of theirs."""
    present = [NAMES if p % 2 else ("wsi", "snp", "cnv") for p in range(160)]
    hard = retrieval_pairs(lambda p, m: 0.1 if m == "rna" else 1.0, present)
    monitors = HealthMonitors()
    assert monitors.observe_retrieval(0, hard, dict(enumerate(present))) == []
    assert monitors.metrics()["recall@1/3_modalities"] < 0.8 * monitors.metrics()["recall@1/4_modalities"]
    few = [NAMES if p >= 6 else ("wsi", "rna") for p in range(160)]
    unlucky = retrieval_pairs(lambda p, m: 0.4 if p >= 6 else 3.0, few)
    assert monitors.observe_retrieval(1, unlucky, dict(enumerate(few))) == []


def test_bias_against_a_rare_modality():
    present = [NAMES if p % 4 == 0 else NAMES[:3] for p in range(160)]
    monitors = HealthMonitors()
    fair = retrieval_pairs(lambda p, m: 0.4, present)
    assert monitors.observe_retrieval(0, fair, dict(enumerate(present))) == []
    biased = retrieval_pairs(lambda p, m: 4.0 if m == "cnv" else 0.3, present)
    assert ("rare_modality", "cnv") in checks(monitors.observe_retrieval(1, biased, dict(enumerate(present))))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ExaonePathSlideEncoderModel(
        ExaonePathSlideEncoderConfig(
            {"input_dim": 12, "embed_dim": 32, "depth": 4, "num_heads": 2, "ffn_layer": "swiglu"}
        )
    )


@pytest.fixture
def slide():
    g = torch.Generator().manual_seed(1)
    contour = torch.randint(0, 3, (60,), generator=g)
    return torch.randn(60, 12, generator=g), torch.randint(0, 20, (60, 2), generator=g) * 256, contour


def test_no_leakage_in_the_encoder(encoder, slide):
    encoder.train()
    leaks = fragment_leakage(encoder, *slide)
    assert [leak.block for leak in leaks] == [1, 3]
    assert all(leak.change == 0 and leak.tokens == 0 for leak in leaks)
    assert encoder.training
    assert HealthMonitors().observe_leakage(0, encoder, *slide) == []


def test_leakage_is_found(encoder, slide):
    """Block 3 gets the segments of whole slides in place of the fragments': the bug this monitor is for."""
    block = encoder.transformer.blocks[3]
    real = block.forward

    def leaky(x, segments, *rest, **kwargs):
        whole = type(segments).from_lengths(torch.tensor([x.shape[0]]))
        return real(x, whole, *rest, **kwargs)

    block.forward = leaky
    try:
        monitors = HealthMonitors()
        found = monitors.observe_leakage(7, encoder, *slide)
        largest = max(range(3), key=lambda c: int((slide[2] == c).sum()))
        outside = 60 - int((slide[2] == largest).sum()) + encoder.transformer.n_prefix
        leaks = fragment_leakage(encoder, *slide)
    finally:
        block.forward = real
    assert checks(found) == {("leakage", "block 3")}
    assert found[0].step == 7
    assert leaks[0].change == 0
    assert leaks[1].tokens == outside
    assert monitors.metrics()["leakage"] > 0


def test_a_slide_of_one_fragment_tells_nothing(encoder, slide):
    features, coords, contour = slide
    assert HealthMonitors().observe_leakage(0, encoder, features, coords, torch.zeros_like(contour)) == []
    with pytest.raises(SettingsError, match="at least two"):
        fragment_leakage(encoder, features, coords, torch.zeros_like(contour))


def test_a_warning_is_repeated_only_after_a_while(caplog):
    monitors = HealthMonitors(MonitorSettings(repeat_after=10))
    steps = []
    for step in range(21):
        embeddings, gradients, losses = batch(step)
        embeddings["rna"] = torch.ones(64, 32)
        steps += [w.step for w in observe(monitors, embeddings, gradients, losses, step=step)]
    assert steps == [0, 10, 20]
    assert sum("rna" in record.message for record in caplog.records) == 3


def test_a_resumed_run_warns_as_an_uninterrupted_one():
    def feed(monitors, steps):
        found = []
        for step in steps:
            embeddings, gradients, losses = batch(step)
            gradients["snp"] = gradients["snp"] * 50
            found += observe(monitors, embeddings, gradients, losses, step=step)
        return found

    whole = HealthMonitors()
    expected = feed(whole, range(9))
    first = HealthMonitors()
    found = feed(first, range(4))
    second = HealthMonitors()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + feed(second, range(4, 9)) == expected
    assert expected
    assert second.metrics() == whole.metrics()


def test_settings_are_checked():
    assert monitor_settings({"warmup": 3}).warmup == 3
    with pytest.raises(SettingsError, match="min_rank"):
        monitor_settings({"min_rank": 3})
    with pytest.raises(SettingsError, match="smoothing"):
        MonitorSettings(smoothing=1.5)
