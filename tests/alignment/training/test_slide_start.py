"""The start of the slide encoder: it finds a planted arrangement, changes nothing where it is off or no better, and a
stopped run that does it again is the same run."""

import contextlib
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.training import model_selection as selection_module
from exaonepath.alignment.training import starts
from exaonepath.alignment.training.closed_form_start import ClosedForm
from exaonepath.alignment.training.model_selection import ModelSelection
from exaonepath.alignment.training.presets import resolve_settings
from exaonepath.alignment.training.run import prepare, train
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.alignment.training.settings import build_settings
from exaonepath.alignment.training.slide_start import SlideTargets, can_learn, teach_slide_encoder
from exaonepath.alignment.training.starts import with_noise
from exaonepath.errors import ConfigError, SettingsError
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

WSI_CFG = {
    "embed_dim": 16, "depth": 2, "num_heads": 2, "n_storage_tokens": 1, "ffn_layer": "swiglu", "attn_drop": 0.1,
    "pos_embed_rope_min_period": 2.0, "pos_embed_rope_max_period": 20.0,
}  # fmt: skip


def write_cohort(folder, patients, patches):
    dials = SyntheticCohortSettings(
        patients=patients, patches_per_slide=patches, feature_dim=8, rna=30, snp=10, cnv=12, methylation=20,
        missing={"snp": 0.2, "wsi": 0.1},
    )  # fmt: skip
    return write_synthetic_cohort(folder, dials)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small cohort, for all that does not have to learn."""
    return write_cohort(tmp_path_factory.mktemp("slide-start"), 60, 12)


def settings(folder, steps=2, model=None, **tables):
    base = {
        "data": {
            "mudata": str(folder / "cohort.h5mu"),
            "slides": str(folder / "slides.csv"),
            "labels": str(folder / "labels.csv"),
            "modalities": ["wsi", "rna", "methylation"],
        },
        "model": {"wsi": WSI_CFG, "projection_dim": 16, "slide_start_steps": steps, **(model or {})},
        "run": {"epochs": 1, "batch_size": 32, "device": "cpu", "tensorboard": False, "monitor": False},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table}
    return build_settings(base)


def spatial(folder, patients):
    labels = pd.read_csv(folder / "labels.csv", index_col=0)["spatial"]
    states = sorted(labels.dropna().unique())
    return np.array([-1.0 if labels[patient] == states[0] else 1.0 for patient in patients], np.float32)


def teach(prepared, targets, after_step=lambda row: False):
    return teach_slide_encoder(
        prepared.model, prepared.data, targets, prepared.settings, prepared.processes,
        steps=prepared.settings.model.slide_start_steps, autocast=contextlib.nullcontext, half=False,
        after_step=after_step,
    )  # fmt: skip


def outputs(prepared, patients):
    """The slide encoder's output of those who have a slide, and their ids."""
    data = prepared.data
    _, batch = next(iter(data.evaluation_batches(patients, list(range(len(patients))), len(patients))))
    prepared.model.eval()
    with torch.no_grad():
        h = prepared.model.embed(batch)["wsi"][:, data.cohort.slides.dim :]
    has = batch.available["wsi"]
    return h[has].numpy(), [patient for patient, flag in zip(patients, has.tolist(), strict=True) if flag]


def test_it_learns_what_only_the_arrangement_shows(tmp_path):
    """Targets are the planted state, which is not in the mean features; its value on patients that were not used."""
    folder = write_cohort(tmp_path, 160, 48)
    wide = {"wsi": {**WSI_CFG, "embed_dim": 32, "attn_drop": 0.0}}
    prepared = prepare(settings(folder, 80, wide, optimizer={"lr": 6e-3}))
    _, patients = outputs(prepared, prepared.data.train)
    targets = SlideTargets(tuple(patients), torch.from_numpy(spatial(folder, patients))[:, None])
    rows = []
    assert teach(prepared, targets, lambda row: rows.append(row) or False)
    assert [row["slide_step"] for row in rows] == list(range(1, 81))
    assert {row["step"] for row in rows} == {0}
    x, _ = outputs(prepared, patients)
    y, others = outputs(prepared, prepared.data.validation + prepared.data.split["test"])
    centre = x.mean(0)
    covariance = (x - centre).T @ (x - centre) / len(x) + 1e-2 * np.eye(x.shape[1])
    weights = np.linalg.solve(covariance, (x - centre).T @ targets.values[:, 0].numpy())
    hits = np.sign((y - centre) @ weights) == spatial(folder, others)
    # 44 patients; guessing has 0.5 +- 0.08.
    assert hits.mean() > 0.8


