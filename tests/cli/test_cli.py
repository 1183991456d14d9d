"""The command line as scripts see it: results on stdout, one line per error on stderr, exit codes."""

import fcntl
import os
import signal
import sys
import time

import h5py
import numpy as np
import pytest
import torch

from exaonepath.errors import SettingsError
from exaonepath.files.embeddings import read_embedding
from exaonepath.ops.extension import load_extension
from exaonepath.slides import encode as pipeline
from exaonepath.slides.find import find_slides
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "one.svs", 2500, 2000, fragments=2, holes=False)


def test_encode_then_resume(run, slide, tmp_path):
    first = run("encode", slide, "--out", tmp_path, "--weights", "random:0")
    assert first.exit_code == 0, first.stderr
    assert "random weights" in first.stderr
    path = tmp_path / "embeddings" / "one.h5"
    assert first.stdout.startswith(f"{path}  ")
    embedding = read_embedding(path)
    assert embedding.slide_embedding.shape == (1536,)
    assert len(embedding.coords) > 5
    assert (embedding.attrs["weights"], embedding.attrs["reader"]) == ("random:0", "tiff")
    for written in ("patches/one.h5", "patches/one_features.h5", "masks/one.jpg"):
        assert (tmp_path / written).is_file()
    before = path.stat().st_mtime_ns
    again = run("encode", slide, "--out", tmp_path, "--weights", "random:0")
    assert "already there" in again.stdout
    assert path.stat().st_mtime_ns == before
    other = run("encode", slide, "--out", tmp_path, "--weights", "random:1", "--quiet")
    assert (other.exit_code, other.stdout, other.stderr.strip()) == (0, "", "")
    assert read_embedding(path).attrs["weights"] == "random:1"


def test_stages_one_by_one_equal_encode(run, slide, tmp_path):
    run("encode", slide, "--out", tmp_path / "all", "--weights", "random:0")
    assert run("patch", slide, "--out", tmp_path).exit_code == 0
    features = tmp_path / "f.h5"
    done = run("features", slide, tmp_path / "patches" / "one.h5", "--out", features, "--weights", "random:0")
    assert done.exit_code == 0, done.stderr
    assert run("slide", features, "--out", tmp_path / "e.h5", "--weights", "random:0").exit_code == 0
    one, two = (read_embedding(p) for p in (tmp_path / "e.h5", tmp_path / "all" / "embeddings" / "one.h5"))
    assert np.array_equal(one.slide_embedding, two.slide_embedding)


