"""Validation between the ends of epochs: at the right steps, without an effect on weights, and equal after a resume."""

import json
import shutil
from dataclasses import replace

import pytest

from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.run_folder import RunFolder
from exaonepath.errors import SettingsError


@pytest.fixture
def settings(make_settings):
    """6 steps, 2 an epoch, with everything that has a state: dropout, chunks, averaged weights, monitors."""

    def make(**run):
        base = make_settings(
            optimizer={"ema": 0.9, "lr": 3e-3, "warmup": 2},
            run={
                "epochs": 3, "batch_size": 10, "chunk_size": 4, "device": "cpu", "tensorboard": False, "monitor": True,
                "checkpoint_every": 2, **run,
            },
        )  # fmt: skip
        return replace(base, data=replace(base.data, max_patches=12))

    return make


def content(folder):
    """Every file of the results, by name."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    return {**found, "metrics": (folder / "metrics.jsonl").read_bytes()}


def validated(folder):
    return [row["step"] for row in RunFolder(folder).metrics() if row["kind"] == "validation"]


def test_steps_are_validated_besides_epochs_and_weights_stay_the_same(settings, tmp_path):
    expected = {
        "plain": ({}, [2, 4, 6]),
        "three": ({"validate_every_steps": 3}, [2, 3, 4, 6]),
        "only": ({"validate_every_steps": 5, "validate_every": 0}, [5, 6]),
        "never": ({"validate_every_steps": 100, "validate_every": 0}, [6]),
    }
    found = {}
    for name, (run, steps) in expected.items():
        train(settings(**run), tmp_path / name)
        assert validated(tmp_path / name) == steps
        found[name] = content(tmp_path / name)
    trained = [name for name in found["plain"] if name.startswith(("model/", "checkpoints/"))]
    assert len(trained) >= 5
    for name in ("three", "only", "never"):
        assert all(found[name][file] == found["plain"][file] for file in trained)


@pytest.mark.parametrize(("killed_after", "workers"), [(3, 0), (5, 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, killed_after, workers):
    """The run is copied as a kill would leave it, with a validation between the checkpoint and the kill."""
    run = {"validate_every_steps": 3, "validate_every": 0, "checkpoint_every": 2, "num_workers": workers}
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def copy(step, total, row):
        if step == killed_after + 1:  # after the validation of the step before
            shutil.copytree(whole, killed)

    train(settings(**run), whole, progress=copy)
    assert validated(whole) == [3, 6]
    (killed / ".lock").unlink(missing_ok=True)
    resumed = train(settings(**{**run, "num_workers": 1 - workers}), killed)
    assert resumed.resumed_from == killed_after - 1
    assert content(killed) == content(whole)


def test_a_run_of_a_version_without_the_setting_is_resumed(settings, tmp_path):
    train(settings(), tmp_path / "run")
    file = tmp_path / "run" / "settings.json"
    stored = json.loads(file.read_text())
    del stored["settings"]["run"]["validate_every_steps"]
    file.write_text(json.dumps(stored))
    assert train(settings(), tmp_path / "run").finished
    with pytest.raises(SettingsError, match=r"other settings \(run\.validate_every_steps\)"):
        train(settings(validate_every_steps=2), tmp_path / "run")
    with pytest.raises(SettingsError, match="validate_every_steps must not be negative"):
        settings(validate_every_steps=-1)
