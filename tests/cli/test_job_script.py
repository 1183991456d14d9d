"""--print-sbatch: a script that a shell accepts and that runs the same command."""

import os
import shlex
import subprocess

import pytest


@pytest.fixture
def slides(tmp_path):
    folder = tmp_path / "my slides; rm -rf $HOME"
    folder.mkdir()
    for name in ("a.svs", "b.svs", "-c.svs"):
        (folder / name).write_bytes(b"")
    return folder


def arguments_of(script, tmp_path):
    """What the script runs, found by running it with a stand-in in the place of the program."""
    last = script.splitlines()[-1]
    assert last.startswith("exec ")
    program = shlex.split(last)[1]
    stand_in = tmp_path / "bin" / "exaonepath"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text("#!/bin/sh\npwd\nprintf '%s\\n' \"$@\"\n")
    stand_in.chmod(0o755)
    script = script.replace(f"exec {shlex.quote(program)}", f"exec {shlex.quote(str(stand_in))}")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_script_runs_the_same_command(run, slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "--out", tmp_path / "it's out", "--weights", "random:0", "--remove", "pen", "--remove", "blur", "--no-contours",
        "-vv", "--overwrite", "--seg-downsample", "auto",
    ]  # fmt: skip
    done = run("encode", slides, *given, "--print-sbatch")
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "it's out").exists()
    directives = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=1-3" in directives
    assert "#SBATCH --gres=gpu:1" in directives
    where, command, *arguments = arguments_of(done.stdout, tmp_path)
    assert (where, command) == (str(tmp_path), "encode")
    expected = [str(part) for part in given if part != "-vv"]
    assert sorted(arguments) == sorted([*expected, "--verbose", "--verbose", str(slides)])
    # The printed command prints the same script again.
    again = run(command, *arguments, "--print-sbatch")
    assert again.stdout == done.stdout


def test_names_that_look_like_options_and_a_cpu(run, slides, tmp_path, monkeypatch):
    monkeypatch.chdir(slides)
    done = run("encode", "--device", "cpu", "--out", tmp_path / "o", "--print-sbatch", "--", "-c.svs", "a.svs")
    assert done.exit_code == 0, done.stderr
    assert "gpu" not in done.stdout
    assert arguments_of(done.stdout, tmp_path)[-3:] == ["--", "-c.svs", "a.svs"]


def test_no_device_is_needed_to_print_it(run, slides, tmp_path):
    done = run("encode", slides, "--out", tmp_path / "o", "--device", "cuda:63", "--shard", "2/4", "--print-sbatch")
    assert done.exit_code == 0, done.stderr
    assert "--device cuda:63" in done.stdout
    assert "--shard" not in done.stdout


def test_wrong_inputs_are_found_before_the_job_is_submitted(run, tmp_path):
    done = run("encode", tmp_path / "gone.svs", "--out", tmp_path / "o", "--print-sbatch")
    assert done.exit_code == 1
    assert done.stdout == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_the_shell_accepts_it(run, slides, tmp_path):
    script = run("encode", slides, "--out", tmp_path / "o", "--print-sbatch").stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