def test_a_folder_of_slides_survives_a_bad_one(run, slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "a_broken.svs").write_bytes(b"not a slide")
    (folder / "b_good.svs").write_bytes(slide.read_bytes())
    (folder / "notes.txt").write_text("not looked at")
    make_slide(folder / "c_empty.svs", 1000, 1000, fragments=0)
    done = run("encode", folder, "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 1
    assert "a_broken.svs is not a slide" in done.stderr
    assert [line.split("  ")[1] for line in done.stdout.splitlines()][1] == "0 patches"
    assert (tmp_path / "out" / "embeddings" / "b_good.h5").is_file()


def test_an_empty_slide_is_a_result(run, tmp_path):
    empty = make_slide(tmp_path / "empty.svs", 1000, 1000, fragments=0)
    for _ in range(2):
        done = run("encode", empty, "--out", tmp_path / "out", "--weights", "random:0")
        assert done.exit_code == 0
    assert "already there" in done.stdout
    assert (read_embedding(tmp_path / "out" / "embeddings" / "empty.h5").slide_embedding == 0).all()


def test_two_slides_with_one_stem(run, slide, tmp_path):
    other = tmp_path / "one.svs"
    make_slide(other, 1500, 1500, seed=9)
    done = run("encode", slide, other, "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 1
    assert "one stem" in done.stderr
    assert not (tmp_path / "out").exists()
    # The same, one after the other: the first result must survive.
    assert run("encode", slide, "--out", tmp_path / "out", "--weights", "random:0").exit_code == 0
    before = (tmp_path / "out" / "embeddings" / "one.h5").read_bytes()
    late = run("encode", other, "--out", tmp_path / "out", "--weights", "random:0")
    assert late.exit_code == 1
    assert "different slide" in late.stderr
    assert (tmp_path / "out" / "embeddings" / "one.h5").read_bytes() == before


def test_a_slide_replaced_in_place_is_encoded_again(run, slide, tmp_path):
    path = tmp_path / "case.svs"
    path.write_bytes(slide.read_bytes())
    assert run("encode", path, "--out", tmp_path / "out", "--weights", "random:0").exit_code == 0
    first = read_embedding(tmp_path / "out" / "embeddings" / "case.h5")
    make_slide(path, 1500, 1500, seed=9)
    again = run("encode", path, "--out", tmp_path / "out", "--weights", "random:0")
    assert again.exit_code == 0, again.stderr
    assert "other content" in again.stderr
    second = read_embedding(tmp_path / "out" / "embeddings" / "case.h5")
    assert not np.array_equal(first.slide_embedding, second.slide_embedding)
    fresh = run("encode", path, "--out", tmp_path / "fresh", "--weights", "random:0")
    assert fresh.exit_code == 0
    third = read_embedding(tmp_path / "fresh" / "embeddings" / "case.h5")
    assert np.array_equal(second.slide_embedding, third.slide_embedding)


def test_overwrite_takes_the_place_of_another_slide_where_asked(run, slide, tmp_path):
    other = make_slide(tmp_path / "one.svs", 1500, 1500, seed=9)
    for file, arguments in ((slide, ()), (other, ("--overwrite",))):
        done = run("encode", file, "--out", tmp_path / "out", "--weights", "random:0", *arguments)
        assert done.exit_code == 0, done.stderr
    assert read_embedding(tmp_path / "out" / "embeddings" / "one.h5").attrs["slide_path"] == str(other.resolve())


def test_a_result_in_use_is_not_taken_for_a_broken_one(run, slide, tmp_path):
    assert run("encode", slide, "--out", tmp_path, "--weights", "random:0").exit_code == 0
    path = tmp_path / "patches" / "one_features.h5"
    before = path.read_bytes()
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as HDF5 does for somebody who opened it for writing
        done = run("encode", slide, "--out", tmp_path, "--weights", "random:0")
    assert done.exit_code == 1
    assert "another process" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("patching", [{"save_h5": False}, {"patchsize": 3}])
def test_encode_slide_takes_only_what_patchfy_can_be_told_here(slide, tmp_path, patching):
    with pytest.raises(SettingsError, match="cannot be set here"):
        pipeline.encode_slide(slide, tmp_path, "random:0", "random:0", patching=patching)


def test_a_missing_slide_does_not_cost_the_others(run, slide, tmp_path):
    done = run("encode", slide, tmp_path / "nope.svs", "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 1
    assert "nope.svs: no such file" in done.stderr
    assert (tmp_path / "out" / "embeddings" / "one.h5").is_file()


def test_one_slides_features_would_be_anothers_patches(run, slide, tmp_path):
    for name in ("a.svs", "a_features.svs"):
        (tmp_path / name).write_bytes(slide.read_bytes())
    both = run(
        "encode", tmp_path / "a.svs", tmp_path / "a_features.svs", "--out", tmp_path / "o", "--weights", "random:0"
    )
    assert both.exit_code == 1
    assert "would be one file" in both.stderr
    assert run("encode", tmp_path / "a.svs", "--out", tmp_path / "o", "--weights", "random:0").exit_code == 0
    before = (tmp_path / "o" / "patches" / "a_features.h5").read_bytes()
    late = run("patch", tmp_path / "a_features.svs", "--out", tmp_path / "o")
    assert late.exit_code == 1
    assert "no earlier result of this stage" in late.stderr
    assert (tmp_path / "o" / "patches" / "a_features.h5").read_bytes() == before


@pytest.mark.parametrize("victim", ["slide.svs", "patches.h5", "notes.txt"])
@pytest.mark.parametrize("stage", ["features", "slide"])
def test_a_wrong_out_does_not_destroy_what_is_there(run, slide, tmp_path, victim, stage):
    assert run("encode", slide, "--out", tmp_path / "o", "--weights", "random:0").exit_code == 0
    patches, stored = (tmp_path / "o" / "patches" / name for name in ("one.h5", "one_features.h5"))
    target = tmp_path / victim
    content = {"slide.svs": slide.read_bytes(), "patches.h5": patches.read_bytes(), "notes.txt": b"important"}[victim]
    target.write_bytes(content)
    inputs = (slide, patches) if stage == "features" else (stored,)
    for overwrite in ((), ("--overwrite",)):
        done = run(stage, *inputs, "--out", target, "--weights", "random:0", *overwrite)
        assert done.exit_code == 1
        assert "no earlier result of this stage" in done.stderr
        assert target.read_bytes() == content
    folder = run(stage, *inputs, "--out", tmp_path, "--weights", "random:0")
    assert "is a folder" in folder.stderr


def test_a_pipe_is_no_slide(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.svs")
    done = run("patch", tmp_path / "pipe.svs", "--out", tmp_path / "o")
    assert done.exit_code == 1
    assert "neither a file nor a folder" in done.stderr


def test_a_full_disk_is_one_line_and_the_work_is_kept(run, warm_package, slide, tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write that passes it."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
    arguments = ["encode", str(slide), "--out", str(tmp_path / "o"), "--weights", "random:0", "--batch-size", "1"]
    code = f"import sys; sys.argv[1:] = {arguments!r}; from exaonepath.cli.app import main; {limit}main()"
    assert run("patch", slide, "--out", tmp_path / "o").exit_code == 0
    done = warm_package.run(code, cwd=tmp_path)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("note:")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: cannot write ")
    (part,) = (tmp_path / "o" / "patches").glob(".one_features.h5.*.part")
    assert part.stat().st_size > 0


@pytest.mark.parametrize("reader", ["auto", "openslide", "tiff", "image", "nonsense"])
def test_the_reader_is_chosen_stored_and_shown(run, slide, tmp_path, reader):
    done = run("patch", slide, "--out", tmp_path, "--reader", reader, "-v")
    if reader in ("image", "nonsense"):
        assert done.exit_code == 1
        assert ("no reader 'nonsense'" if reader == "nonsense" else "not a PNG") in done.stderr
        return
    name = "tiff" if reader == "auto" else reader
    assert done.exit_code == 0
    assert f"reader {name}" in done.stderr
    with h5py.File(tmp_path / "patches" / "one.h5") as file:
        assert file.attrs["reader"] == name


def test_unreadable_patches_are_told_by_the_exit_status(run, slide, tmp_path, monkeypatch):
    from exaonepath.errors import SlideReadError
    from exaonepath.slides.image import SlideImage

    assert run("patch", slide, "--out", tmp_path).exit_code == 0
    read = SlideImage.read_rgb

    def fail_once(self, location, *rest):
        if fail_once.left:
            fail_once.left -= 1
            raise SlideReadError("a bad tile")
        return read(self, location, *rest)

    fail_once.left = 1
    monkeypatch.setattr(SlideImage, "read_rgb", fail_once)
    done = run("encode", slide, "--out", tmp_path, "--weights", "random:0", "--num-workers", 0)
    assert done.exit_code == 3
    assert "1 of " in done.stderr
    with h5py.File(tmp_path / "patches" / "one_features.h5") as file:
        assert file["failed_reason"].asstr()[:].tolist() == ["a bad tile"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["encode"], 2, "Missing"),
        (["encode", "x.svs"], 2, "--out"),
        (["nonsense"], 2, "No such command"),
        (["encode", "{tmp}/no.svs", "--out", "{tmp}/o"], 1, "no such file"),
        (["encode", "{tmp}", "--out", "{tmp}/o"], 1, "holds no slide"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--device", "cuda"], 1, "--device cpu"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--device", "toaster"], 1, "unknown device"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--dtype", "int8"], 1, "unknown dtype"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--patch-size", "0", "--weights", "random:0"], 1, "patch_size"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--step-size", "-5", "--weights", "random:0"], 1, "step_size"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--resize", "100", "--weights", "random:0"], 1, "resize"),
        (["patch", "{slide}", "--out", "{tmp}/file/o"], 1, "file stands where a folder is needed"),
        (["features", "{slide}", "{tmp}/no.h5", "--out", "{tmp}/f.h5", "--weights", "random:0"], 1, "no such file"),
        (["slide", "{tmp}/no.h5", "--out", "{tmp}/e.h5", "--weights", "random:0"], 1, "no such file"),
        (["slide", "{tmp}/file", "--out", "{tmp}/e.h5", "--weights", "random:0"], 1, "is damaged (it is empty)"),
        (["slide", "{tmp}/file", "--out", "{tmp}/e.h5", "--weights", "{tmp}/none"], 1, "no weights at"),
        (["slide", "{tmp}/no.h5", "--out", "{tmp}/e.h5", "--max-memory", "lots"], 1, "not an amount of memory"),
        (["encode", "{slide}", "--out", "{tmp}/o", "--max-memory", "0GB"], 1, "must be positive"),
    ],
)
def test_errors_are_one_line_and_a_code(run, slide, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    done = run(*(a.format(tmp=tmp_path, slide=slide) for a in arguments))
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_and_version(run):
    report = run("doctor")
    for word in ("torch", "openslide", "cpu", "attention", "C++ extension", "viz"):
        assert word in report.stdout
    from exaonepath import __version__

    assert run("--version").stdout.strip() == __version__


def test_doctor_says_what_auto_resolves_to(run):
    expected = "triton on cuda:0" if torch.cuda.is_available() else "auto resolves to sdpa on cpu"
    assert expected in run("doctor").stdout


def test_doctor_without_the_extension(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "exaonepath._C", None)
    load_extension.cache_clear()
    report = run("doctor")
    load_extension.cache_clear()
    assert report.exit_code == 0  # everything still runs, by other backends
    assert "the torch backends are used" in report.stdout


def test_find_slides_keeps_order_and_drops_repeats(tmp_path):
    for name in ("b.svs", "a.tif"):
        (tmp_path / name).write_text("")
    assert find_slides([tmp_path / "b.svs", tmp_path]) == [tmp_path / "b.svs", tmp_path / "a.tif"]


def test_ctrl_c_then_resume(warm_package, tmp_path):
    """The real command with a real patch encoder, interrupted in mid-slide; the second run finishes what is left."""
    slide = make_slide(tmp_path / "one.svs", 1400, 1000, fragments=1, holes=False)  # twelve patches
    command = ["import runpy; runpy.run_module('exaonepath', run_name='__main__', alter_sys=True)"]
    command += ["encode", slide, "--out", tmp_path / "out", "--weights", "random:0", "--batch-size", "1"]
    process = warm_package.start(*command, cwd=tmp_path)
    patches = tmp_path / "out" / "patches"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(part.stat().st_size > 2 * 768 * 4 for part in patches.glob(".one_features.h5.*.part")):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command resumes" in stderr
    assert not (tmp_path / "out" / "patches" / "one_features.h5").exists()
    done = warm_package.run(*command, "-v", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after" in done.stderr
    assert not list(patches.glob(".*"))


def test_the_pixel_size_can_be_given(run, tmp_path, slide):
    done = run("patch", slide, "--out", tmp_path, "--mpp", "0.25")
    assert done.exit_code == 0, done.output
    with h5py.File(tmp_path / "patches" / "one.h5") as file:
        assert (file.attrs["mpp"], file.attrs["mpp_source"]) == (0.25, "given")
    wrong = run("patch", slide, "--out", tmp_path, "--mpp", "-1")
    assert wrong.exit_code == 1
    assert "positive number" in wrong.output
