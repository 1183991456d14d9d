"""The batch size that "auto" chooses: the memory of a patch, the rule, and runs that are resumed."""

from __future__ import annotations

import logging

import pytest
import torch

from exaonepath import ExaonePathPatchEncoderConfig, ExaonePathPatchEncoderModel
from exaonepath.encoders.prepared import PreparedPatchEncoder
from exaonepath.errors import SettingsError
from exaonepath.files.features import read_features
from exaonepath.slides.features.batch_size import bytes_per_patch, check_batch_size, fitting_batch_size
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise


@pytest.mark.parametrize(("dtype", "prepared"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_a_batch_stays_within_its_memory(live_memory, monkeypatch, dtype, prepared):
    """The real code on tensors without storage."""
    with torch.device("meta"):
        model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    copied = PreparedPatchEncoder(model, dtype)
    # A flash kernel, which there is none of without a device, makes its result and nothing else of that size.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    n, live = 16, live_memory("meta", *copied.buffers(), *model.parameters())
    weights = live.now
    with torch.no_grad(), live:
        uploaded = torch.empty((2, n, 224, 224, 3), dtype=torch.uint8, device="meta")  # this batch and the next
        x = normalise(uploaded[0], PreprocessingConfig())
        if prepared:
            copied(x)
        else:
            model.patch_encoder.backbone(x, False)
    peak = live.peak - weights
    assert peak <= n * bytes_per_patch(224, 14, dtype, prepared) <= 1.3 * peak


@pytest.mark.parametrize(("free", "size"), [(80e9, 256), (1.61e9, 128), (1.59e9, 64), (0.11e9, 8), (0.05e9, 8), (0, 8)])
def test_the_largest_power_of_two_that_fits(free, size):
    assert fitting_batch_size(int(free), 10_000_000) == size


def test_a_resumed_run_keeps_its_batch_size_where_it_fits(caplog):
    assert fitting_batch_size(10**10, 10**7, earlier=100) == 100
    assert fitting_batch_size(10**10, 10**7, earlier=800) == 800
    assert not caplog.records
    assert fitting_batch_size(10**9, 10**7, earlier=100) == 64
    assert "batches of 100 patches, which do not fit" in caplog.text


@pytest.mark.parametrize("wrong", [0, -3, "many", "8", True])
def test_impossible_batch_sizes(wrong):
    with pytest.raises(SettingsError, match=r'positive, or "auto"'):
        check_batch_size(wrong)


def test_auto_on_the_cpu_is_32_and_is_stored(run, encoder, coords):
    result = run(batch_size="auto")
    assert encoder.batches == [32, len(coords) - 32]
    assert read_features(result.path).attrs["batch_size"] == 32


def test_auto_resumes_with_the_batch_size_of_the_interrupted_run(run, encoder, coords, bad_reads, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    bad_reads[tuple(coords[3].tolist())] = 10**9
    whole = read_features(run(out_h5=tmp_path / "whole.h5", batch_size=12).path)

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch_size=12, progress=stop)
    encoder.batches.clear()
    result = run(batch_size="auto")
    assert result.resumed_from == 12
    assert encoder.batches[:-1] == [12] * (len(encoder.batches) - 1)
    stored = read_features(result.path)
    assert stored.features.tobytes() == whole.features.tobytes()
    assert stored.attrs["batch_size"] == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_batch_on_the_card(dtype):
    from exaonepath.slides.features.encoding import BatchEncoder

    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig()).eval()
    encode = BatchEncoder(model, PreprocessingConfig(), torch.device("cuda"), dtype, batch_size="auto")
    assert 8 <= encode.batch_size <= 256
    n = min(encode.batch_size, 64)
    images = torch.zeros((n, 224, 224, 3), dtype=torch.uint8, pin_memory=True).numpy()
    for _ in range(2):  # the first call allocates the workspaces of cuBLAS
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        encode.start(images).result()
        peak = torch.cuda.max_memory_allocated() - before
    assert peak <= n * bytes_per_patch(224, 14, dtype, dtype != torch.float32) + (64 << 20)
