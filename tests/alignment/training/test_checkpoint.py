"""Checkpoints: whole or not there, damaged ones passed over, no pickle."""

import json

import pytest
import torch

from exaonepath.alignment.training.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from exaonepath.errors import OutputError, WeightsError
from exaonepath.files import atomic
from exaonepath.files.atomic import remove_abandoned


def save(folder, step, value=1.0, keep=2):
    return save_checkpoint(folder, step, {"model": {"w": torch.full((3,), value)}}, {"best": value}, keep=keep)


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    assert load_checkpoint(tmp_path / "none") is None
    for step in (5, 10, 100_000_000):
        save(tmp_path, step, float(step))
    found = load_checkpoint(tmp_path)
    assert (found.step, found.state) == (100_000_000, {"best": 1e8})
    assert torch.equal(found.tensors["model"]["w"], torch.full((3,), 1e8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-100000000"]
    assert {p.suffix for p in found.path.iterdir()} == {".safetensors", ".json"}


def test_a_killed_write_leaves_the_one_before(tmp_path, monkeypatch, abandoned):
    save(tmp_path, 1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).step == 1
    # What no handler could clean up, a real kill, is swept by the next run.
    left = tmp_path / abandoned("step-00000002")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path).step == 1
    remove_abandoned(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_one_flipped_bit_is_damage(tmp_path, name):
    """Also where the file still parses: the step count, a weight."""
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 31):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = load_checkpoint(tmp_path)
        assert found.step == 1
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path).step == 2


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    """The old folder is set aside, the new one has not got its name yet."""
    save(tmp_path, 1)
    target = save(tmp_path, 2, value=3.0)
    target.rename(atomic._set_aside(target))
    assert load_checkpoint(tmp_path).step == 2
    assert load_checkpoint(tmp_path).tensors["model"]["w"].tolist() == [3.0] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_damaged_one_is_passed_over_and_said(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    data = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(data[:-4])
    assert load_checkpoint(tmp_path).step == 1
    assert "step-00000002" in caplog.text
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(WeightsError, match=r"step-00000002.*step-00000001"):
        load_checkpoint(tmp_path)


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, 1.0)
    save(tmp_path, 3, 2.0)
    assert load_checkpoint(tmp_path).state == {"best": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save(tmp_path / "file", 1)


def test_optimizer_state_goes_round(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), {p: n for n, p in model.named_parameters()}

    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    model, optimizer, names = make()
    train(model, optimizer)
    path = save_checkpoint(tmp_path, 3, {"optimizer": optimizer_tensors(optimizer, names)}, {}, keep=1)
    assert json.loads((path / "state.json").read_text())["groups"] == ["optimizer"]
    again, other, other_names = make()
    again.load_state_dict(model.state_dict())
    restore_optimizer(other, other_names, load_checkpoint(tmp_path).tensors["optimizer"])
    train(model, optimizer)
    train(again, other)
    assert torch.equal(again.weight, model.weight)
    with pytest.raises(WeightsError, match="stranger"):
        restore_optimizer(other, other_names, {"stranger/step": torch.zeros(())})
