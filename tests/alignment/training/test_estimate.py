"""The estimate of a dry run: it changes nothing, works for every kind of run, and adds up."""

from dataclasses import replace

import pytest
import torch

from exaonepath.alignment.training import estimate, probe
from exaonepath.alignment.training.estimate import Pass, RunEstimate
from exaonepath.alignment.training.run import estimate as estimate_prepared
from exaonepath.alignment.training.run import prepare, train
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.errors import DeviceMemoryError

KINDS = {
    "plain": {},
    "chunks": {"run": {"chunk_size": 4, "validate_every_steps": 1, "monitor": True, "num_workers": 1}},
    "no cache": {"data": {"cache_mb": 0, "max_patches": 9}},
    "no slides": {"data": {"modalities": ["rna", "cnv"]}},
    "only slides and rna": {"data": {"modalities": ["wsi", "rna"], "slides_per_step": "all"}},
    "no validation": {"data": {"validation_share": 0.0}},
    "steps": {"run": {"epochs": 0, "steps": 3, "validate_every": 0, "validate_every_steps": 2}},
    "float16": {"run": {"precision": "float16", "chunk_size": 5}},
    "closed form": {"model": {"start": "cca", "omics": {"embed_dim": 12, "ffn_ratio": 0.0}}},
}


@pytest.fixture
def settings(make_settings):
    def make(**changes):
        base = make_settings().as_dict()
        return make_settings(**{name: {**base[name], **table} for name, table in changes.items()})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_estimated_and_nothing_changes(settings, tmp_path, kind):
    chosen = settings(**KINDS[kind])
    prepared = prepare(chosen)
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    state = torch.get_rng_state()
    found = estimate_prepared(prepared, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.model.state_dict().items())
    assert all(parameter.grad is None for parameter in prepared.model.parameters())
    assert not list(tmp_path.iterdir())
    assert prepared.data.cache.n_opened == 0
    assert found.batches >= 1
    assert found.patients % found.batches == 0
    assert found.first.computing > 0
    assert found.seconds > 0
    assert found.host_bytes > 10 << 20
    assert found.device_bytes is None
    assert (found.validation is None) == (kind == "no validation")
    assert found.hit_share == {"no slides": None, "no cache": 0.0}.get(kind, 1.0)
    text = found.summary()
    assert f"estimated from {found.batches} batches of {found.patients // found.batches} patients" in text
    assert "nan" not in text
    # The number of validations is that of the run.
    train(chosen, tmp_path / "run")
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "validation"]
    # These are only there if the start of the slide encoder, or the closed form after the last step, is better.
    rows = [row for row in rows if not row.get("slide_start") and not row.get("refitted")]
    assert found.validations == len(rows) or kind == "no validation"


def test_training_after_a_probe_is_training_without_one(settings, tmp_path):
    chosen = settings(run={"epochs": 1})
    prepared = prepare(chosen)
    estimate_prepared(prepared, tmp_path / "a")
    train(chosen, tmp_path / "a")
    train(chosen, tmp_path / "b")
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_slow_model_is_measured_on_one_small_batch(settings, tmp_path, monkeypatch):
    prepared = prepare(settings(run={"chunk_size": 5}))
    ticks = iter(range(0, 10**6, 100))  # every reading of the clock is 100 seconds later
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(ticks))
    found = estimate_prepared(prepared, tmp_path)
    assert (found.batches, found.patients) == (1, 4)
    assert found.first.computing == pytest.approx(100 / 4 * 20)


def test_a_device_that_is_too_small_is_an_error_with_advice(settings, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    prepared = prepare(settings())
    monkeypatch.setattr(probe, "accumulate_gradients", refuse)
    with pytest.raises(DeviceMemoryError, match=r"lower run\.chunk_size or data\.max_patches"):
        estimate_prepared(prepared, tmp_path)


def _estimate(**values):
    known = {
        "batches": 2, "patients": 16, "first": Pass(3, 2, 10), "later": Pass(1, 1, 10), "validation": Pass(0, 1, 4),
        "epochs": 5, "validations": 3, "hit_share": 0.5, "host_bytes": 10**9,
    }  # fmt: skip
    return RunEstimate(**{**known, **values})


def test_times_add_up():
    assert Pass(3, 2, 10).seconds == 15
    assert Pass(3, 2, 10, workers=1).seconds == 10
    assert Pass(30, 10, 10, workers=2).seconds == 20
    bounds = {
        (3, 2, 10, 0): "computing",
        (30, 2, 10, 1): "the disk",
        (2, 30, 10, 2): "decoding",
        (3, 3, 5, 1): "decoding",
    }
    assert {key: Pass(*key).bound for key in bounds} == bounds
    assert _estimate().seconds == 15 + 4 * 12 + 3 * 5
    assert _estimate(epochs=0.5, validation=None).seconds == 7.5
    assert "each other epoch" not in _estimate(epochs=1).summary()
    assert "each validation" not in _estimate(validation=None).summary()


def test_advice_and_warnings(monkeypatch):
    monkeypatch.setattr(estimate, "usable_processors", lambda: 4)
    monkeypatch.setattr(estimate, "available_host_memory", lambda: 2 * 10**9)
    assert "17% of an epoch is reading; with run.num_workers" in _estimate().summary()
    assert "is reading" not in _estimate(later=Pass(0.5, 0.5, 10)).summary()
    assert "is reading" not in _estimate(later=Pass(9, 9, 10, workers=1)).summary()
    assert "not enough memory" not in _estimate().summary()
    assert "warning: not enough memory" in _estimate(host_bytes=3 * 10**9).summary()
    assert "memory: about 1.0 GB, 2.0 GB available; of the GPU 8.0 GB" in _estimate(device_bytes=8 * 10**9).summary()
    monkeypatch.setattr(estimate, "available_host_memory", lambda: None)
    assert "memory: about 1.0 GB\n" in _estimate().summary() + "\n"
    monkeypatch.setattr(estimate, "usable_processors", lambda: 1)
    assert "is reading" not in _estimate().summary()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (7.26, "7.3 s"), (100, "100 s"), (600, "10 min"), (7200, "2 h"), (200_000, "2.3 days")],
)
def test_durations_are_read_by_people(seconds, text):
    assert estimate._duration(seconds) == text


def test_several_processes_are_not_measured(settings, tmp_path):
    prepared = prepare(settings())
    several = replace(prepared, processes=replace(prepared.processes, count=2))
    assert estimate_prepared(several, tmp_path) is None
