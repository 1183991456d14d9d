"""The whole slide encoder against the same arithmetic with padded tokens and a dense mask, as published.

Default: N = 4,000 patches. EXAONEPATH_BENCH=full adds N = 20,000 (the dense mask alone is 400 MB; minutes on 2 cores).
"""

from __future__ import annotations

import pytest
import torch

from exaonepath.encoders.loading import load_slide_encoder
from exaonepath.reference.slide_encoder import sdpa_dense_mask
from exaonepath.reference.slide_encoder import slide_encoder as reference

PREFIX = "slide_encoder.wsi_encoder.transformer."


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1_000, 4_000, 20_000])
def test_slide_encoder(compare, full, session, device, n, dtype):
    if n > 1_000 and not full:
        pytest.skip("EXAONEPATH_BENCH=full runs this size")
    session.need_dtype(device.type, dtype)
    encoder = load_slide_encoder("random:0", device=device)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in encoder.model.state_dict().items()}
    periods = encoder.model.transformer.rope_embed().to(device)
    config = {**encoder.model.config.wsi, "norm_eps": 1e-5, "periods": periods}
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(1, n, 768, generator=generator).to(device)
    mask = torch.ones(1, n, dtype=torch.bool, device=device)
    coords = (torch.randint(0, 400, (1, n, 2), generator=generator) * 256).to(device)
    contour = (torch.arange(n)[None] * 8 // n).to(device)
    half = dtype == "bfloat16"

    def run(call) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            out = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    results: dict[str, torch.Tensor] = {}

    def ours() -> None:
        results["ours"] = run(lambda: encoder.model(features, mask, coords, contour)["slide_embedding"])

    def dense() -> None:
        arguments = (state, config, features, mask, coords, contour)
        results["dense"] = run(lambda: reference(*arguments, dtype=torch.float32, attention=sdpa_dense_mask)[1])

    def check() -> None:
        one, two = results["ours"], results["dense"]
        assert (one - two).norm() <= (3e-2 if half else 1e-4) * two.norm()

    large = n > 4_000 and device.type == "cpu"
    if not large:
        ours(), dense(), check()
    rounds = 1 if large else 3
    compare(
        f"slide encoder {device.type}",
        ours,
        dense,
        rounds=rounds,
        device=device.type,
        patches=n,
        fragments=8,
        dtype=dtype,
    )
    check()  # where one run takes minutes, the timed one is the one compared
