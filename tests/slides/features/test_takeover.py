"""Partial files of several owners: whoever takes a slide over continues it, and the result has the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from exaonepath.errors import OutputError, SlideBusyError
from exaonepath.files import atomic
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.extraction import prepare_extraction
from exaonepath.slides.features.partial import has_token, partial_files, partial_path
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.image import SlideImage

A, B, C = "a" * 16, "b" * 16, "c" * 16


class Interruption(Exception):
    pass


def interrupted_after(batches, size=8):
    def progress(done, _):
        if done >= batches * size:
            raise Interruption

    return progress


@pytest.fixture
def slide(slide_path):
    with SlideImage(slide_path) as opened:
        yield opened


@pytest.fixture
def owner(slide, patches_h5, tmp_path, encoder):
    """`owner(token)`: prepare the extraction as the owner of a claim; the second value encodes."""
    opened = []

    def owner(token, *, out="out.h5", batch_size=8, weights="f" * 64, **options):
        config = PreprocessingConfig()
        extraction = prepare_extraction(
            slide, patches_h5, tmp_path / out, weights="stub:0", weights_fingerprint=weights, preprocessing=config,
            dtype=torch.float32, token=token, **options,
        )  # fmt: skip
        opened.append(extraction)
        size = extraction.earlier_batch_size or batch_size
        batches = BatchEncoder(encoder.eval(), config, torch.device("cpu"), torch.float32, batch_size=size)

        def work(progress=None, check=lambda: None):
            extraction.encode(extraction.reader(batches, 0), batches, progress, check)
            return extraction.finish()

        return extraction, work

    yield owner
    for extraction in opened:
        extraction.close()


@pytest.fixture
def whole(run, tmp_path):
    """The bytes of the features of an undisturbed run without claims."""
    return run(out_h5=tmp_path / "whole.h5").path.read_bytes()


def parts(tmp_path) -> list[str]:
    return [path.name for path in partial_files(tmp_path / "out.h5")]


@pytest.mark.parametrize("batches", [1, 4])
def test_the_next_owner_continues_with_the_same_bits(owner, whole, tmp_path, encoder, batches):
    first, work = owner(A)
    with pytest.raises(Interruption):
        work(interrupted_after(batches))
    first.close()
    encoder.batches.clear()
    second, work = owner(B)
    assert second.done == 8 * batches
    assert parts(tmp_path) == [f".out.h5.{B}.part"]
    result = work()
    assert len(encoder.batches) == -(-len(second.rows) // 8)
    assert result.path.read_bytes() == whole
    assert parts(tmp_path) == []


def test_the_first_owner_wakes_up_and_can_do_no_harm(owner, whole, tmp_path):
    """Both finish: the one that was taken over writes into a file without a name, and then the same output."""
    first, work = owner(A)
    with pytest.raises(Interruption):
        work(interrupted_after(2))
    _, work_of_second = owner(B)
    first.rows = first.rows[16:]  # it goes on where it was paused
    first.done = 16
    continued = []

    def meanwhile(done, _):
        if done == 32 and not continued:
            continued.append(work())

    result = work_of_second(meanwhile)
    assert continued
    assert result.path.read_bytes() == whole
    assert parts(tmp_path) == []


def test_what_a_plain_run_left_is_continued(owner, run, whole, tmp_path):
    with pytest.raises(Interruption):
        run(progress=interrupted_after(3))
    extraction, work = owner(A)
    assert extraction.done == 24
    assert parts(tmp_path) == [f".out.h5.{A}.part"]
    assert work().path.read_bytes() == whole


@pytest.mark.skipif(atomic.fcntl is None, reason="needs locks")
def test_a_plain_run_that_lives_makes_the_slide_busy(owner, run, tmp_path):
    """A process that makes no claims holds a lock on its partial file, which is left to it."""
    during = []

    def progress(done, _):
        if done == 16:
            with pytest.raises(SlideBusyError, match="another process"):
                owner(A)
            during.append(parts(tmp_path))

    thread = threading.current_thread()
    result = run(progress=progress)
    assert thread is threading.main_thread()
    assert during
    assert all(".out.h5.part" in names for names in during)
    assert result.resumed_from == 0


def test_the_furthest_of_several_is_continued_and_the_others_go(owner, whole, tmp_path):
    kept = {}
    for token, batches in ((A, 1), (B, 3), (C, 2)):
        extraction, work = owner(token)
        with pytest.raises(Interruption):
            work(interrupted_after(batches))
        extraction.close()
        path = partial_path(tmp_path / "out.h5", token)
        kept[path] = path.read_bytes()
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)
    extraction, work = owner("d" * 16)
    assert extraction.done == 24
    assert len(parts(tmp_path)) == 1
    assert work().path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["torn", "flipped", "header", "empty", "other weights", "unwanted"])
def test_only_whole_blocks_of_equal_settings_are_taken(owner, whole, tmp_path, damage):
    first, work = owner(A, weights="e" * 64 if damage == "other weights" else "f" * 64)
    with pytest.raises(Interruption):
        work(interrupted_after(3))
    first.close()
    path = partial_path(tmp_path / "out.h5", A)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-5000] ^= 16
    if damage == "header":
        data[3] ^= 1
    path.write_bytes({"torn": data[:-9], "empty": b""}.get(damage, data))
    second, work = owner(B, unwanted=[path.name] if damage == "unwanted" else [])
    assert second.done == {"torn": 16, "flipped": 16}.get(damage, 0)
    assert parts(tmp_path) == [f".out.h5.{B}.part"]
    assert work().path.read_bytes() == whole


def test_links_are_not_followed(owner, tmp_path):
    (tmp_path / "precious").write_text("x")
    link = partial_path(tmp_path / "out.h5", A)
    link.symlink_to(tmp_path / "precious")
    extraction, _ = owner(B)
    assert extraction.done == 0
    assert (tmp_path / "precious").read_text() == "x"


def test_a_finished_output_leaves_no_partial_file_of_any_owner(owner, whole, tmp_path):
    _, work = owner(A)
    work()
    for token in ("", B):
        partial_path(tmp_path / "out.h5", token).write_bytes(b"left")
    extraction, _ = owner(C)
    assert extraction.result.reused
    assert parts(tmp_path) == []


def test_the_owner_is_asked_before_each_batch_is_stored(owner, tmp_path):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise OutputError("lost")

    extraction, work = owner(A)
    with pytest.raises(OutputError, match="lost"):
        work(check=check)
    extraction.close()
    assert owner(B)[0].done == 16


def test_names_of_partial_files(tmp_path):
    out = tmp_path / "s_features.h5"
    for name in (
        ".s_features.h5.part", f".s_features.h5.{A}.part", f".s_features.h5.{A[1:]}.part", ".s_features.h5.tmp",
        f".s_features.h5.x.{A}.part", f".other_features.h5.{A}.part", f"s_features.h5.{A}.part",
    ):  # fmt: skip
        (tmp_path / name).touch()
    assert [path.name for path in partial_files(out)] == [f".s_features.h5.{A}.part", ".s_features.h5.part"]
    assert has_token(partial_path(out, A))
    assert not has_token(partial_path(out))
    assert partial_files(Path("/nowhere/x.h5")) == []
