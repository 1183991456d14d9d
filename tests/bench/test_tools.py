"""The tools around the benchmarks: plots draw what was measured, the tuner checks first, the script explains itself."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import plots
import pytest
import torch
import tune
import tune_loss
from exaonepath.kernels.launch_config import LaunchConfig, attention_config
from harness import table
from harness.problems import Problem

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_session.sh"
CARD = {"device": "cuda", "gpu": "NVIDIA Test 100", "dtype": "bfloat16"}


@pytest.fixture
def results(measured, encoded, tmp_path, monkeypatch):
    """A folder of rows of a synthetic card."""
    monkeypatch.setenv("OUT", str(tmp_path))
    for impl, rotation in (("exaonepath", "own"), ("flash_varlen", "separate"), ("dense_mask", "none")):
        for n, fragments, spread in [(1000, 1, "equal"), (4000, 1, "equal"), (4000, 9, "lognormal")]:
            for direction in ("forward", "backward"):
                shape = {"n": n, "fragments": fragments, "spread": spread, "direction": direction}
                table.append("attention", measured(impl=impl, rotation=rotation, **shape, **CARD))
        table.append("attention", measured(impl=impl, rotation=rotation, n=4000, **{**CARD, "dtype": "float32"}))
    for n in (1000, 4000):
        table.append("encoder", encoded(n=n, reserved_mb=n / 2, memory_limit_gb=12.0, **CARD))
    failed = {"status": "failed", "reason": "OutOfMemoryError: CUDA", **dict.fromkeys(("ms", "ms_p20", "ms_p80"))}
    table.append("encoder", encoded(impl="dense_mask", n=4000, memory_limit_gb=12.0, **CARD, **failed))
    for n in (512, 2048):
        for peer in ("naive", "chunked"):
            row = {
                "benchmark": f"test_loss[cuda-B{n}-{peer}]",
                "group": "sigmoid loss",
                "peer": peer,
                "rows": n,
                "dim": 256,
            }
            row |= {
                "seconds": n / 1e5,
                "baseline_seconds": n / 1e4,
                "peak_mb": 9.0,
                "baseline_peak_mb": None,
                "cores": 2,
            }
            machine = {"cpu": "x", "threads": 2, "python": "3", "torch": "2", "date": "2026-01-01", "commit": None}
            table.append("pipeline", {**row, **machine, "gpu": CARD["gpu"], "dtype": "bfloat16"})
    return tmp_path


def test_a_picture_a_question_for_the_machine_that_was_measured(results, tmp_path):
    written = plots.draw(tmp_path / "pictures", [results])
    assert sorted(path.name for path in written) == [
        f"bench-test-100-{question}.png" for question in ("error-dtype", "loss", "memory-n", "speed-f", "speed-n")
    ]
    for path in written:
        pixels = matplotlib.image.imread(path)[:, :, :3]
        ours = np.array([int(plots._STYLES["exaonepath"][0][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - ours).max(-1) < 0.02).sum() > 50, f"{path.name} does not show ours"


def test_nothing_measured_nothing_drawn(tmp_path):
    assert plots.draw(tmp_path / "pictures", [tmp_path]) == []


def test_failed_and_older_rows_are_not_drawn(measured):
    rows = [measured(ms=1.0, ms_p20=1.0), measured(ms=2.0)]
    assert plots.newest(rows, "impl", "n") == rows[1:]
    assert plots.speed_against_tokens([measured(status="failed"), measured(status="failed", n=2000)]) is None


def test_tuning_tries_eight_settings_and_those_in_use_first():
    config = attention_config((9, 0), 2, 64)
    for kernel in tune.SETTINGS:
        base = getattr(config, kernel)
        tried = tune.candidates(base, kernel)
        assert tried[0] == base
        assert len(set(tried)) == len(tried) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves where no GPU is")
@pytest.mark.parametrize("kernel", tune.SETTINGS)
def test_tuning_runs_what_it_says_it_runs(kernel, monkeypatch):
    problem = Problem(40, 2, "equal", torch.float32, "cpu", heads=1, head_dim=32)
    bench = tune.Bench(problem, True, kernel)
    settings = [LaunchConfig(32, 32, 4, 1), LaunchConfig(16, 16, 4, 1, True), LaunchConfig(64, 32, 4, 1)]
    seen = []
    launch = tune.Bench.launch
    monkeypatch.setattr(tune.Bench, "launch", lambda self, setting: seen.append(setting) or launch(self, setting))
    rows = tune.sweep(bench, settings, float("inf"), {settings[2]: "it crashed"}, rounds=1)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert [row["current"] for row in rows] == [True, False, False]
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in rows[:2])
    assert seen == 2 * settings[:2]  # checked, then timed
    assert tune.prepare(kernel, settings[0], problem, True) is None
    assert "power of 2" in tune.prepare(kernel, LaunchConfig(48, 32, 4, 1), problem, True)


def test_tuning_does_not_time_what_is_wrong(monkeypatch):
    problem = Problem(8, 1, "equal", torch.float32, "cpu", heads=1, head_dim=32)
    bench = tune.Bench(problem, False, "forward")
    monkeypatch.setattr(tune.Bench, "error", lambda *_: 1.0)
    (row,) = tune.sweep(bench, [LaunchConfig(32, 32, 4, 1)], float("inf"), {}, rounds=1)
    assert (row["status"], row["ms"]) == ("wrong", None)


def test_tiles_of_the_loss_are_compared_and_kept_as_they_come(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tune_loss.py", "--device", "cpu"])
    tune_loss.main()
    rows = table.read("tune_loss", tmp_path)
    assert not any(table.problems_of("tune_loss", row) for row in rows)
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["part"] for row in rows] == ["plain product", "host", "sweep", "sweep", "kernels", "kernels"]
    assert "limit_share" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [(["--help"], 0, "--rehearse"), (["no-such-phase"], 2, "no phase is called"), (["fast"], 3, "no NVIDIA GPU")],
)
def test_the_session_script_explains_itself(arguments, status, text, tmp_path):
    # Only the plain tools, so that a GPU machine gives the same answers.
    for tool in ("bash", "sed", "dirname", "mkdir"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / tool).symlink_to(found)
    environment = {"PATH": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status, done.stderr
    assert text in done.stdout + done.stderr
