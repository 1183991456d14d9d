"""The fused kernels against float64 by Triton's interpreter on a CPU, and the same cases on a GPU where there is one.

bfloat16 is left to test_triton_on_a_card.py: the interpreter computes it on integers that only look like it.
"""

import dataclasses
import importlib

import pytest
import torch
from attention_cases import SHAPES, exact, inputs, relative, with_gradient
from exaonepath.kernels.launch_config import LaunchConfig

from exaonepath.errors import BackendError, SettingsError
from exaonepath.ops.attention import triton as kernels
from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.layout import Segments, build_fragment_layout
from exaonepath.ops.attention.rotary import Rotation, rotary_periods

pytest.importorskip("triton")

# float32 sums over at most 150 keys: measured up to 3e-7 forward and 5e-7 backward.
FORWARD, BACKWARD = 1e-6, 3e-6


def fused(segments, rotation, **options):
    return lambda qkv: fragment_attention(qkv, segments, rotation, backend="triton", **options)


def check(qkv, segments, rotation, forward=FORWARD, backward=BACKWARD):
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(qkv)
    out, gradient = with_gradient(fused(segments, rotation), qkv, weight)
    expected, expected_gradient = with_gradient(lambda t: exact(t, segments, rotation), qkv.double(), weight)
    with torch.no_grad():
        inferred = fused(segments, rotation)(qkv)
        in_place = fused(segments, rotation, overwrite_qkv=True)(qkv.clone())
    assert out.shape == inferred.shape == in_place.shape == qkv[:, 0].shape
    assert out.dtype == inferred.dtype == in_place.dtype == qkv.dtype
    for ours in (out, inferred, in_place):
        assert relative(ours, expected) <= forward
    # A lone token's query and key have no gradient: two rounded sums over D cancel, and leave roundings of the whole.
    rounding = 4 * torch.finfo(qkv.dtype).eps * expected_gradient.norm()
    for part in range(3):
        error = (gradient[:, part].double() - expected_gradient[:, part]).norm()
        assert error <= backward * expected_gradient[:, part].norm() + rounding


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward_against_float64(name, rope, device):
    check(*inputs(SHAPES[name], rope=rope, device=device))


@pytest.mark.parametrize("dim", [64, 128])
def test_head_dimensions(dim, device):
    check(*inputs([5, 40, 3, 3], dim=dim, heads=1, device=device))


def test_the_error_does_not_grow_with_the_number_of_blocks(device):
    """Sums of earlier blocks are rescaled once a block. If that factor is not exactly 1 while the largest score stays
    the same, its rounding errors multiply: this was 1.4 times the error of plain products here, and 4 times on a card.
    """
    qkv, segments, _ = inputs([512], heads=1, rope=False, device=device)
    truth = exact(qkv, segments, None)
    with torch.no_grad():
        ours = relative(fused(segments, None)(qkv), truth)
        plain = relative(fragment_attention(qkv, segments, backend="eager"), truth)
    # Equal roundings in another order (measured 0.75); a card's matrix units round less carefully.
    assert ours <= (1.15 if device.type == "cpu" else 2) * plain


def test_float16(device):
    # Rounding of queries, probabilities and results to 11 bits; measured 4e-4, and 4e-4 with torch's sdpa.
    check(*inputs([5, 70, 3], torch.float16, device=device), forward=1e-3, backward=1e-3)


def test_tiny_fragments_fill_many_tiles(device):
    """On a card thousands, on the interpreter as many as fill a dozen tiles."""
    check(*inputs([1, 2, 3] * (500 if device.type == "cuda" else 70), heads=1, device=device))


def test_two_slides_with_padding_prefix_and_a_contour_of_minus_one(device):
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, 60, generator=generator) < 0.8
    mask[1, 20:] = False
    contour = torch.randint(-1, 3, (2, 60), generator=generator)
    layout = build_fragment_layout(8, mask.to(device), contour.to(device))
    assert len(layout.fragments.lengths) == 8
    qkv, _, rotation = inputs([layout.fragments.n_tokens], device=device)
    for segments in (layout.fragments, layout.slides):
        check(qkv, segments, rotation)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("lengths", [[8, 150, 8, 1], [3] * 30, [1]])