def test_targets_are_the_shared_factors_of_patients_with_a_slide(folder):
    prepared = prepare(settings(folder))
    start = ClosedForm(prepared.model, prepared.data, prepared.settings.model)
    targets = SlideTargets.of(start, prepared.data, prepared.processes)
    assert set(targets.patients) == set(outputs(prepared, prepared.data.train)[1])
    assert targets.values.shape == (len(targets.patients), next(iter(start.further.values())).shape[1])
    np.testing.assert_allclose(targets.values.mean(0), 0, atol=1e-6)
    assert float(targets.values.std(0, correction=0).max()) == pytest.approx(1, abs=1e-5)
    start.further = {}
    assert SlideTargets.of(start, prepared.data, prepared.processes) is None


def run(folder, out, steps=2, **tables):
    """Weights and metrics of a run."""
    train(settings(folder, steps, **tables), out)
    return load_file(out / "model" / "model.safetensors"), RunFolder(out).metrics()


def test_off_and_no_better_are_the_same_run(folder, tmp_path, monkeypatch):
    """Bit for bit, weights and metrics: the phase leaves nothing behind if validation patients are against it."""
    off, plain = run(folder, tmp_path / "off", steps=0)
    monkeypatch.setattr(ModelSelection, "score_and_margin", _answers(ModelSelection.score_and_margin, -1.0, -1.0))
    rejected, rows = run(folder, tmp_path / "rejected")
    assert all(torch.equal(value, rejected[name]) for name, value in off.items())
    own = [row for row in rows if row["kind"] == "slide_start"]
    assert [row.get("slide_step") for row in own] == [1, 2, None, 1, 2, 3, 4, None]  # once more, and longer
    assert [(row["finished"], row["kept"], row["score"]) for row in own if "kept" in row] == [(True, False, -1.0)] * 2
    assert [row for row in rows if row["kind"] != "slide_start"] == plain


def _answers(plain, *first):
    """`ModelSelection.score_and_margin` with given scores at first; later ones are of the closed form after the last
    step."""
    left = list(first)
    return lambda self: (left.pop(0), 0.1) if left else plain(self)


@pytest.mark.parametrize(
    ("scores", "attempts", "lengths"),
    [
        ((2.0, 2.1), 1, [2]),  # clearly better: no second attempt
        ((-1.0, 2.0), 2, [2, 4]),
        ((0.0, 0.05), 2, [2, 4]),  # the start has 0.0: no more than the margin better, but better
        ((0.05, 0.0), 2, [2, 4]),
    ],
)
def test_the_better_attempt_is_the_start(folder, tmp_path, monkeypatch, scores, attempts, lengths):
    """Bit for bit the start of a run with one attempt of that length: nothing of the other one is left."""
    tables = {"run": {**settings(folder).as_dict()["run"], "steps": 1, "epochs": 0}}
    plain, retrieval = ModelSelection.score_and_margin, selection_module.retrieval_metrics

    def start_of(out, steps, *answers):
        monkeypatch.setattr(selection_module, "retrieval_metrics", _constant(retrieval))
        monkeypatch.setattr(ModelSelection, "score_and_margin", _answers(plain, *answers))
        return run(folder, out, steps=steps, **tables)

    found, rows = start_of(tmp_path / "two", 2, *scores)
    attempted = [row for row in rows if "kept" in row]
    assert [row["slide_steps"] for row in attempted] == lengths
    assert len(attempted) == attempts
    better = lengths[int(np.argmax(scores[:attempts]))]
    one, _ = start_of(tmp_path / "one", better, 9.0)
    assert all(torch.equal(value, found[name]) for name, value in one.items())


def _constant(plain):
    """Validations are all the same."""
    return lambda pairs: ({**plain(pairs)[0], "mean_recall@1": 0.0}, plain(pairs)[1])


