"""NaN and infinity stay in their own segment: forward, and in every part of the gradient, on every backend."""

import functools

import pytest
import torch
from attention_cases import SDPA_BY_TORCH, attending, inputs

from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.rows import attend_rows, cut_rows

LENGTHS = {"short": [5, 7, 6], "long": [3, 40, 33], "tiny": [1, 2, 1, 3, 2, 1]}
BACKENDS = ("triton", "sdpa", SDPA_BY_TORCH, "eager")
VALUES = (float("nan"), float("inf"), -float("inf"))
QUERY, KEY, VALUE = range(3)


def runs(lengths, rope, spoil=None, backend="triton", device="cpu"):
    """Output and gradient; `spoil(qkv, weight)` may change what goes in, `weight` being the gradient of the output."""
    if backend == "triton":
        pytest.importorskip("triton")
    qkv, segments, rotation = inputs(lengths, heads=1, rope=rope, device=device)
    weight = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(qkv)
    if spoil is not None:
        spoil(qkv, weight)
    leaf = qkv.clone().requires_grad_()
    with attending(backend) as backend:
        out = fragment_attention(leaf, segments, rotation, backend=backend)
        out.backward(weight)
        with torch.no_grad():
            inferred = fragment_attention(qkv.clone(), segments, rotation, backend=backend, overwrite_qkv=True)
    return out.detach(), leaf.grad, inferred


@functools.lru_cache
def clean_run(name, backend, device):
    """What nothing spoilt; many tests compare with it."""
    return runs(LENGTHS[name], True, backend=backend, device=device)


def rows_of(lengths, segment):
    first = sum(lengths[:segment])
    return slice(first, first + lengths[segment])


def check_others(backend, lengths, segment, clean, spoilt):
    """Rows of all other segments: bit for bit; a tile that is worked on again sums in another order."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if backend == "triton" else {"rtol": 0, "atol": 0}
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[rows_of(lengths, segment)] = False
    for before, after in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(after[others], before[others], **tolerance)


@pytest.mark.parametrize("bad", VALUES)
@pytest.mark.parametrize("part", [QUERY, KEY, VALUE])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_value_reaches_its_own_segment_only(backend, name, part, bad, device):
    lengths = LENGTHS[name]
    segment = 1
    token = rows_of(lengths, segment).stop - 1

    def spoil(qkv, _):
        qkv[token, part, :, 3] = bad

    clean = clean_run(name, backend, device)
    spoilt = runs(lengths, True, spoil, backend=backend, device=device)
    check_others(backend, lengths, segment, clean, spoilt)
    if bad != bad:
        for out in (spoilt[0], spoilt[2]):
            # A query is its own row's; a key or value is met by every query of its segment.
            met = slice(token, token + 1) if part == QUERY else rows_of(lengths, segment)
            assert out[met].isnan().flatten(1).any(1).all()
            assert not (part == QUERY and out[:token].isnan().any())
        # A loss that sees the NaN gives every value of the segment a gradient that is NaN, unless it came from a value.
        assert part == VALUE or spoilt[1][rows_of(lengths, segment), VALUE].isnan().flatten(1).any(1).all()


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_gradient_reaches_its_own_segment_only(backend, name, device):
    lengths = LENGTHS[name]
    segment = 1
    rows = rows_of(lengths, segment)

    def spoil(_, weight):
        weight[rows.start, :, 5] = float("nan")

    clean = clean_run(name, backend, device)
    spoilt = runs(lengths, True, spoil, backend=backend, device=device)
    check_others(backend, lengths, segment, clean, spoilt)
    assert spoilt[1][rows, VALUE].isnan().flatten(1).any(1).all()
    if lengths[segment] > 1:
        assert spoilt[1][rows, KEY].isnan().flatten(1).any(1).all()


@pytest.mark.parametrize("backend", ["triton", "eager"])  # torch's attention defines such a row as 0
def test_scores_that_are_all_minus_infinity_are_not_a_number(backend, device):
    """softmax of nothing but -inf is NaN; a row of zeros would look like a result."""

    def spoil(qkv, _):
        qkv[5:12, QUERY] = 1.0
        qkv[5:12, KEY] = -float("inf")

    out, _, inferred = runs(LENGTHS["short"], False, spoil, backend, device)
    for found in (out, inferred):
        assert found[5:12].isnan().all()
        assert found[:5].isfinite().all()
        assert found[12:].isfinite().all()


@pytest.mark.parametrize("part", [QUERY, KEY, VALUE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_chunks(backend, part, device):
    """The encoder's inference path, which attends some rows at a time."""
    if backend == "triton":
        pytest.importorskip("triton")
    lengths = [5, 7, 6, 40, 40, 2]

    def run(spoil):
        qkv, segments, _ = inputs(lengths, rope=False, device=device)
        if spoil:
            qkv[8, part, :, 3] = float("nan")
        q, k, v = (t.contiguous() for t in qkv.unbind(1))
        with attending(backend) as name:
            for chunk in cut_rows(segments, 16):
                rows = q[chunk.first : chunk.first + chunk.count]
                attend_rows(rows, k, v, segments, chunk, None, backend=name)
        return q

    clean, spoilt = run(False), run(True)
    check_others(backend, lengths, 1, [clean], [spoilt])
    assert spoilt[8].isnan().any()
