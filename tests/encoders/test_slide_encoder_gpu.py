"""The slide encoder on a card: streaming, checkpointing, memory within its plan and its targets.

The goldens on a card are in test_slide_encoder.py.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from exaonepath.encoders.loading import load_slide_encoder
from exaonepath.errors import MemoryLimitError, SettingsError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _card():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def encoder(_card):
    return load_slide_encoder("random:0", device="cuda").model


def slide(n, seed=0, fragments=8):
    """Features, coordinates and fragments of a synthetic slide on the host, batch of one."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, n, 768, generator=generator)
    side = int(n**0.5) + 1
    coords = torch.stack([torch.arange(n) % side, torch.arange(n) // side], 1)[None] * 256
    return features, coords, (torch.arange(n)[None] * fragments // max(n, 1))


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_is_forward(encoder, backend, dtype):
    """Through page-locked buffers that take many turns, and with smaller chunks."""
    encoder.set_attn_implementation(backend)
    features, coords, contour = slide(20_011, fragments=50)
    half = dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        whole = encoder(features.cuda(), None, coords.cuda(), contour.cuda())
        plan = encoder.plan_memory(20_011, backend=backend)
        limit = plan.total - plan.chunk // 3
        assert encoder.plan_memory(20_011, backend=backend, max_memory=limit).rows < plan.rows
        for max_memory in (None, limit):
            parts = encoder.encode_streamed(features, None, coords, contour, max_memory=max_memory)
            assert parts.patch_embedding.device.type == "cpu"
            assert torch.equal(parts.patch_embedding[..., :768], features)
            # Products of another number of rows may run on another kernel: some roundings of the compute dtype.
            for ours, theirs in zip(parts.to_tuple(), whole.to_tuple(), strict=True):
                error = (ours - theirs.cpu()).norm() / theirs.norm().cpu()
                assert error <= (3e-2 if half else 1e-5)
    encoder.set_attn_implementation("auto")


def test_a_checkpointed_step_is_the_plain_step(encoder):
    """Bit for bit, dropout included; the kernels' backward pass is deterministic."""
    features, coords, contour = (t.cuda() for t in slide(20_000))
    encoder.train()
    results = []
    for enable in (False, True):
        if enable:
            encoder.gradient_checkpointing_enable()
        encoder.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16):
            loss = encoder(features, None, coords, contour).slide_embedding.square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in encoder.parameters())])
    encoder.gradient_checkpointing_disable()
    encoder.zero_grad()
    encoder.eval()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_slide_that_cannot_fit_is_refused_beforehand(encoder):
    features, coords, contour = slide(50_000)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with pytest.raises(MemoryLimitError, match="50000 patches need"):
        encoder.encode_streamed(features, None, coords, contour, max_memory="0.4GB")
    # Offsets of the segments and positions, no tokens.
    assert torch.cuda.max_memory_allocated() - before <= 50_008 * 64


def test_features_on_the_host_are_for_encode_streamed(encoder):
    with torch.no_grad(), pytest.raises(SettingsError, match="encode_streamed"):
        encoder(slide(10)[0])


SCRIPT = """
import json, sys
import torch
from exaonepath.encoders.loading import load_slide_encoder

kind, n, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
model = load_slide_encoder("random:0", device="cuda").model
features = torch.randn(1, n, 768, generator=torch.Generator().manual_seed(0))
side = int(n**0.5) + 1
coords = torch.stack([torch.arange(n) % side, torch.arange(n) // side], 1)[None] * 256
contour = torch.arange(n)[None] * 8 // n
torch.cuda.reset_peak_memory_stats()
plan = 0
with torch.autocast("cuda", torch.bfloat16):
    if kind == "forward":
        plan = model.plan_memory(n).total
        out = model.encode_streamed(features, None, coords, contour, max_memory="12GB").slide_embedding
if kind == "train":
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    features, coords, contour = features.cuda(), coords.cuda(), contour.cuda()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(features, None, coords, contour).slide_embedding
            loss = out.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(json.dumps([torch.cuda.max_memory_reserved(), plan, bool(out.isfinite().all())]))
"""


@pytest.mark.parametrize(
    ("kind", "n", "target"),
    [
        ("forward", 100_000, 1.0e9),
        ("forward", 250_000, 2.2e9),
        ("forward", 1_000_000, 8.5e9),
        ("train", 100_000, 5.0e9),
        ("train", 250_000, 10.5e9),
    ],
)
def test_memory_on_a_card_of_12_gb(tmp_path, kind, n, target):
    """In a process of its own, so that the peak is this run's alone.

    A training step frees and takes blocks of several sizes. With segments that can grow and a limit to keep to, the
    allocator gives back what lies between them; with fixed segments it would hold a tenth more than was ever in use.
    """
    limit = target if kind == "train" else 12e9
    command = [sys.executable, "-c", SCRIPT, kind, str(n), str(limit)]
    segments = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    environment = {**os.environ, **(segments if kind == "train" else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    reserved, plan, finite = json.loads(done.stdout.strip().splitlines()[-1])
    assert finite
    assert reserved <= target
    if kind == "forward":
        assert reserved <= plan
