"""The kernels inside torch.compile: no graph break, forward and backward, and no new graph for a new slide."""

import pytest
import torch

from exaonepath.ops.attention import triton as kernels
from exaonepath.ops.attention.fragment_attention import fragment_attention, resolve_backend
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods

pytest.importorskip("triton")


def inputs(lengths, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, 1, 32, generator=generator).to(device)
    segments = Segments.from_lengths(torch.tensor(lengths, device=device))
    coords = torch.randint(0, 200_000, (sum(lengths), 2), generator=generator).to(device)
    rotation = Rotation.from_coords(coords, rotary_periods(32), 256)
    return qkv, segments, rotation


def graph_backend(device):
    return "inductor" if device.type == "cuda" else "aot_eager"


def test_training_step_without_a_break(device):
    def step(qkv, segments, rotation):
        return fragment_attention(qkv * 1.5, segments, rotation, backend="triton").square()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=graph_backend(device))
    for lengths in ([9, 3, 40], [40, 1], [7] * 5, [70]):
        qkv, segments, rotation = inputs(lengths, device)
        gradients = []
        for run in (step, compiled):
            leaf = qkv.clone().requires_grad_()
            out = run(leaf, segments, rotation)
            out.sum().backward()
            gradients.append((out.detach(), leaf.grad))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_inference_in_place_without_a_break(device):
    def encode(qkv, segments, rotation):
        return fragment_attention(qkv * 1.5, segments, rotation, backend="triton", overwrite_qkv=True) + 1

    def by_rows(qkv, segments, rotation):
        q, kv = qkv[:, 0] * 1.5, qkv[:, 1:] * 1.5
        kernels.triton_rotate_rows(kv[:, 0], rotation, 0)
        for first in (0, 5):
            stop = 5 if first == 0 else q.shape[0]
            kernels.triton_attend_rows(q[first:stop], kv[:, 0], kv[:, 1], segments, first, rotation, 32**-0.5)
        return q + 1

    qkv, segments, rotation = inputs([9, 3, 40], device)
    with torch.no_grad():
        expected = encode(qkv, segments, rotation)
        for run in (encode, by_rows):
            torch._dynamo.reset()
            compiled = torch.compile(run, fullgraph=True, backend=graph_backend(device))
            torch.testing.assert_close(compiled(qkv, segments, rotation), expected)


def test_a_new_slide_needs_no_new_graph(device):
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: fragment_attention(*a, backend="triton"), fullgraph=True, backend=counting, dynamic=True
    )
    for i, lengths in enumerate(([9, 3, 40], [40, 7], [7] * 5, [70, 2, 2, 2], [33])):
        qkv, segments, rotation = inputs(lengths, device, seed=i)
        rotation.cos_sin()  # made at the encoder's door
        with torch.no_grad():
            out = compiled(qkv, segments, rotation)
            torch.testing.assert_close(out, fragment_attention(qkv, segments, rotation, backend="triton"))
    assert len(graphs) == 1


def test_the_choice_of_a_backend_does_not_break_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + (1 if resolve_backend("auto", torch.device("cuda:0"), torch.bfloat16, 64) == "triton" else 2)

    assert chosen(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("training", [True, False])
def test_two_slides_of_equal_length(training, device):
    """As many tokens and fragments, other fragments: everything a graph is specialised on is equal."""
    torch._dynamo.reset()
    mode = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": graph_backend(device)}
    compiled = torch.compile(lambda *a: fragment_attention(*a, backend="triton") * 2, fullgraph=True, **mode)
    slides = [inputs(lengths, device) for lengths in ([40, 5, 7], [7, 40, 5], [5, 40, 7])]
    for qkv, segments, rotation in slides * 2:
        results = []
        for backend in ("triton", "sdpa"):
            leaf = qkv.clone().requires_grad_(training)
            with torch.set_grad_enabled(training):
                run = compiled if backend == "triton" else lambda *a: fragment_attention(*a, backend="sdpa") * 2
                out = run(leaf, segments, rotation)
                if training:
                    out.sum().backward()
            results.append((out.detach().clone(), leaf.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", ["fragment_attention", "fragment_attention_backward", "attend_rows"])
def test_operators_that_look_up_tiles_are_left_out_of_cuda_graphs(operator):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.exaonepath, operator).default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.exaonepath.rotate_rows.default.tags
