"""The patch encoder in batches against straight-line torch, one patch at a time and in the same batch."""

from __future__ import annotations

import pytest
import torch

from exaonepath.encoders import patch_encoder
from exaonepath.encoders.loading import load_patch_encoder
from exaonepath.reference.patch_encoder import patch_encoder as reference

BATCH, SMALL_BATCH = 16, 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("together", [False, True], ids=["one-by-one", "together"])
def test_patch_encoder(compare, session, device, dtype, together):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    session.need_dtype(device, dtype)
    encoder = load_patch_encoder("random:0", device=device)
    state = {name.removeprefix("patch_encoder.backbone."): t for name, t in encoder.model.state_dict().items()}
    batch = BATCH if session.full or device == "cuda" else SMALL_BATCH
    baseline_batch = batch if together else 1
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    half = dtype == "bfloat16"

    def run(call) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            out = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    def ours() -> torch.Tensor:
        return run(lambda: encoder.model(images))

    def plain() -> torch.Tensor:
        return run(lambda: torch.cat([reference(state, part) for part in images.split(baseline_batch)]))

    one, two = ours(), plain()
    assert (one - two).norm() <= (3e-2 if half else 1e-4) * two.norm()
    compare(
        f"patch encoder {device}, baseline batch {baseline_batch}",
        ours,
        plain,
        rounds=3,
        device=device,
        patches=batch,
        dtype=dtype,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_last_block(compare, session, monkeypatch, device, dtype):
    """The last block for the CLS token alone, against the same encoder with all tokens in its last block."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and dtype != "float32" and not session.full:
        pytest.skip("EXAONEPATH_BENCH=full runs this case")
    model = load_patch_encoder("random:0", device=device).model
    batch = BATCH if session.full or device == "cuda" else SMALL_BATCH
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)

    def ours() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = model(images)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    def all_tokens() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(patch_encoder, "is_unmodified", lambda _: False)
            return ours()

    one, two = ours(), all_tokens()
    assert (one - two).norm() <= (3e-2 if dtype == "bfloat16" else 1e-5) * two.norm()
    compare(f"last block {device}", ours, all_tokens, rounds=5, device=device, patches=batch, dtype=dtype)