def test_a_better_start_is_the_start_and_the_best_model(folder, tmp_path, monkeypatch):
    best = []
    plain = RunFolder.save_model
    monkeypatch.setattr(RunFolder, "save_model", lambda self, model, target: (
        best.append((target.name, {k: v.clone() for k, v in model.state_dict().items()})), plain(self, model, target)
    ))  # fmt: skip
    monkeypatch.setattr(selection_module, "retrieval_metrics", _rising(selection_module.retrieval_metrics))
    _, rows = run(folder, tmp_path / "run")
    validations = [row for row in rows if row["kind"] == "validation"]
    found = [(row["step"], row.get("slide_start", False)) for row in validations]
    assert found[:3] == [(0, False), (0, True), (1, False)]
    assert next(row for row in rows if "kept" in row)["kept"]
    assert [name for name, _ in best][:2] == ["best", "best"]
    moved = [name for name, value in best[0][1].items() if not torch.equal(value, best[1][1][name])]
    assert any(name.startswith("slide_encoder") and "norm" not in name for name in moved)


def _rising(plain):
    """Every validation is better than the one before."""
    calls = []

    def metrics(pairs):
        calls.append(0)
        flat, scores = plain(pairs)
        return {**flat, "mean_recall@1": float(len(calls))}, scores

    return metrics


def test_stopped_before_the_first_checkpoint_it_is_done_again(folder, tmp_path, monkeypatch):
    """By a signal in this phase, then by an exception in the first step: nothing is stored, and the third call is an
    uninterrupted run, log included, whatever reads the slides."""
    plain = selection_module.retrieval_metrics
    whole, halted = tmp_path / "whole", tmp_path / "halted"

    def run(out, progress=None, report=None, **tables):
        monkeypatch.setattr(selection_module, "retrieval_metrics", _rising(plain))
        return train(settings(folder, **tables), out, progress=progress, report=report)

    def in_this_phase(text):
        if text.startswith("start of the slide encoder: step 1/2"):
            os.kill(os.getpid(), signal.SIGTERM)

    def in_the_first_step(step, total, row):
        if step == 1:
            raise KeyboardInterrupt

    run(whole)
    stopped = run(halted, report=in_this_phase)
    assert (stopped.step, stopped.finished) == (0, False)
    with pytest.raises(KeyboardInterrupt):
        run(halted, in_the_first_step)
    assert not list(halted.glob("checkpoints/step-*"))
    several = {**settings(folder).as_dict()["run"], "num_workers": 1}
    done = run(halted, run=several)
    assert (done.finished, done.resumed_from) == (True, 0)
    assert (whole / "metrics.jsonl").read_text() == (halted / "metrics.jsonl").read_text()
    one, two = (load_file(path / "model" / "model.safetensors") for path in (whole, halted))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_output_that_is_not_finite_is_no_start(folder, tmp_path, monkeypatch, caplog):
    """Finite weights, but an output that overflows: the run is the one without these steps."""
    off, _ = run(folder, tmp_path / "off", steps=0)

    def overflow(model, *arguments, **settings):
        with torch.no_grad():
            model.slide_encoder.transformer.norm.weight.fill_(3e38)
        return True

    monkeypatch.setattr(starts, "teach_slide_encoder", overflow)
    found, rows = run(folder, tmp_path / "on")
    assert all(torch.equal(value, found[name]) for name, value in off.items())
    attempts = [row for row in rows if "kept" in row]
    assert [row["kept"] for row in attempts] == [False, False]
    assert "not finite for all patients" in caplog.text


