"""Slides whose features and embeddings stay on the host: the same numbers, whatever the chunks."""

import numpy as np
import pytest
import torch

from exaonepath.encoders import memory_plan, slide_encoder, streaming
from exaonepath.encoders.streaming import RowReader, RowWriter
from exaonepath.errors import MemoryLimitError, SettingsError


@pytest.mark.parametrize("rows", [16, 4096])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("n", [0, 1, 45, 200])
def test_streamed_is_forward(make_slide_encoder, make_slide, monkeypatch, n, masked, rows):
    model = make_slide_encoder()
    features, mask, coords, contour = make_slide(batch=3, n=n, masked=masked)
    with torch.no_grad():
        whole = model(features, mask, coords, contour)
    monkeypatch.setattr(memory_plan, "_ROWS_CPU", rows)
    arrays = [t.numpy() for t in (features, mask, coords, contour)]
    parts = model.encode_streamed(*arrays)
    # float64 sums in another order.
    assert torch.allclose(parts.slide_embedding, whole.slide_embedding, rtol=0, atol=1e-12)
    assert torch.allclose(parts.patch_embedding, whole.patch_embedding, rtol=0, atol=1e-12)


def test_no_mask_no_positions_no_fragments(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    features = make_slide(masked=False)[0]
    with torch.no_grad():
        whole = model(features)
    assert torch.allclose(model.encode_streamed(features).slide_embedding, whole.slide_embedding, rtol=0, atol=1e-12)


def test_half_precision_features_are_read_as_they_are(make_slide_encoder, make_slide):
    model = make_slide_encoder().float()
    features, mask, coords, contour = make_slide(dtype=torch.float16)
    with torch.no_grad():
        whole = model(features.float(), mask, coords, contour)
    parts = model.encode_streamed(features.numpy(), mask, coords, contour)
    assert parts.patch_embedding.dtype == torch.float32
    assert torch.allclose(parts.slide_embedding, whole.slide_embedding, rtol=0, atol=1e-6)


def test_features_that_are_on_the_device_do_not_count_twice(make_slide_encoder, make_slide, monkeypatch):
    """They are part of the plan, and no longer part of what is free."""
    model = make_slide_encoder()
    inputs = make_slide()
    limits = []

    def plan(work, limit, where):
        limits.append(limit)
        return memory_plan.plan_memory(work, None, where=where)

    monkeypatch.setattr(slide_encoder, "plan_memory", plan)
    monkeypatch.setattr(slide_encoder, "available_memory", lambda device: 1_000_000)
    with torch.no_grad():
        model(*inputs)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights + inputs[0].nbytes + 1_000_000 <= limits[0] <= weights + inputs[0].nbytes + 1_001_000


def test_limits(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    inputs = make_slide()
    free = model.encode_streamed(*inputs).slide_embedding
    assert torch.allclose(model.encode_streamed(*inputs, max_memory="1GB").slide_embedding, free, rtol=0, atol=1e-12)
    with pytest.raises(MemoryLimitError):
        model.encode_streamed(*inputs, max_memory=1000)
    with pytest.raises(SettingsError, match="amount of memory"):
        model.encode_streamed(*inputs, max_memory="a lot")


def test_a_layer_that_was_replaced_or_hooked_is_called(make_slide_encoder, make_slide):
    """Adapters and quantised layers take a linear layer's place; reading its weight past them would ignore them."""
    model = make_slide_encoder()
    inputs = make_slide()

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    block = model.transformer.blocks[1]
    plain = model.encode_streamed(*inputs).slide_embedding
    outputs = []
    for layer, owner in (("qkv", block.attn), ("proj", block.attn), ("w1", block.mlp)):
        inner = getattr(owner, layer)
        setattr(owner, layer, Doubled(inner))
        with torch.enable_grad():
            trained = model(*inputs).slide_embedding.detach()
        outputs.append(model.encode_streamed(*inputs).slide_embedding)
        assert torch.allclose(outputs[-1], trained, rtol=0, atol=1e-12)
        setattr(owner, layer, inner)
    hook = block.mlp.register_forward_hook(lambda *a: 2 * a[2])
    outputs.append(model.encode_streamed(*inputs).slide_embedding)
    hook.remove()
    assert all(not torch.allclose(out, plain, rtol=0, atol=1e-6) for out in outputs)


class LateCopy:
    """Stands for a copy that ends only when it is waited for: until then, the buffer must not be touched."""

    running: "list[LateCopy]" = []  # noqa: RUF012

    def __init__(self, _):
        self.running.append(self)

    def synchronize(self):
        if self in self.running:
            self.running.remove(self)


def test_buffers_take_turns(monkeypatch):
    """The logic of the two page-locked buffers, which need a GPU, on buffers that are not."""
    LateCopy.running.clear()
    monkeypatch.setattr(streaming, "_need_buffers", lambda *_: True)
    monkeypatch.setattr(streaming, "_page_locked", lambda rows, width, dtype: torch.empty(rows, width, dtype=dtype))
    monkeypatch.setattr(streaming, "_event", LateCopy)
    source = torch.arange(40.0).view(20, 2)
    cpu = torch.device("cpu")
    reader = RowReader(source, cpu, 4)
    for index in torch.randperm(20, generator=torch.Generator().manual_seed(0)).split(3):
        assert torch.equal(reader.take(index).clone(), source[index])
        assert len(LateCopy.running) <= 2
    out = torch.zeros(20, 3)
    writer = RowWriter(cpu, cpu, 4, 2, torch.float32)
    for rows in (slice(i, i + 4) for i in range(0, 20, 4)):
        writer.put(source[rows], out[rows, 1:])
    assert not torch.equal(out[:, 1:], source)  # the last ones are on their way
    writer.finish()
    assert torch.equal(out[:, 1:], source)


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.full((1, 5, 2), 2.0**24), "float32, which is exact below 16777216 only: pass the pixels as int32"),
        (torch.full((1, 5, 2), 2048.0, dtype=torch.float16), "float16, which is exact below 2048 only"),
        (torch.full((1, 5, 2), 256.0, dtype=torch.bfloat16), "bfloat16, which is exact below 256 only"),
        (torch.full((1, 5, 2), -(2.0**53), dtype=torch.float64), "float64, which is exact below"),
        (torch.full((1, 5, 2), float("nan")), "non-finite"),
        (torch.full((1, 5, 2), -float("inf"), dtype=torch.float64), "non-finite"),
        (torch.ones(1, 5, 2, dtype=torch.bool), "numbers of pixels"),
        (torch.ones(1, 5, 2, dtype=torch.complex64), "must be real"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_coordinates_that_are_not_what_they_seem(make_slide_encoder, make_slide, coords, message, grad):
    model = make_slide_encoder()
    features = make_slide(batch=1, n=5)[0]
    with torch.set_grad_enabled(grad), pytest.raises(SettingsError, match=message):
        model(features, None, coords)
    if not coords.is_complex() and coords.dtype != torch.bool:
        mask = torch.zeros(1, 5, dtype=torch.bool)
        with torch.set_grad_enabled(grad):
            assert model(features, mask, coords).slide_embedding.isfinite().all()  # padding may hold anything


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_exact_coordinates_are_exact_anywhere(make_slide_encoder, make_slide, dtype):
    model = make_slide_encoder(nope_interval=10)
    features, _, coords, _ = make_slide(batch=1, n=5, masked=False)
    coords = coords + 2**24 + 1
    with torch.no_grad():
        assert torch.equal(
            model(features, None, coords.to(dtype)).slide_embedding, model(features, None, coords).slide_embedding
        )


def test_a_device_that_differs_is_said(make_slide_encoder, make_slide):
    features = make_slide()[0].to("meta")
    with pytest.raises(SettingsError, match=r"on meta, but the encoder is on cpu.*encode_streamed"):
        make_slide_encoder()(features)
    with pytest.raises(SettingsError, match="patch_features must be floating point"):
        make_slide_encoder().encode_streamed(np.zeros((1, 3, 24), np.int32))