def test_rows_at_a_time_in_place_equal_the_whole(lengths, rope, device):
    """The encoder's way: keys and values in one buffer, keys rotated in place, queries overwritten by the result."""
    qkv, segments, rotation = inputs(lengths, rope=rope, device=device)
    tokens = qkv.shape[0]
    truth = exact(qkv, segments, rotation)
    kv = qkv[:, 1:].clone()
    for start, stop in ((0, tokens // 3), (tokens // 3, tokens)):
        if rope:
            kernels.triton_rotate_rows(kv[start:stop, 0], rotation, start)
    for first in range(0, tokens, 47):
        rows = torch.full((min(47, tokens - first), 2, 2, 32), float("nan"), device=device)
        q = rows[:, 1]  # strided
        q.copy_(qkv[first : first + 47, 0])
        kernels.triton_attend_rows(q, kv[:, 0], kv[:, 1], segments, first, rotation, 32**-0.5)
        assert relative(q, truth[first : first + 47]) <= FORWARD  # as the whole in one go
        assert rows[:, 0].isnan().all()


@pytest.fixture
def descriptors(monkeypatch):
    """Every kernel loads through tensor descriptors if it can; the list holds what it could do for each launch."""
    settings, describe, used = kernels.attention_config, kernels._descriptors, []

    def asking(*arguments):
        config = settings(*arguments)
        launches = {name: getattr(config, name) for name in ("forward", "query_gradient", "key_gradient")}
        changed = {name: dataclasses.replace(launch, descriptors=True) for name, launch in launches.items()}
        return dataclasses.replace(config, **changed)

    def recorded(wanted, *arguments):
        found = describe(wanted, *arguments)
        used.append(found[0] is not None)
        assert wanted
        return found

    monkeypatch.setattr(kernels, "attention_config", asking)
    monkeypatch.setattr(kernels, "_descriptors", recorded)
    return used


def test_loads_by_descriptors_give_the_same_bits(device, descriptors, monkeypatch):
    """Long and short segments, a whole number of blocks and not; rows next to the long ones are NaN."""
    qkv, segments, rotation = inputs([8, 70, 3, 64, 5], heads=1, device=device)
    qkv[3] = qkv[78:81] = float("nan")
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(qkv)

    def everything():
        with torch.no_grad():
            inferred = fused(segments, rotation)(qkv)
        return inferred, *with_gradient(fused(segments, rotation), qkv, weight)

    by_descriptor = everything()
    assert descriptors == [True] * 4  # two forward launches, two backward
    monkeypatch.undo()
    for ours, before in zip(by_descriptor, everything(), strict=True):
        assert torch.equal(ours.nan_to_num(7.0), before.nan_to_num(7.0))
        assert ours[8:78].isfinite().all()
        assert ours[81:].isfinite().all()


def test_partial_sums_give_the_same_result(device, monkeypatch):
    """Tiles of one segment and of several, and (the last fragment) a tile that is computed again in careful steps."""
    settings = kernels.attention_config

    def asking(*arguments):
        config = settings(*arguments)
        return dataclasses.replace(config, forward=dataclasses.replace(config.forward, sums=8))

    monkeypatch.setattr(kernels, "attention_config", asking)
    qkv, segments, rotation = inputs([8, 70, 3, 64, 5], device=device)
    check(qkv, segments, rotation)
    truth = exact(qkv, segments, rotation)
    qkv[146, 2] = float("nan")
    with torch.no_grad():
        out = fused(segments, rotation)(qkv)
    assert out[145:].isnan().all()
    assert relative(out[:145], truth[:145]) <= FORWARD


def test_smaller_blocks_in_the_loops_with_masks(device, monkeypatch):
    settings = kernels.attention_config

    def asking(*arguments):
        config = settings(*arguments)
        launches = {name: getattr(config, name) for name in ("forward", "query_gradient", "key_gradient")}
        return dataclasses.replace(config, **{k: dataclasses.replace(v, masked=16) for k, v in launches.items()})

    monkeypatch.setattr(kernels, "attention_config", asking)
    check(*inputs([8, 83, 3, 64, 5], heads=1, device=device))


def test_statistics_loaded_as_columns_give_the_same_bits(device, monkeypatch):
    """The dK/dV kernel as triton before 3.7 gets it."""
    qkv, segments, rotation = inputs([8, 70, 3], heads=1, device=device)
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(qkv)
    before = with_gradient(fused(segments, rotation), qkv, weight)
    monkeypatch.setattr(LaunchConfig, "columns_below", lambda *_: 64)
    for ours, expected in zip(with_gradient(fused(segments, rotation), qkv, weight), before, strict=True):
        assert torch.equal(ours, expected)


def test_what_no_descriptor_can_describe_is_loaded_through_pointers(device, descriptors):
    """Rows of 2 * 32 + 1 numbers, and a base that is not a multiple of 16 bytes."""
    qkv, segments, _ = inputs([40, 7], rope=False, device=device)
    truth = exact(qkv, segments, None)
    odd_rows = torch.empty(47, 65, device=device)[:, :64].unflatten(1, (2, 32))
    odd_base = torch.empty(47 * 64 + 1, device=device)[1:].view(47, 2, 32)
    aligned = torch.empty(47, 2, 32, device=device)
    for buffer, described in ((odd_rows, False), (odd_base, False), (aligned, True)):
        descriptors.clear()
        buffer.copy_(qkv[:, 2])
        q, k = qkv[:, 0].clone(), qkv[:, 1].clone()
        kernels.triton_attend_rows(q, k, buffer, segments, 0, None, 32**-0.5)
        assert descriptors == [described]
        assert relative(q, truth) <= FORWARD


def test_every_element_of_every_buffer_is_written(device, monkeypatch):
    """Buffers come filled with NaN; one that the kernels leave behind would show."""
    qkv, segments, rotation = inputs([8, 70, 3, 3], device=device)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    for rope in (rotation, None):
        check(qkv, segments, rope)


def test_a_segment_does_not_depend_on_its_neighbours(device):
    long, short = [100], [3, 5]
    qkv, together, rotation = inputs([*short, *long, *short], device=device)
    rows = slice(8, 108)
    alone = Segments.from_lengths(torch.tensor(long, device=device))
    part = Rotation(rotation.positions[rows], rotation.periods)
    weight = torch.ones_like(qkv[:, 0])
    out, gradient = with_gradient(fused(together, rotation), qkv, weight)
    out_alone, gradient_alone = with_gradient(fused(alone, part), qkv[rows], weight[rows])
    assert torch.equal(out[rows], out_alone)  # tiles of its own, so the very same sums
    assert torch.equal(gradient[rows], gradient_alone)
    with torch.no_grad():
        before = fused(together, rotation)(qkv)
        for start, stop in ((0, 3), (3, 8), (8, 108), (111, 116)):
            changed = qkv.clone()
            changed[start:stop] *= -3
            after = fused(together, rotation)(changed)
            assert torch.equal(after[:start], before[:start])
            assert torch.equal(after[stop:], before[stop:])


def test_strides_and_repeat_runs(device):
    qkv, segments, rotation = inputs([40, 7], device=device)
    sliced = torch.empty(47, 2, *qkv.shape[1:], device=device)[:, 0]
    swapped = torch.empty(47, 2, 3, 32, device=device).transpose(1, 2)
    by_dimension = torch.empty(47, 3, 32, 2, device=device).transpose(2, 3)
    weight = torch.randn(47, 2, 32, generator=torch.Generator().manual_seed(1)).to(device)
    first = with_gradient(fused(segments, rotation), qkv, weight)
    for view in (qkv, sliced, swapped, by_dimension):
        view.copy_(qkv)
        before = view.clone()
        with torch.no_grad():
            assert torch.equal(fused(segments, rotation)(view), first[0])
        assert torch.equal(view, before)
        leaf = view.detach().requires_grad_()
        (fused(segments, rotation)(leaf) * weight).sum().backward()
        assert torch.equal(leaf.grad, first[1])


def test_operators_take_any_strides(device):
    """Below the entry, which makes qkv contiguous: a compiler may hand an operator other strides than it traced."""
    qkv, segments, rotation = inputs([40, 7], device=device)
    tables, scale = rotation.cos_sin(), 32**-0.5
    dout = torch.randn(47, 2, 32, generator=torch.Generator().manual_seed(1)).to(device)

    def both(view):
        out, lse, turned = kernels._forward(view, *tables, segments.offsets, scale, True)
        order = (0, 2, 1, 3)  # as dense, and in another order
        turned = turned if view.is_contiguous() else turned.permute(order).contiguous().permute(order)
        return out, kernels._backward(dout, turned, out, lse, *tables, segments.offsets, scale)

    swapped = torch.empty(47, 2, 3, 32, device=device).transpose(1, 2).copy_(qkv)
    assert all(torch.equal(a, b) for a, b in zip(both(swapped), both(qkv), strict=True))


def test_the_operators_pass_opcheck(device):
    qkv, segments, rotation = inputs([9, 3, 20], heads=1, device=device)
    tables = rotation.cos_sin()
    arguments = (qkv, *tables, segments.offsets, 32**-0.5)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v = (t.clone() for t in qkv.unbind(1))
    torch.library.opcheck(kernels._attend_rows, (q[5:], k, v, *tables, segments.offsets, 5, 32**-0.5))
    torch.library.opcheck(kernels._rotate_rows, (k[5:], *tables, 5))
    torch.library.opcheck(kernels._forward, (*arguments, False), test_utils=checks)
    torch.library.opcheck(kernels._forward, (arguments[0].requires_grad_(), *arguments[1:], True), test_utils=checks)


def test_every_launch_is_one_that_is_compiled_ahead(device, monkeypatch):
    import compile_ahead

    seen = set()

    class Recorder:
        def __init__(self, module, name):
            self.kernel, self.name = getattr(importlib.import_module(f"exaonepath.kernels.{module}"), name), name

        def __getitem__(self, grid):
            def launch(*args, **flags):
                seen.add((self.name, *sorted(name for name, flag in flags.items() if flag is True)))
                return self.kernel[grid](*args, **flags)

            return launch

    known = set()
    for module, name, _, flags in compile_ahead.LAUNCHES.values():
        recorder = Recorder(module, name)
        known.add((name, *sorted(["enable_fp_fusion", *(flag for flag, on in flags.items() if on)])))
        if isinstance(recorder.kernel, Recorder):
            continue
        monkeypatch.setattr(importlib.import_module(f"exaonepath.kernels.{module}"), name, recorder)
    for rope in (True, False):
        check(*inputs([9, 3, 40], rope=rope, device=device))
    assert seen == known


def test_rows_refuse_what_does_not_fit(device):
    qkv, segments, rotation = inputs([9, 3], device=device)
    q, k, v = (t.clone() for t in qkv.unbind(1))
    elsewhere = Segments(segments.offsets.to("meta"), segments.lengths)
    for arguments, message in (
        ((q, k, v, segments, 1, rotation), "rows 1 to 13 are not all among 12 tokens"),
        ((q, k, v[1:], segments, 0, rotation), "do not match"),
        ((q, k.half(), v, segments, 0, rotation), "do not match"),
        ((q, k[:11], v[:11], segments, 0, None), "not all among 11"),
        ((q[:5], k[:11], v[:11], segments, 0, None), "segments cover 12 tokens, but there are 11 keys"),
        ((q, k, v, elsewhere, 0, rotation), "must be on one device"),
        ((q.mT.contiguous().mT, k, v, segments, 0, rotation), "contiguous last dimension"),
        ((q, k, v.mT.contiguous().mT, segments, 0, rotation), "must be contiguous"),
        ((q[:3], k, v, segments, 0, Rotation(rotation.positions[:5], rotation.periods)), "rotation is for 5 tokens"),
        ((q, k, v, segments, 0, Rotation(rotation.positions, rotary_periods(64))), "head dimension 64"),
    ):
        with pytest.raises(SettingsError, match=message):
            kernels.triton_attend_rows(*arguments, 1.0)
    with pytest.raises(SettingsError, match="rows 5 to 17 are not all among 12"):
        kernels.triton_rotate_rows(k, rotation, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.double(), "float32, float16 and bfloat16"),
        (lambda q: q[..., :16].contiguous(), "head dimensions 32, 64, 128"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(change, message):
    qkv, segments, _ = inputs([9, 3], rope=False)
    with pytest.raises(BackendError, match=message + '.*use the "sdpa" backend'):
        fragment_attention(change(qkv), segments, backend="triton")


def test_what_a_machine_cannot_run_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qkv, segments, rotation = inputs([9, 3])
    for run in (fused(segments, rotation), fused(segments, rotation, overwrite_qkv=True)):
        with pytest.raises(BackendError, match=r'need a CUDA device; use the "sdpa" backend'):
            run(qkv.clone())
    with pytest.raises(BackendError, match=r"need a CUDA device"):
        kernels.triton_rotate_rows(qkv[:, 1], rotation, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0, this GPU has 7.5" in kernels.unsupported_device(torch.device("cuda:0"))
    for capability, version, dtype, expected in (
        ((10, 0), (3, 6, 0), torch.bfloat16, "3.7.1 or later"),
        ((10, 3), (3, 7, 0), torch.float32, "3.9.0 or later"),
        ((10, 3), (3, 7, 1), torch.bfloat16, None),
        ((11, 0), (3, 8, 0), torch.float32, "3.9.0 or later"),
        ((10, 0), (3, 9, 0), torch.float32, None),
        ((9, 0), (3, 6, 0), torch.float32, None),
        ((12, 0), (3, 6, 0), torch.float32, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        monkeypatch.setattr(kernels, "_triton_version", lambda version=version: version)
        reason = kernels.unsupported_device(torch.device("cuda:0"), dtype)
        assert reason is None if expected is None else expected in reason
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r'triton is not installed.*use the "sdpa" backend'):
        fused(segments, rotation)(qkv)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what it computes overflows
def test_the_interpreter_is_not_trusted_with_bfloat16():
    """Should this fail, the interpreter has learnt bfloat16: add it to the cases above."""
    if torch.cuda.is_available():
        pytest.skip("not interpreted here")
    qkv, segments, rotation = inputs([40], torch.bfloat16, heads=1)
    with torch.no_grad():
        error = relative(fused(segments, rotation)(qkv), exact(qkv, segments, rotation))
    assert not error < 0.1