def test_noise_on_the_output_of_training_patients():
    """Of the output alone, with its covariance; the same at every call; nothing breaks where there is no variation."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4000, 3)) @ rng.normal(size=(3, 8))  # five mean features, three outputs, correlated
    profiles = Profiles(tuple(f"P{at}" for at in range(4000)), values.astype(np.float32))
    noisy = with_noise(profiles, 5, 1)
    np.testing.assert_array_equal(noisy.values[:, :5], profiles.values[:, :5])
    plain, more = (np.cov(x.values, rowvar=False) for x in (profiles, noisy))
    error = 4 * np.abs(plain).max() / np.sqrt(4000) * 2
    np.testing.assert_allclose(more[5:, 5:], 2 * plain[5:, 5:], atol=error)
    np.testing.assert_allclose(more[:5, 5:], plain[:5, 5:], atol=error)
    np.testing.assert_array_equal(noisy.values, with_noise(profiles, 5, 1).values)
    assert not np.array_equal(noisy.values, with_noise(profiles, 5, 2).values)
    again = with_noise(Profiles(profiles.patients, profiles.values * np.float32(1 + 1e-6)), 5, 1)
    np.testing.assert_allclose(again.values, noisy.values, atol=1e-4)  # a rounding error stays one
    for odd in (np.ones((4, 6), np.float32), np.ones((1, 6), np.float32), np.ones((4, 5), np.float32)):
        ids = tuple(str(at) for at in range(len(odd)))
        np.testing.assert_array_equal(with_noise(Profiles(ids, odd), 5, 0).values, odd)


def test_averaged_weights_start_from_the_start(folder, tmp_path):
    """The first validations of a run with averaged weights are those of the same run without."""
    _, plain = run(folder, tmp_path / "plain")
    _, averaged = run(folder, tmp_path / "averaged", optimizer={"ema": 0.9})
    first = [[row for row in rows if row["kind"] == "validation" and not row["step"]] for rows in (plain, averaged)]
    assert first[0] == first[1] != []


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(folder, tmp_path, precision):
    """Gradients in float16 are scaled: the encoder moves, by steps whose loss is that of float32 to half precision."""
    losses = []
    for name in ("float32", precision):
        part = {"device": "cpu", "tensorboard": False, "batch_size": 32, "steps": 1, "precision": name}
        _, rows = run(folder, tmp_path / name, 4, run=part)
        assert next(row for row in rows if "kept" in row)["finished"]
        losses.append([row["loss"] for row in rows if "slide_step" in row and row["slide_steps"] == 4])
    assert len(losses[1]) == 4
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)


def test_one_molecular_modality_and_no_slides_have_nothing_to_learn(folder, tmp_path):
    """Two modalities share nothing beyond the slide: the run is the one without this phase."""
    part = {"data": {**settings(folder).as_dict()["data"], "modalities": ["wsi", "rna"]}}
    off, _ = run(folder, tmp_path / "off", steps=0, **part)
    found, rows = run(folder, tmp_path / "on", **part)
    assert all(torch.equal(value, found[name]) for name, value in off.items())
    assert not [row for row in rows if row["kind"] == "slide_start"]
    part["data"]["modalities"] = ["rna", "methylation"]
    prepared = prepare(settings(folder, model={"wsi": {}}, **part))
    assert not can_learn(prepared.model, prepared.settings)


def test_a_frozen_slide_encoder_is_left_alone(folder):
    prepared = prepare(settings(folder, model={"frozen": ["wsi"]}))
    assert not can_learn(prepared.model, prepared.settings)


def test_a_gradient_that_is_not_finite_ends_it(folder, caplog):
    prepared = prepare(settings(folder))
    _, patients = outputs(prepared, prepared.data.train)
    assert not teach(prepared, SlideTargets(tuple(patients), torch.full((len(patients), 1), float("inf"))))
    assert "the run starts without it" in caplog.text


def test_settings(folder):
    with pytest.raises(ConfigError, match="slide_start_steps must not be negative"):
        settings(folder, -1)
    with pytest.raises(ConfigError, match=r"slide_start_steps needs model\.start = cca"):
        settings(folder, model={"start": "random"})
    data = prepare(settings(folder)).data
    with pytest.raises(SettingsError, match="preset published"):
        resolve_settings(settings(folder, model={"preset": "published"}), data)
    unset = {"slide_start_steps": None}
    found = [
        resolve_settings(settings(folder, model=unset, run={"device": "cpu", "epochs": n}), data) for n in (0, 2, 500)
    ]
    steps_of_epoch = len(data.train) // found[0].run.batch_size
    assert [each.model.slide_start_steps for each in found] == [
        80,
        2 * steps_of_epoch,
        80,
    ]  # at most as many as the run
    assert resolve_settings(found[0], data) == found[0]
    published = resolve_settings(settings(folder, model={"preset": "published", "slide_start_steps": None}), data)
    assert published.model.slide_start_steps == 0
