"""Extraction: what is stored, what is used again, what survives interruption."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from exaonepath.errors import BackendError, DataFileError, DeviceError, OutputCollisionError, OutputError, SettingsError
from exaonepath.files.features import read_features
from exaonepath.slides.features import extraction
from exaonepath.slides.features.partial import PartialFile
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise
from exaonepath.slides.features.reader import PatchReader

ALWAYS = 10**9


class Interruption(Exception):
    """Stands for whatever ends a run in the middle."""


def interrupted_after(n_batches: int):
    """A progress function that ends the run after so many batches."""
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > n_batches:
            raise Interruption

    return progress


def partial_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def test_features_are_those_of_the_encoder(run, encoder, slide, coords):
    seen: list[tuple[int, int]] = []
    result = run(progress=lambda *args: seen.append(args))
    stored = read_features(result.path, expected_dim=768)
    batches = list(PatchReader(slide, coords, 256, batch_size=8, num_workers=0))
    with torch.inference_mode():
        expected = [encoder.eval()(normalise(torch.from_numpy(b.images), PreprocessingConfig())) for b in batches]
    assert np.array_equal(stored.features, torch.cat(expected).numpy())
    assert np.array_equal(stored.coords, coords)
    assert np.array_equal(stored.contour_index, np.arange(len(coords)) // 10)
    assert (result.n_patches, result.n_features, result.failures) == (len(coords), len(coords), ())
    assert not result.reused
    assert result.resumed_from == 0
    assert seen[0] == (0, len(coords))
    assert seen[-1] == (len(coords), len(coords))
    assert not partial_of(result.path).exists()


def test_attributes_say_what_made_the_file(run, slide):
    attrs = read_features(run(preprocessing=PreprocessingConfig(resize=224)).path).attrs
    assert PreprocessingConfig.from_dict(json.loads(attrs["preprocessing"])).resize == 224
    assert attrs["weights"] == "stub:0"
    assert attrs["weights_fingerprint"] == "f" * 64
    assert attrs["dtype"] == "float32"
    assert attrs["slide_fingerprint"] == slide.fingerprint()
    assert attrs["patch_size"] == 256
    assert attrs["complete"]
    assert attrs["n_failed"] == 0
    assert {"settings_hash", "n_features", "exaonepath_version"} <= set(attrs)


@pytest.mark.parametrize(("workers", "batch"), [(0, 8), (4, 8)])
def test_threads_change_nothing(run, tmp_path, workers, batch):
    one = read_features(run(num_workers=1).path)
    two = read_features(run(out_h5=tmp_path / "two.h5", num_workers=workers, batch_size=batch).path)
    assert np.array_equal(one.features, two.features)


def test_the_encoder_is_left_in_the_mode_it_came_in(run, encoder):
    assert encoder.training
    run()
    assert encoder.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_under_autocast_and_is_stored_as_float32(run, tmp_path, dtype):
    exact = read_features(run().path).features
    result = run(out_h5=tmp_path / "half.h5", dtype=dtype)
    half = read_features(result.path)
    assert half.features.dtype == np.float32
    assert half.attrs["dtype"] == str(dtype).removeprefix("torch.")
    assert not np.array_equal(half.features, exact)
    # one rounding of inputs, weights and output: 3 x 2^-9 of the norm at worst in bfloat16
    assert np.linalg.norm(half.features - exact) < 3 * 2**-9 * np.linalg.norm(exact)


def test_no_tissue_is_a_complete_file_without_rows(run, write_patches):
    result = run(patches_h5=write_patches(np.empty((0, 2), np.int32)))
    stored = read_features(result.path)
    assert stored.features.shape == (0, 768)
    assert stored.coords.shape == (0, 2)
    assert stored.contour_index.shape == (0,)
    assert stored.attrs["complete"]
    assert run(patches_h5=result.path.parent / "patches.h5").reused


def test_patches_without_fragments_get_index_zero(run, write_patches, coords):
    result = run(patches_h5=write_patches(coords))
    assert not read_features(result.path).contour_index.any()


# Failures


def test_unreadable_patches_are_listed(run, coords, bad_reads):
    bad = [0, 8, 9, len(coords) - 1]
    bad_reads.update({tuple(coords[i].tolist()): ALWAYS for i in bad})
    result = run()
    good = np.setdiff1d(np.arange(len(coords)), bad)
    stored = read_features(result.path)
    assert [failure.index for failure in result.failures] == bad
    assert result.n_features == len(good)
    assert stored.failures == result.failures
    assert np.array_equal(stored.coords, coords[good])
    assert np.array_equal(stored.contour_index, good // 10)
    assert stored.attrs["n_failed"] == 4
    with h5py.File(result.path) as file:
        assert file["failed_index"][:].tolist() == bad
        assert np.array_equal(file["failed_coords"][:], coords[bad])
        assert all("injected" in reason for reason in file["failed_reason"].asstr()[:])
    bad_reads.clear()
    whole = read_features(run(out_h5=result.path.with_name("whole.h5")).path)
    assert np.allclose(stored.features, whole.features[good], rtol=0, atol=1e-5)  # other batches, other rounding


def test_all_unreadable(run, coords, bad_reads):
    bad_reads.update({tuple(xy): ALWAYS for xy in coords.tolist()})
    result = run()
    assert (result.n_features, len(result.failures)) == (0, len(coords))
    assert read_features(result.path).features.shape == (0, 768)


def test_running_again_tries_only_the_unreadable_ones(run, encoder, coords, bad_reads):
    bad = [0, 8, 9, 30, len(coords) - 1]
    bad_reads.update({tuple(coords[i].tolist()): ALWAYS for i in bad})
    result = run()
    before = result.path.read_bytes()

    again = run()
    assert again.reused
    assert again.failures == result.failures
    assert result.path.read_bytes() == before

    for i in (8, 9, 30):
        bad_reads.pop(tuple(coords[i].tolist()))
    encoder.batches.clear()
    third = run()
    assert encoder.batches == [3]
    assert not third.reused
    assert [failure.index for failure in third.failures] == [0, len(coords) - 1]
    bad_reads.clear()
    assert run().failures == ()
    stored = read_features(result.path)
    whole = read_features(run(out_h5=result.path.with_name("whole.h5")).path)
    assert np.array_equal(stored.coords, whole.coords)
    assert np.array_equal(stored.contour_index, whole.contour_index)
    assert np.allclose(stored.features, whole.features, rtol=0, atol=1e-5)  # other batches, other rounding
    assert stored.failures == ()
    assert run().reused


def test_nan_from_the_encoder_names_the_patches(run, encoder):
    def spoil(module, inputs, output):
        if len(module.batches) == 3:
            output[5, 17] = float("nan")
            output[6, 0] = float("inf")
        return output

    hook = encoder.register_forward_hook(spoil)
    with pytest.raises(BackendError, match=r"2 of 8 .*\(patch 21, 22\)"):
        run()
    hook.remove()
    assert run().resumed_from == 16


@pytest.mark.parametrize("shape", [(8, 4, 768), (768,), (3, 768)])
def test_encoder_with_the_wrong_output(run, shape):
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(shape)

    with pytest.raises(SettingsError, match=r"must return a tensor \[8, D\]"):
        run(encoder=Wrong())


def test_encoder_that_returns_no_tensor(run):
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return {"features": x}

    with pytest.raises(SettingsError, match="got dict"):
        run(encoder=Wrong())


def test_a_batch_too_large_for_the_device(run):
    class Hungry(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("tried to allocate")

    with pytest.raises(BackendError, match=r"a batch of 8 patches does not fit .* smaller batch size"):
        run(encoder=Hungry())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(run):
    with pytest.raises(DeviceError, match="cuda"):
        run(device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_gives_the_features_of_the_cpu(run, tmp_path, dtype):
    exact = read_features(run().path).features
    got = read_features(run(out_h5=tmp_path / "gpu.h5", device="cuda", dtype=dtype).path).features
    # float32: TF32 products at worst; bfloat16: one rounding of inputs, weights and output
    assert np.linalg.norm(got - exact) < 3 * 2**-9 * np.linalg.norm(exact)


# Interruption


@pytest.mark.parametrize("batches", [1, 4])
def test_resuming_gives_the_bits_of_an_undisturbed_run(run, encoder, tmp_path, coords, bad_reads, batches):
    bad_reads.update({tuple(coords[i].tolist()): ALWAYS for i in (3, 7, 15, 40)})
    whole = run(out_h5=tmp_path / "whole.h5")
    with pytest.raises(Interruption):
        run(progress=interrupted_after(batches))
    encoder.batches.clear()
    result = run()
    assert result.resumed_from == 8 * batches
    assert sum(encoder.batches) == len(coords) - 8 * batches - sum(i >= 8 * batches for i in (3, 7, 15, 40))
    assert result.failures == whole.failures
    one, two = read_features(whole.path), read_features(result.path)
    assert np.array_equal(one.features, two.features)
    assert np.array_equal(one.coords, two.coords)
    assert not partial_of(result.path).exists()


@pytest.mark.parametrize("damage", ["cut", "cut in the head", "zeros", "garbage", "flipped bit"])
def test_a_torn_tail_is_redone(run, tmp_path, damage, caplog):
    whole = read_features(run(out_h5=tmp_path / "whole.h5").path)
    out = tmp_path / "out.h5"
    with pytest.raises(Interruption):
        run(progress=interrupted_after(3))
    partial = partial_of(out)
    data = bytearray(partial.read_bytes())
    if damage == "cut":
        del data[-1000:]
    elif damage == "cut in the head":
        block = (len(data) - data.index(b"\n") - 1) // 3
        del data[-block + 5 :]
    elif damage == "zeros":
        data += bytes(5000)
    elif damage == "garbage":
        data += b"xpB1" + b"\xff" * 5000
    else:
        data[-5000] ^= 4
    partial.write_bytes(data)
    result = run()
    assert "redone" in caplog.text
    assert result.resumed_from == (24 if damage in ("zeros", "garbage") else 16)
    assert np.array_equal(read_features(result.path).features, whole.features)


def test_a_run_killed_after_its_last_batch_only_assembles(run, encoder, coords, monkeypatch):
    def killed(*args):
        raise Interruption

    monkeypatch.setattr(extraction, "write_features", killed)
    with pytest.raises(Interruption):
        run()
    monkeypatch.undo()
    encoder.batches.clear()
    assert run().resumed_from == len(coords)
    assert encoder.batches == []


def test_interrupted_retry_resumes(run, coords, bad_reads):
    bad = [1, 5, 9, 20, 33]
    bad_reads.update({tuple(coords[i].tolist()): ALWAYS for i in bad})
    out = run().path
    bad_reads.clear()
    with pytest.raises(Interruption):
        run(batch_size=2, progress=interrupted_after(1))
    assert len(read_features(out).features) == len(coords) - 5  # the finished file is still there, and whole
    result = run(batch_size=2)
    assert result.resumed_from == 2
    assert len(read_features(out).features) == len(coords)


# What may be used again


def test_a_finished_file_is_left_alone(run, encoder):
    path = run().path
    before = path.stat()
    encoder.batches.clear()
    result = run(batch_size=16, num_workers=0)
    assert result.reused
    assert encoder.batches == []
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    "changed",
    [
        {"preprocessing": PreprocessingConfig(resize=224)},
        {"preprocessing": PreprocessingConfig(mean=(0.5, 0.5, 0.5))},
        {"weights_fingerprint": "e" * 64},
        {"dtype": torch.bfloat16},
        {"overwrite": True},
    ],
    ids=["resize", "mean", "weights", "dtype", "overwrite"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_stale_results_are_not_used(run, encoder, coords, changed, finished, caplog):
    caplog.set_level(logging.INFO)
    if finished:
        run()
    else:
        with pytest.raises(Interruption):
            run(progress=interrupted_after(2))
    encoder.batches.clear()
    result = run(**changed)
    assert not result.reused
    assert result.resumed_from == 0
    assert sum(encoder.batches) == len(coords)
    assert changed == {"overwrite": True} or "other settings" in caplog.text


@pytest.mark.parametrize("what", ["moved", "fragments", "patch size"])
def test_other_patches_are_other_features(run, write_patches, coords, what):
    run(patches_h5=write_patches(coords))
    if what == "moved":
        path = write_patches(coords + 1)
    elif what == "fragments":
        path = write_patches(coords, np.ones(len(coords)))
    else:
        path = write_patches(coords, patch_size=300)
    assert not run(patches_h5=path).reused


def test_a_damaged_output_is_replaced_and_a_foreign_one_is_not(run, tmp_path, caplog):
    out = tmp_path / "out.h5"
    run()
    out.write_bytes(out.read_bytes()[:2000])
    assert not run().reused
    assert "making it again" in caplog.text
    assert run().reused
    with h5py.File(out, "w") as file:
        file["something"] = [1]
    for foreign in (out.read_bytes(), b"somebody's notes"):
        out.write_bytes(foreign)
        with pytest.raises(OutputCollisionError, match="no earlier result"):
            run()
        assert out.read_bytes() == foreign


def test_features_of_another_slide_are_not_overwritten(run, tmp_path, pixels):
    """Two slides with one stem."""
    import tifffile

    other = tmp_path / "known.tif"
    tifffile.imwrite(other, 255 - pixels, tile=(128, 128), compression="zlib", photometric="rgb")
    path = run().path
    before = path.read_bytes()
    with pytest.raises(OutputCollisionError, match="a different slide"):
        run(slide=other)
    assert path.read_bytes() == before
    assert not run(slide=other, overwrite=True).reused


# Bad input, bad output


def test_the_output_must_not_be_an_input(run, patches_h5):
    with pytest.raises(OutputCollisionError, match="input"):
        run(out_h5=patches_h5)


def test_coordinates_of_another_slide(run, monkeypatch):
    original = extraction.read_patches
    monkeypatch.setattr(
        extraction, "read_patches", lambda path: dataclasses.replace(original(path), slide_fingerprint="0" * 64)
    )
    with pytest.raises(DataFileError, match="another slide"):
        run()


@pytest.mark.parametrize("at", [(1400, 0), (0, 1100), (-256, 0), (200_000, 5)])
def test_coordinates_outside_the_slide(run, write_patches, coords, at):
    with pytest.raises(DataFileError, match=r"1 patches lie outside .*patch 2 at"):
        run(patches_h5=write_patches(np.insert(coords, 2, at, axis=0)))


def test_missing_patches_file(run, tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        run(patches_h5=tmp_path / "absent.h5")


@pytest.mark.parametrize(
    "wrong", [{"dtype": torch.float64}, {"batch_size": 0}, {"num_workers": -2}], ids=["dtype", "batch", "workers"]
)
def test_impossible_arguments(run, wrong):
    with pytest.raises(SettingsError):
        run(**wrong)


def test_unwritable_folder(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        run(out_h5=tmp_path / "file" / "out.h5")
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(OutputError, match="permission"):
            run(out_h5=locked / "out.h5")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_keeps_what_was_done(run, tmp_path, monkeypatch):
    original = PartialFile.append

    def append(self, block):
        if self.n_rows < 16:
            return original(self, block)
        with Path("/dev/full").open("wb") as full:
            self._file, kept = full, self._file
            try:
                return original(self, block)
            finally:
                self._file = kept

    monkeypatch.setattr(PartialFile, "append", append)
    with pytest.raises(OutputError, match="full"):
        run()
    monkeypatch.undo()
    assert run().resumed_from == 16


def test_two_runs_at_once_do_not_share_a_file(run):
    def second(done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another process"):
            run()
        raise Interruption

    with pytest.raises(Interruption):
        run(progress=second)
    assert run().n_features
