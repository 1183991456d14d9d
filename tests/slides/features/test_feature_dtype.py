"""Features that are stored in half precision: rounded once, read everywhere, and never infinite."""

import h5py
import numpy as np
import pytest
import torch

from exaonepath.errors import BackendError, SettingsError
from exaonepath.files.features import read_features
from exaonepath.slides.features.partial import Block, PartialFile


class Scaled(torch.nn.Module):
    """Mean colours times a number, in 768 columns."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x.mean((2, 3)).repeat(1, 256) * self.scale


def test_the_stored_values_are_the_rounded_ones(run, tmp_path):
    full = read_features(run(out_h5=tmp_path / "full.h5").path)
    half = run(out_h5=tmp_path / "half.h5", feature_dtype="float16").path
    with h5py.File(half) as file:
        assert file["features"].dtype == np.dtype("<f2")
        assert file.attrs["feature_dtype"] == "float16"
        assert file.attrs["dtype"] == "float32"
    stored = read_features(half)
    assert stored.features.dtype == np.float32
    assert np.array_equal(stored.features, full.features.astype(np.float16).astype(np.float32))
    assert full.attrs["feature_dtype"] == "float32"
    assert half.stat().st_size < 0.6 * (tmp_path / "full.h5").stat().st_size


def test_each_dtype_is_a_result_of_its_own(run):
    assert not run().reused
    assert not run(feature_dtype="float16").reused
    assert run(feature_dtype="float16").reused
    assert not run().reused


def test_float32_features_are_identified_as_before_there_was_a_choice(run):
    """The hash that a file of an earlier version carries: a change would compute every cohort again."""
    attrs = read_features(run().path).attrs
    from exaonepath.files.artifact import settings_hash
    from exaonepath.slides.features.identity import digest

    stored = read_features(run().path)
    names = ("slide_fingerprint", "patch_size", "preprocessing", "weights_fingerprint", "dtype")
    known = {name: attrs[name] for name in names}
    inputs = {"coords": digest(stored.coords), "contours": digest(stored.contour_index)}
    assert attrs["settings_hash"] == settings_hash({**known, **inputs})


def test_an_interrupted_run_continues_with_the_same_bits(run, tmp_path):
    class Interruption(Exception):
        pass

    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) > 2:
            raise Interruption

    whole = run(out_h5=tmp_path / "whole.h5", feature_dtype="float16")
    with pytest.raises(Interruption):
        run(out_h5=tmp_path / "two.h5", feature_dtype="float16", progress=stop)
    part = tmp_path / ".two.h5.part"
    assert part.stat().st_size < 2.5 * 8 * 768 * 2
    done = run(out_h5=tmp_path / "two.h5", feature_dtype="float16")
    assert done.resumed_from >= 8
    assert np.array_equal(read_features(done.path).features, read_features(whole.path).features)


def test_a_part_of_the_other_dtype_is_not_continued(run, tmp_path):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(feature_dtype="float16", progress=stop)
    assert run().resumed_from == 0


def test_a_number_beyond_float16_is_refused(run, tmp_path):
    out = tmp_path / "large.h5"
    with pytest.raises(BackendError, match="float16 holds numbers up to 65504"):
        run(out_h5=out, encoder=Scaled(1e6), feature_dtype="float16", weights_fingerprint="large")
    assert not out.exists()
    assert run(out_h5=out, encoder=Scaled(1e6), weights_fingerprint="large").n_features


def test_an_unknown_dtype(run):
    with pytest.raises(SettingsError, match="float32 or float16"):
        run(feature_dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_survive_a_torn_end(tmp_path, dtype):
    path = tmp_path / ".f.part"
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    partial = PartialFile(path, {"of": dtype}, dtype=dtype)
    partial.append(Block(np.array([0, 1]), rows.astype(partial.dtype), (), 2))
    partial.append(Block(np.array([2, 3]), rows.astype(partial.dtype), (), 4))
    partial.close()
    path.write_bytes(path.read_bytes()[:-1])
    again = PartialFile(path, {"of": dtype}, dtype=dtype)
    assert (again.stop, again.n_rows, again.dim) == (2, 2, 3)
    (block,) = again.blocks()
    assert block.features.dtype == partial.dtype
    assert np.array_equal(block.features, rows)
    again.close()
