"""The patch encoder in batches against straight-line torch, one patch at a time and in the same batch."""

from __future__ import annotations

import pytest
import torch

from exaonepath.encoders.loading import load_patch_encoder
from exaonepath.reference.patch_encoder import patch_encoder as reference

BATCH = 16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("baseline_batch", [1, BATCH])
def test_patch_encoder(compare, session, device, dtype, baseline_batch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    session.need_time()
    encoder = load_patch_encoder("random:0", device=device)
    state = {name.removeprefix("patch_encoder.backbone."): t for name, t in encoder.model.state_dict().items()}
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
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
        patches=BATCH,
        dtype=dtype,
    )
