"""Two processes train as one does, and what must be said across processes is said."""

import json
import os
import socket

import torch
from safetensors.torch import load_file

from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.run_folder import RunFolder

SCRIPT = """
import json, sys, warnings
from exaonepath.alignment.training.run import train
from exaonepath.alignment.training.settings import build_settings
from exaonepath.alignment.training.distributed import Processes
import torch, torch.distributed as dist

settings = build_settings(json.loads(open("settings.json").read()))
result = train(settings, "two")
assert result.finished and dist.get_world_size() == 2
started = train(build_settings(json.loads(open("started.json").read())), "two-started")
assert started.finished

processes = Processes(dist.get_rank(), 2, torch.device("cpu"))
assert processes.any_true(processes.rank == 1) and not processes.any_true(False)
# A parameter that one process has no gradient for, one that nobody has, and a bucket border between two.
a, b, c = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
a.grad = torch.full((3,), float(processes.rank + 1))
b.grad = torch.ones(3) if processes.rank == 1 else None
processes.sum_gradients([a, b, c])
assert a.grad.tolist() == [3.0] * 3 and b.grad.tolist() == [1.0] * 3 and c.grad is None
dist.destroy_process_group()
"""


def test_two_processes_equal_one(warm_package, make_settings, tmp_path):
    """Chunks of 3 from batches of 9: two for one process, one for the other; dropout on; one log, one set of files."""
    settings = make_settings(
        optimizer={"lr": 1e-3, "warmup": 1},
        run={"steps": 3, "batch_size": 9, "chunk_size": 3, "device": "cpu", "tensorboard": False, "monitor": False},
    )
    train(settings, tmp_path / "one")
    (tmp_path / "settings.json").write_text(json.dumps(settings.as_dict()))
    # The same with a start in closed form and a start of the slide encoder.
    started = make_settings(
        model={**settings.as_dict()["model"], "start": "cca", "slide_start_steps": 2}, loss={},
        run={"steps": 1, "batch_size": 9, "chunk_size": 3, "device": "cpu", "tensorboard": False, "monitor": False},
    )  # fmt: skip
    train(started, tmp_path / "one-started")
    (tmp_path / "started.json").write_text(json.dumps(started.as_dict()))
    # What torchrun sets for the two processes that it starts.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", **meet}
    ranks = [
        warm_package.start(SCRIPT, cwd=tmp_path, env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    # Sums are formed in another order: float32 rounding of gradients, 1e-6 relative, which Adam's first steps turn into
    # as much of the learning rate where a gradient is near 0; 3 steps of 1e-3.
    for name, tensor in one.items():
        if name.endswith("attn.qkv.bias"):
            # What moves every score of a query alike, softmax does not see: a bias of all keys where nothing is
            # rotated, and with rotation in the pairs that make whole turns from patch to patch (period 1). Its gradient
            # is nothing but rounding, of which Adam makes steps of full length.
            width = tensor.numel() // 3
            tensor[width : 2 * width] = two[name][width : 2 * width] = 0
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-4, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    rows = [RunFolder(tmp_path / name).metrics() for name in ("one", "two")]
    assert [(r["kind"], r["step"]) for r in rows[0]] == [(r["kind"], r["step"]) for r in rows[1]]
    for a, b in zip(*rows, strict=True):
        if a["kind"] == "train":
            assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]
    found = [torch.tensor([r["mean_recall@5"] for r in part if r["kind"] == "validation"]) for part in rows]
    assert found[0].numel() > 0
    # A rank can flip between patients whose similarities are equal to rounding; one of some 50 queries.
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0)
    one, two = (
        [row for row in RunFolder(tmp_path / f"{name}-started").metrics() if row["kind"] == "slide_start"]
        for name in ("one", "two")
    )
    steps = [[row.get("slide_step") for row in rows] for rows in (one, two)]
    assert steps[0] == steps[1]
    assert steps[0] in ([1, 2, None], [1, 2, None, 1, 2, 3, 4, None])  # with a second attempt, or without
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"]
