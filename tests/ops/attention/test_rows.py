"""Attention by chunks of query rows, written over the queries, against the dense mask in float64."""

import pytest
import torch

from exaonepath.errors import SettingsError
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.rotary import Rotation, rotary_periods
from exaonepath.ops.attention.rows import attend_rows, cut_rows, rotate_rows
from exaonepath.ops.extension import load_extension
from exaonepath.reference.fragment_attention import dense_fragment_attention, rotate

STRUCTURES = {
    "one": [130],
    "one token": [1],
    "long among short": [3, 1, 140, 2, 2, 5],
    "tiny": [3] * 12 + [1] * 4,
    "empty": [],
}


def make(lengths, heads=2, dim=32, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    segments = Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    tokens = segments.n_tokens
    q, k, v = torch.randn(3, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype).unbind(0)
    coords = torch.randint(0, 100_000, (tokens, 2), generator=generator)
    return q, k, v, segments, Rotation.from_coords(coords, rotary_periods(dim), 256)


def truth(q, k, v, segments, rotation):
    q, k, v = (t.double() for t in (q, k, v))
    if rotation is not None:
        q, k = (rotate(t, rotation.positions, rotation.periods) for t in (q, k))
    return dense_fragment_attention(q, k, v, segments.ids(), q.shape[2] ** -0.5)


def run(q, k, v, segments, rotation, rows, backend):
    """As a block does: keys and values in one buffer, keys rotated in place, then the queries chunk by chunk."""
    keys_values = torch.stack([k, v], 1)
    if rotation is not None:
        for first in range(0, len(q), rows):
            rotate_rows(keys_values[first : first + rows, 0], rotation, first, backend=backend)
    k, v = keys_values.unbind(1)
    out, done = torch.full_like(q, torch.nan), 0
    for chunk in cut_rows(segments, rows):
        assert chunk.first == done
        part = q[chunk.first : chunk.first + chunk.count].clone()
        attend_rows(part, k, v, segments, chunk, rotation, backend=backend)
        out[chunk.first : chunk.first + chunk.count] = part
        done += chunk.count
    assert done == len(q)
    return out


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("rows", [1, 40, 1000])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", STRUCTURES.values(), ids=STRUCTURES)
def test_every_chunk_size_gives_the_dense_result(lengths, backend, rows, rotated):
    q, k, v, segments, rotation = make(lengths)
    rotation = rotation if rotated else None
    out = run(q, k, v, segments, rotation, rows, backend)
    # float64 against float64 in another order of summation.
    assert torch.allclose(out, truth(q, k, v, segments, rotation), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("rows", [50, 1000])
def test_triton(rows, rotated, device):
    q, k, v, segments, rotation = make([3, 1, 90, 2, 17], dtype=torch.float32)
    segments = Segments(segments.offsets.to(device), segments.lengths)
    rotation = Rotation(rotation.positions.to(device), rotation.periods.to(device)) if rotated else None
    q, k, v = (t.to(device) for t in (q, k, v))
    out = run(q, k, v, segments, rotation, rows, "triton")
    exact = truth(q, k, v, segments, rotation)
    # Sums of up to 90 float32 products and exponentials of scores of size 5: some ten roundings of 6e-8.
    assert (out - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("rows", [300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [8192, 600, 0])
def test_long_segments_on_the_cpu(rows, dtype, longest, monkeypatch):
    """The C++ kernel, the tiled products of `cpu_attention`, and both, with fewer queries than keys, and in place."""
    monkeypatch.setattr(cpu_kernel, "max_length", lambda: longest if load_extension()[0] else 0)
    q, k, v, segments, rotation = make([8, 800, 530, 20], dim=64, dtype=dtype)
    out = run(q, k, v, segments, rotation, rows, "sdpa")
    exact = truth(q, k, v, segments, rotation)
    # float32 rounds at 6e-8; in bfloat16 the rotated keys and queries are rounded at 2^-9, and the result once more.
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    assert (out.double() - exact).norm() <= limit * exact.norm()


def test_chunks_end_where_segments_do():
    segments = Segments.from_lengths(torch.tensor([5, 5, 5, 100, 3, 3]))
    ranges = [(chunk.first, chunk.first + chunk.count) for chunk in cut_rows(segments, 12)]
    assert ranges[0] == (0, 10)
    assert ranges[1] == (10, 15)  # the long segment starts a chunk of its own
    assert ranges[-1][1] == 121
    assert [b for _, b in ranges[:-1]] == [a for a, _ in ranges[1:]]
    assert all(b - a <= 12 for a, b in ranges)
    # The tail of the long segment and the short ones behind it share the last chunk.
    assert ranges[-1] == (111, 121)


def test_short_segments_of_one_length_are_one_call(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q, k, v, segments, _ = make([3] * 200 + [4] * 100)
    run(q, k, v, segments, None, 10_000, "sdpa")
    assert [tuple(shape[:1]) for shape in calls] == [(200,), (100,)]


def test_what_does_not_fit_is_refused():
    q, k, v, segments, rotation = make([10, 20])
    chunks = cut_rows(segments, 15)
    with pytest.raises(SettingsError, match="must be \\[R, H, D\\]"):
        attend_rows(q[:, 0], k, v, segments, chunks[0], None, backend="sdpa")
    with pytest.raises(SettingsError, match="do not match a chunk"):
        attend_rows(q, k, v, segments, chunks[0], None, backend="sdpa")
    with pytest.raises(SettingsError, match="segments of 30 tokens"):
        attend_rows(q[:10], k[:20], v[:20], segments, chunks[0], None, backend="sdpa")
    with pytest.raises(SettingsError, match="unknown attention backend"):
        attend_rows(q[:10], k, v, segments, chunks[0], rotation, backend="flash")
