"""Whole runs: they end, resume exactly after a kill, stop at a signal, and refuse bad input before a step is taken."""

import json
import os
import signal

import h5py
import pytest
import torch
from safetensors.torch import load_file

from exaonepath.alignment.data.report import CohortError
from exaonepath.alignment.data.splits import Split
from exaonepath.alignment.model.alignment import ExaonePathAlignmentModel
from exaonepath.alignment.training.batch_plan import derive_seed
from exaonepath.alignment.training.data import standardizer_of
from exaonepath.alignment.training.run import check, prepare, train
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.alignment.training.step import TrainingError
from exaonepath.alignment.training.trainer import Trainer
from exaonepath.errors import (
    DeviceError,
    FileBusyError,
    OutputCollisionError,
    OutputError,
    SettingsError,
    WeightsError,
)

# Everything that has a state or a draw: dropout, chunks, averaged weights, one slide of several, sub-sampled patches.
FULL = {
    "data": {"max_patches": 12, "slides_per_step": "one"},
    "model": {
        "wsi": {
            "embed_dim": 16, "depth": 2, "num_heads": 2, "n_storage_tokens": 1, "ffn_layer": "swiglu", "attn_drop": 0.2,
        },
    },
    "optimizer": {"ema": 0.9, "clip": 0.5, "warmup": 2, "lr": 3e-3},
    "run": {
        "epochs": 3, "batch_size": 10, "chunk_size": 4, "device": "cpu", "checkpoint_every": 2, "tensorboard": False,
        "monitor": True,
    },
}  # fmt: skip


def files(folder):
    """Every tensor of a run's results by name, and its metrics."""
    tensors = {}
    for path in [*folder.glob("model/*.safetensors"), *sorted(folder.glob("checkpoints/*/*.safetensors"))]:
        for name, tensor in load_file(path).items():
            tensors[f"{path.relative_to(folder)}:{name}"] = tensor
    return tensors, (folder / "metrics.jsonl").read_text()


def same(a, b):
    (tensors, metrics), (other, other_metrics) = files(a), files(b)
    assert set(tensors) == set(other)
    assert len(tensors) > 100
    assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())
    assert metrics == other_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cohort_folder):
    """An uninterrupted run, made once: its folder and a function that makes its settings."""
    folder = tmp_path_factory.mktemp("run") / "plain"
    result = train(_settings(cohort_folder), folder)
    assert result.finished
    assert result.step == result.total == 6
    return folder


def _settings(cohort_folder):
    from exaonepath.alignment.training.settings import build_settings

    data = {
        "mudata": str(cohort_folder / "cohort.h5mu"),
        "slides": str(cohort_folder / "slides.csv"),
        "labels": str(cohort_folder / "labels.csv"),
        "validation_share": 0.2,
        "test_share": 0.1,
    }
    model = {"projection_dim": 8, "omics": {"embed_dim": 12, "ffn_ratio": 2.0, "dropout": 0.2}, **FULL["model"]}
    return build_settings({**FULL, "data": {**data, **FULL["data"]}, "model": model})


def test_a_run_leaves_what_it_promises(finished):
    assert {p.name for p in finished.iterdir() if not p.name.startswith(".")} == {
        "settings.json", "split.json", "cohort_report.json", "metrics.jsonl", "checkpoints", "best", "model",
    }  # fmt: skip
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "gradient_norm", "loss/wsi-rna", "t/wsi-rna", "effective_rank/wsi"} <= set(training[-1])
    validation = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in validation] == [2, 4, 6]
    assert {"wsi->rna@1", "rna->wsi@5", "wsi->rna@1/chance", "mean_recall@1"} <= set(validation[0])
    model = ExaonePathAlignmentModel.from_pretrained(str(finished / "model"))
    assert model.config.provenance["step"] == 6
    assert model.config.provenance["cohort_hash"] == json.loads((finished / "settings.json").read_text())["cohort_hash"]
    assert ExaonePathAlignmentModel.from_pretrained(str(finished / "best")).modalities == model.modalities
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    # The model carries what its inputs are made with.
    standardizer = standardizer_of(model)
    assert set(standardizer.scalings) == {"rna", "snp", "cnv", "methylation"}
    assert standardizer.scalings["rna"].transform == "cpm_log1p"
    assert standardizer.scalings["rna"].std.min() > 0


