"""The module command: the original's flags, exit codes, kills and Ctrl-C in a process of its own."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from warm_process import Started

from exaonepath.encoders import loading
from exaonepath.encoders.loading import LoadedEncoder
from exaonepath.feature_extraction import extract_single_slide_feature as command
from exaonepath.files.features import read_features

ALWAYS = 10**9


@pytest.fixture
def stub_weights(monkeypatch, encoder) -> list[str]:
    """Weights load at once, and are the small encoder; the list tells what was asked for."""
    asked: list[str] = []

    def load(weights, *, device="cpu"):
        asked.append(weights)
        return LoadedEncoder(encoder, weights, "f" * 64, weights.startswith("random:"))

    monkeypatch.setattr(loading, "load_patch_encoder", load)
    return asked


@pytest.fixture
def arguments(slide_path, patches_h5, tmp_path) -> list[str]:
    out = str(tmp_path / "out.h5")
    return ["--slide_path", str(slide_path), "--coords_h5_path", str(patches_h5), "--out_h5_path", out]


def test_the_flags_of_the_original(arguments, stub_weights, tmp_path, coords, capsys):
    assert command.main([*arguments, "--batch_size_per_gpu", "8", "--repo_id", "some/repo", "--device", "cpu"]) == 0
    assert stub_weights == ["some/repo"]
    stored = read_features(tmp_path / "out.h5", expected_dim=768)
    assert np.array_equal(stored.coords, coords)
    assert stored.attrs["weights"] == "some/repo"
    output = capsys.readouterr()
    assert "out.h5" in output.out
    assert output.err == ""


def test_dashes_and_the_default_weights(arguments, stub_weights, tmp_path):
    assert command.main([a.replace("_", "-") if a.startswith("--") else a for a in arguments]) == 0
    assert stub_weights == ["LGAI-EXAONE/EXAONE-Path-2.5"]
    assert command.main([*arguments, "--weights", "random:3"]) == 0


def test_random_weights_are_announced(arguments, stub_weights, capsys):
    assert command.main([*arguments, "--weights", "random:3"]) == 0
    assert "random weights" in capsys.readouterr().err


def test_a_second_run_says_that_nothing_was_done(arguments, stub_weights, capsys):
    command.main(arguments)
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert "already there" in capsys.readouterr().out


def test_quiet(arguments, stub_weights, capsys):
    assert command.main([*arguments, "--weights", "random:3", "--quiet"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_unreadable_patches_have_an_exit_code(arguments, stub_weights, coords, bad_reads, capsys):
    bad_reads[tuple(coords[4].tolist())] = ALWAYS
    assert command.main(arguments) == 3
    message = capsys.readouterr().err
    assert f"1 of {len(coords)} patches" in message
    assert "out.h5" in message
    bad_reads.clear()
    assert command.main(arguments) == 0


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--slide_path", "absent.svs", "absent.svs: no such file"),
        ("--slide_path", __file__, "not a slide"),
        ("--coords_h5_path", "absent.h5", "absent.h5: no such file"),
        ("--coords_h5_path", __file__, "cannot be read as HDF5"),
        ("--resize", "100", "black frame"),
        ("--batch_size_per_gpu", "0", "batch size"),
        ("--num_workers", "-1", "threads"),
        ("--dtype", "int7", "int7"),
        ("--device", "tricorder", "tricorder"),
    ],
)
def test_errors_are_one_line(arguments, stub_weights, capsys, flag, value, says):
    assert command.main([*arguments, flag, value]) == 1
    message = capsys.readouterr().err
    assert says in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize("wrong", [["--no_such_flag"], ["--resize", "big"]])
def test_wrong_usage(arguments, wrong):
    with pytest.raises(SystemExit) as exit_info:
        command.main([*arguments, *wrong])
    assert exit_info.value.code == 2


def test_verbose_shows_where(arguments, stub_weights, capsys, caplog):
    assert command.main([*arguments, "-v", "--resize", "100"]) == 1
    assert "Traceback" in caplog.text


# In a process of its own

SLOW = textwrap.dedent(
    """
    import sys, time
    import torch
    from exaonepath.feature_extraction import extract_single_slide_feature as command
    from exaonepath.encoders import loading

    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1)

    loading.load_patch_encoder = lambda weights, device: loading.LoadedEncoder(Slow(), weights, "f", False)
    sys.exit(command.main(sys.argv[1:]))
    """
)


@pytest.fixture
def start(warm_package, tmp_path):
    """`start(arguments)`: the command in a process of its own, with an encoder that takes its time."""
    options = ("--device", "cpu", "--batch_size_per_gpu", "2")
    return lambda arguments: warm_package.start(SLOW, *arguments, *options, cwd=tmp_path)


def wait_for_rows(process: Started, partial: Path) -> None:
    """Until a few batches are in the partial file."""
    end = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 5 * 2 * 768 * 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no rows within a minute"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_and_interrupted_then_resumed_to_the_same_bits(start, arguments, tmp_path, monkeypatch, capsys):
    out, partial = tmp_path / "out.h5", tmp_path / ".out.h5.part"
    killed = start(arguments)
    wait_for_rows(killed, partial)
    killed.kill()
    killed.communicate()
    assert not out.exists()
    size = partial.stat().st_size

    interrupted = start([*arguments, "-v"])
    end = time.monotonic() + 60
    while partial.stat().st_size < size + 4 * 2 * 768 * 4:
        assert interrupted.poll() is None, interrupted.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    interrupted.send_signal(signal.SIGINT)
    _, message = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert "resuming after" in message
    assert "the same command resumes" in message
    assert not out.exists()

    # The end, and the undisturbed run to compare with, in this process: starting one takes seconds.
    class Quick(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1)

    loaded = LoadedEncoder(Quick(), command.DEFAULT_WEIGHTS, "f", False)
    monkeypatch.setattr(loading, "load_patch_encoder", lambda weights, device: loaded)
    options = ["--device", "cpu", "--batch_size_per_gpu", "2"]
    assert command.main([*arguments, *options]) == 0
    assert "from an earlier run" in capsys.readouterr().out
    assert not partial.exists()
    assert command.main([*arguments, *options, "--out_h5_path", str(tmp_path / "whole.h5")]) == 0
    one, two = read_features(out), read_features(tmp_path / "whole.h5")
    assert np.array_equal(one.features, two.features)
    assert np.array_equal(one.coords, two.coords)


def test_the_module_end_to_end(warm_package, slide_path, write_patches, coords, tmp_path):
    """The real encoder with random weights, started as `python -m` starts it."""
    some = coords[:5]
    arguments = ["--slide_path", str(slide_path), "--coords_h5_path", str(write_patches(some)), "--out_h5_path", "o.h5"]
    module = "exaonepath.feature_extraction.extract_single_slide_feature"
    options = [*arguments, "--repo_id", "random:0", "--device", "cpu", "--batch_size_per_gpu", "4"]
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = warm_package.run(code, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stderr
    stored = read_features(tmp_path / "o.h5", expected_dim=768)
    assert np.array_equal(stored.coords, some)
    assert len(np.unique(stored.features, axis=0)) == 5
