"""The kernels' work list: every token once, bounds right, little waste."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exaonepath.ops import Segments
from exaonepath.ops.tiles import tile_schedule, token_bounds


def segments(lengths):
    return Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=40), st.sampled_from([16, 32, 64]))
def test_tiles_cover_every_token_once_and_meet_what_they_must(lengths, block):
    segs = segments(lengths)
    tiles = tile_schedule(segs, block).tolist()
    seen = sorted(t for first, last, _, _ in tiles for t in range(first, last))
    assert seen == list(range(segs.n_tokens))
    bounds = token_bounds(segs).tolist()
    for first, last, begin, end in tiles:
        assert 0 < last - first <= block
        assert begin == min(b[0] for b in bounds[first:last])
        assert end == max(b[1] for b in bounds[first:last])
    work = [end - begin for _, _, begin, end in tiles]
    assert work == sorted(work, reverse=True)


def test_a_long_segment_never_shares_a_tile():
    for first, last, begin, end in tile_schedule(segments([5, 100, 7, 64, 3]), 64).tolist():
        inside = {(b, e) for b, e in token_bounds(segments([5, 100, 7, 64, 3]))[first:last].tolist()}
        if any(e - b >= 64 for b, e in inside):
            assert inside == {(begin, end)}


def test_thousands_of_tiny_fragments_share_tiles():
    tiles = tile_schedule(segments([3] * 10_000), 64)
    assert len(tiles) == -(-30_000 // 64)
    assert (tiles[:, 3] - tiles[:, 2]).max() <= 64 + 4


def test_no_token():
    assert tile_schedule(segments([]), 64).shape == (0, 4)