def test_killed_and_resumed_equals_uninterrupted(warm_package, finished, cohort_folder, tmp_path, abandoned):
    """SIGKILL after step 5: the run goes on from the checkpoint of step 4, bit for bit, log included."""
    code = f"""
import json, os, signal, sys, torch
torch.set_num_threads({torch.get_num_threads()})
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings
settings = build_settings(json.loads({json.dumps(json.dumps(_settings(cohort_folder).as_dict()))}))
train(settings, "killed", progress=lambda step, total, row: step == 5 and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = warm_package.run(code, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "killed"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) > 4
    assert not (folder / "model").exists()
    # A half-written line, and a half-written checkpoint, as a kill can leave them.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    (folder / "checkpoints" / abandoned("step-00000006")).mkdir()
    result = train(_settings(cohort_folder), folder)
    assert (result.resumed_from, result.step, result.finished) == (4, 6, True)
    same(folder, finished)
    assert not list(folder.glob("checkpoints/.*"))


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(finished, cohort_folder, tmp_path):
    def stop(step, total, row):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = train(_settings(cohort_folder), tmp_path / "run", progress=stop)
    assert (result.step, result.finished) == (3, False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    result = train(_settings(cohort_folder), tmp_path / "run")
    assert (result.resumed_from, result.finished) == (3, True)
    same(tmp_path / "run", finished)
    # Once finished, the same call finds nothing left to do.
    again = train(_settings(cohort_folder), tmp_path / "run")
    assert (again.resumed_from, again.finished) == (6, True)
    same(tmp_path / "run", finished)


def test_the_callers_random_numbers_and_reading_ahead_change_nothing(finished, cohort_folder, tmp_path):
    from dataclasses import replace

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    settings = _settings(cohort_folder)
    train(replace(settings, run=replace(settings.run, num_workers=1)), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)
    (tensors, _), (other, _) = files(tmp_path / "run"), files(finished)
    assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())


def test_a_folder_of_another_run_is_refused(finished, make_settings, tmp_path, cohort_folder):
    with pytest.raises(SettingsError, match=r"optimizer\.clip.*run\.chunk_size"):
        train(make_settings(), finished)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputCollisionError, match=r"notes\.txt"):
        train(make_settings(), tmp_path)
    with RunFolder(finished).locked(), pytest.raises(FileBusyError, match="another process"):
        train(_settings(cohort_folder), finished)
    other = json.loads((finished / "settings.json").read_text())
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({**other, "cohort_hash": "0"}))
    with pytest.raises(SettingsError, match="cohort has changed"):
        train(_settings(cohort_folder), folder)
    result = train(make_settings(run={"steps": 1, "batch_size": 10}), folder, overwrite=True)
    assert result.finished
    assert json.loads((folder / "settings.json").read_text())["cohort_hash"] == other["cohort_hash"]


def test_training_learns(make_settings, tmp_path):
    """More steps on the same few patients: the loss falls well below where it started."""
    settings = make_settings(
        run={"epochs": 30, "batch_size": 20, "validate_every": 0, "device": "cpu", "tensorboard": False},
        optimizer={"lr": 1e-2},
    )
    train(settings, tmp_path / "run")
    losses = [row["loss"] for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "train"]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"loss": {"kind": "softmax"}}, lambda m: m.config.loss == "softmax"),
        ({"loss": {"pairs": "wsi", "pos_weight": "balanced"}}, lambda m: len(m.trained_pairs) == 4),
        ({"model": {"rope_mode": "off", "gradient_checkpointing": True}}, lambda m: m.config.rope_mode == "off"),
        ({"data": {"modalities": ["rna", "cnv"]}}, lambda m: m.modalities == ("rna", "cnv")),
        ({"run": {"precision": "bfloat16", "steps": 2, "batch_size": 10, "chunk_size": 5}}, lambda m: True),
        ({"run": {"precision": "float16", "steps": 2, "batch_size": 10, "chunk_size": 5}}, lambda m: True),
    ],
    ids=["softmax", "wsi-anchored", "no-rope", "two-modalities", "bfloat16", "float16"],
)
def test_the_switches_of_ablations_train(make_settings, tmp_path, changes, check):
    base = {"run": {"steps": 2, "batch_size": 10, "validate_every": 0}}
    merged = {**base, **changes}
    settings = make_settings(**merged)
    settings = make_settings(**{**merged, "data": {**_paths(settings), **changes.get("data", {})},
                                "model": {**_model(settings), **changes.get("model", {})},
                                "run": {**_run(settings), **merged["run"]}})  # fmt: skip
    result = train(settings, tmp_path / "run")
    assert result.finished
    assert check(ExaonePathAlignmentModel.from_pretrained(str(tmp_path / "run" / "model")))


def _paths(settings):
    return {key: getattr(settings.data, key) for key in ("mudata", "slides", "labels", "validation_share")}


def _model(settings):
    return {key: getattr(settings.model, key) for key in ("wsi", "omics", "projection_dim")}


def _run(settings):
    return {"device": "cpu", "tensorboard": False, "monitor": True}


def test_frozen_encoders_keep_their_weights(make_settings, tmp_path):
    settings = make_settings(run={"steps": 3, "batch_size": 10, "device": "cpu", "tensorboard": False})
    model = {**_model(settings), "frozen": ["wsi", "rna"]}
    settings = make_settings(model=model, run={"steps": 3, "batch_size": 10, "device": "cpu", "tensorboard": False})
    before = prepare(settings).model.state_dict()
    train(settings, tmp_path / "run")
    after = ExaonePathAlignmentModel.from_pretrained(str(tmp_path / "run" / "model")).state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(("slide_encoder.", "omics.rna.")) for name in moved)
    assert any(name.startswith("omics.cnv.") for name in moved)
    with pytest.raises(SettingsError, match="no modality 'protein'"):
        prepare(make_settings(model={**_model(settings), "frozen": ["protein"]}))


def test_a_loss_that_diverges_stops_with_names_and_keeps_the_checkpoint(make_settings, tmp_path):
    settings = make_settings(
        run={"epochs": 3, "batch_size": 10, "checkpoint_every": 2, "device": "cpu", "tensorboard": False}
    )
    prepared = prepare(settings)
    folder = RunFolder(tmp_path)
    folder.claim(settings.as_dict(), "0", overwrite=False)
    trainer = Trainer(prepared.model, prepared.data, settings, folder, prepared.processes)

    def poison(step, total, row):
        if step == 3:
            with torch.no_grad():
                prepared.model.omics_encoder("cnv").proj.weight[0, 0] = torch.nan

    with pytest.raises(
        TrainingError, match=r"step 4: embeddings that are not finite: cnv of P0.*Patients of the step"
    ) as raised:
        trainer.run(poison)
    assert str(tmp_path / "checkpoints") in str(raised.value)
    kept = load_file(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values() if tensor.is_floating_point())
    assert not (tmp_path / "model").exists()


def test_fine_tuning_takes_the_models_own_features(finished, make_settings, tmp_path):
    base = make_settings()
    model = {"init": str(finished / "model"), "wsi": {}, "omics": {}}
    run = {"steps": 1, "batch_size": 10, "device": "cpu", "tensorboard": False}
    result = train(make_settings(model=model, run=run, data=_paths(base)), tmp_path / "run")
    assert result.finished
    stored = json.loads((finished / "model" / "config.json").read_text())
    stored["omics"]["rna"]["feature_names"][0] = "UNHEARD-OF"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps(stored))
    (foreign / "model.safetensors").write_bytes((finished / "model" / "model.safetensors").read_bytes())
    model = {**model, "init": str(foreign)}
    with pytest.raises(WeightsError, match="1 of 20 features of the model are not in the table: UNHEARD-OF"):
        prepare(make_settings(model=model, run=run, data=_paths(base)))
    prepared = prepare(make_settings(model={**model, "match_by_name": True}, run=run, data=_paths(base)))
    assert prepared.model.omics_encoder("rna").feature_names[0] == "UNHEARD-OF"


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"data": {"stratify": "stage"}}, SettingsError, "no label 'stage'; the cohort has .*subtype"),
        ({"data": {"modalities": ["rna", "protein"]}}, SettingsError, "the cohort has no protein"),
        ({"data": {"slides": "nowhere.csv"}}, CohortError, "nowhere.csv"),
        ({"data": {"mudata": "nowhere.h5mu"}}, CohortError, "nowhere.h5mu"),
        ({"data": {"tables": {"rna": {"format": "matrix"}}}}, SettingsError, "data.tables.rna.path is missing"),
        ({"data": {"tables": {"rna": {"path": "x", "scales": 1}}}}, SettingsError, "did you mean 'scale'"),
        ({"model": {"wsi": {"deepth": 2}}}, SettingsError, "'deepth'"),
        ({"model": {"omics": {"embed_dims": 2}}}, SettingsError, "did you mean 'embed_dim'"),
        ({"model": {"omics": {"protein": {"embed_dim": 2}}}}, SettingsError, "model.omics.protein: no such modality"),
        ({"model": {"omics": {"feature_names": ["a"]}}}, SettingsError, "follow from the cohort"),
        ({"model": {"slide_weights": "nobody/nothing-of-this-name", "wsi": {}}}, WeightsError, "nobody/nothing"),
        ({"loss": {"pair_weights": {"rna-wsi": 1.0}}}, SettingsError, "no pair 'rna-wsi'"),
        ({"run": {"device": "tpu"}}, DeviceError, "tpu"),
        ({"run": {"select": "wsi->dna@1"}}, SettingsError, "can select by mean_recall, wsi->rna"),
        ({"loss": {"pairs": "wsi"}, "run": {"select": "rna->snp@1"}}, SettingsError, "rna->snp@1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(make_settings, tmp_path, changes, error, named):
    base = make_settings()
    settings = make_settings(
        **{
            **changes,
            "data": {**_paths(base), **changes.get("data", {})},
            "model": {**_model(base), **changes.get("model", {})},
            "run": {**_run(base), "epochs": 1, **changes.get("run", {})},
        }
    )
    with pytest.raises(error, match=named):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_slide_and_a_split_that_leaves_nobody(make_settings, tmp_path, cohort_folder, drop_checksums):
    base = make_settings()
    features = tmp_path / "features.h5"
    slides = (cohort_folder / "slides.csv").read_text().splitlines()
    source = cohort_folder / slides[1].split(",")[2]
    features.write_bytes(source.read_bytes())
    with h5py.File(features, "r+") as file:
        file["features"][1, 1] = float("nan")
        drop_checksums(file)  # as another program would write it
    rows = [line.replace("features/", f"{cohort_folder}/features/") for line in slides]
    rows[1] = ",".join([*slides[1].split(",")[:2], str(features)])
    (tmp_path / "slides.csv").write_text("\n".join(rows) + "\n")
    patient = slides[1].split(",")[0]
    with pytest.raises(CohortError, match=f"patient {patient}.*NaN"):
        prepare(make_settings(data={**_paths(base), "slides": str(tmp_path / "slides.csv")}))
    Split({"train": ("P00001",), "val": ("P00002",)}).save(tmp_path / "split.json")
    with pytest.raises(SettingsError, match="1 patients to train on"):
        prepare(make_settings(data={**_paths(base), "split": str(tmp_path / "split.json")}))


def test_a_split_of_other_parts_or_other_patients_is_refused(make_settings, tmp_path):
    paths = {**_paths(make_settings()), "split": str(tmp_path / "split.json")}
    Split({"train": ("P00001", "P00002"), "validation": ("P00003",)}).save(tmp_path / "split.json")
    with pytest.raises(SettingsError, match="parts named validation; they must be train, val, test"):
        prepare(make_settings(data=paths))
    Split({"train": ("X1", "X2"), "val": ("X3",)}).save(tmp_path / "split.json")
    with pytest.raises(SettingsError, match="X1, X2, X3; none of them is in the cohort"):
        prepare(make_settings(data=paths))


@pytest.mark.parametrize("pairs", ["all", "wsi"])
def test_one_validation_patient_is_enough_and_none_with_a_slide_does_no_harm(make_settings, tmp_path, pairs):
    """With pairs of the slide only and nobody to validate who has one, nothing selects, and everything else goes on."""
    base = make_settings()
    cohort = prepare(base).data.cohort
    there = cohort.availability()
    without = [p for p, row in zip(cohort.patients, there, strict=True) if not row[0]]
    chosen = [p for p, row in zip(cohort.patients, there, strict=True) if row.all()] if pairs == "all" else without
    rest = tuple(p for p in cohort.patients if p != chosen[0])
    Split({"train": rest, "val": (chosen[0],), "test": ()}).save(tmp_path / "split.json")
    settings = make_settings(
        data={**_paths(base), "split": str(tmp_path / "split.json")}, model=_model(base), loss={"pairs": pairs},
        run={**_run(base), "epochs": 1, "monitor": True},
    )  # fmt: skip
    result = train(settings, tmp_path / "run")
    assert result.finished
    assert (result.best is None) == (pairs == "wsi")
    assert train(settings, tmp_path / "run").finished  # its checkpoint is read again


def test_a_dry_run_refuses_what_the_run_would_refuse(finished, make_settings, tmp_path, cohort_folder):
    check(_settings(cohort_folder), finished)
    with pytest.raises(SettingsError, match="holds a run of other settings"):
        check(make_settings(), finished)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(OutputCollisionError, match=r"thesis\.tex"):
        check(make_settings(), tmp_path / "full")
    with pytest.raises(OutputError):
        check(make_settings(), tmp_path / "full" / "thesis.tex" / "run")
    with pytest.raises(SettingsError, match="can select by"):
        check(make_settings(run={**_run(make_settings()), "select": "wsi->dna@1"}), tmp_path / "new")
    check(make_settings(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_slides_goes_on_with_a_cohort_that_has_some(make_settings, tmp_path, caplog):
    base = make_settings()
    molecular = {**_paths(base), "modalities": ["rna", "snp", "cnv", "methylation"]}
    first = make_settings(data=molecular, model=_model(base), run={**_run(base), "epochs": 1})
    train(first, tmp_path / "first")
    second = make_settings(
        data=_paths(base), model={"init": str(tmp_path / "first" / "model"), "wsi": {}, "omics": {}},
        run={**_run(base), "epochs": 1},
    )  # fmt: skip
    assert train(second, tmp_path / "second").finished
    assert "has no encoder for wsi" in caplog.text


def test_seeds_depend_on_every_part():
    seeds = {derive_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_float16_skips_an_overflow_and_lowers_its_factor(make_settings, tmp_path):
    """The factor 65,536 a float16 run starts with is the scaler's; a gradient that overflows moves no weight."""
    settings = make_settings(
        run={"steps": 2, "batch_size": 10, "precision": "float16", "device": "cpu", "tensorboard": False}
    )
    prepared = prepare(settings)
    folder = RunFolder(tmp_path)
    folder.claim(settings.as_dict(), "0", overwrite=False)
    trainer = Trainer(prepared.model, prepared.data, settings, folder, prepared.processes)
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    prepared.model.omics_encoder("rna").proj.weight.register_hook(lambda gradient: gradient * torch.inf)
    trainer.run()
    assert trainer.scaler.get_scale() == 65536 / 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.model.state_dict().items())
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text())["state"]
    assert state["scaler"]["scale"] == 65536 / 4
