"""One slide is one fault boundary: a line for it, and the next slide."""

import shutil
import struct
import zlib

import pytest

from exaonepath.slides import stages


@pytest.fixture
def slides(slide, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copy(slide, tmp_path / f"{name}.svs")
    return tmp_path


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OverflowError("cannot convert float infinity to integer"),
        RecursionError("deep"),
        RuntimeError("from a\nlibrary"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        zlib.error("bad"),
        struct.error("bad"),
        AssertionError(),
        KeyError("tile"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_slide_raises_is_one_line_and_the_next_slide(run, slides, tmp_path, monkeypatch, error):
    prepare = stages.prepare_extraction

    def failing(slide, *args, **kwargs):
        if slide.name == "b":
            raise error
        return prepare(slide, *args, **kwargs)

    monkeypatch.setattr(stages, "prepare_extraction", failing)
    done = run("encode", slides, "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 1
    assert sorted(p.stem for p in (tmp_path / "out" / "embeddings").glob("*.h5")) == ["a", "c"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "b.svs" in lines[0]
    assert type(error).__name__ in lines[0]
    assert "Traceback" not in done.stderr
    assert "1 of 3 slides failed" in done.stderr


def test_the_trace_is_shown_where_asked_for(run, slides, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise OverflowError("x")

    monkeypatch.setattr(stages, "prepare_extraction", failing)
    done = run("encode", slides, "--out", tmp_path / "out", "--weights", "random:0", "-v")
    assert (done.exit_code, done.stderr.count("Traceback")) == (1, 3)


@pytest.mark.parametrize("command", ["slide", "patch", "doctor"])
def test_other_commands_keep_to_one_line_too(run, slide, tmp_path, monkeypatch, command):
    def failing(*_, **__):
        raise ZeroDivisionError("x")

    for name in ("slides.embed.embed_features_file", "slides.patches.pipeline.patchfy", "doctor.examine"):
        monkeypatch.setattr(f"exaonepath.{name}", failing)
    arguments = {
        "slide": [tmp_path / "f.h5", "--out", tmp_path / "e.h5", "--weights", "random:0"],
        "patch": [slide, "--out", tmp_path],
        "doctor": [],
    }[command]
    done = run(command, *arguments)
    assert done.exit_code == 1
    assert "unexpected ZeroDivisionError: x" in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_not_a_fault_of_a_slide(run, slides, tmp_path, monkeypatch, error):
    def failing(*_, **__):
        raise error(7)

    monkeypatch.setattr(stages, "prepare_extraction", failing)
    done = run("encode", slides, "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == (130 if error is KeyboardInterrupt else 7)
    assert "slides failed" not in done.stderr


def test_strict_scale(run, tmp_path, slide):
    from exaonepath.synthetic import make_slide

    assumed = make_slide(tmp_path / "nompp.svs", 1200, 1000, fragments=1, mpp=None)
    loose = run("patch", assumed, "--out", tmp_path / "out")
    assert loose.exit_code == 0
    assert "assuming 0.50 um" in loose.stderr
    strict = run("patch", assumed, slide, "--out", tmp_path / "strict", "--strict-scale")
    assert strict.exit_code == 1
    assert "strict_scale" in strict.stderr
    assert (tmp_path / "strict" / "patches" / "one.h5").is_file()
