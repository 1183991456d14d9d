"""The kernels' work list: every token once, bounds right, little waste."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exaonepath.errors import SettingsError
from exaonepath.ops.attention import tiles
from exaonepath.ops.attention.layout import Segments
from exaonepath.ops.attention.tiles import schedules


def segments(lengths):
    return Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def tile_schedule(lengths, block, first_row=0, rows=None):
    rows = sum(lengths) - first_row if rows is None else rows
    return tiles.tile_schedule(np.array(lengths, np.int64), block, first_row, rows)


def token_bounds(lengths):
    return [
        (start, start + n)
        for start, n in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False)
        for _ in range(n)
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=40), st.sampled_from([16, 32, 64]), st.data())
def test_tiles_cover_every_token_once_and_meet_what_they_must(lengths, block, data):
    first_row = data.draw(st.integers(0, sum(lengths)))
    rows = data.draw(st.integers(0, sum(lengths) - first_row))
    work_list = tile_schedule(lengths, block, first_row, rows).tolist()
    seen = sorted(t for first, last, _, _ in work_list for t in range(first, last))
    assert seen == list(range(first_row, first_row + rows))
    bounds = token_bounds(lengths)
    for first, last, begin, end in work_list:
        assert 0 < last - first <= block
        assert begin == min(b[0] for b in bounds[first:last])
        assert end == max(b[1] for b in bounds[first:last])
    work = [end - begin for _, _, begin, end in work_list]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize(("first_row", "rows"), [(0, 179), (20, 100), (100, 60)])
def test_a_long_segment_never_shares_a_tile(first_row, rows):
    lengths = [5, 100, 7, 64, 3]
    for first, last, begin, end in tile_schedule(lengths, 64, first_row, rows).tolist():
        inside = set(token_bounds(lengths)[first:last])
        if any(e - b >= 64 for b, e in inside):
            assert inside == {(begin, end)}


def test_thousands_of_tiny_fragments_share_tiles():
    work_list = tile_schedule([3] * 10_000, 64)
    assert len(work_list) == -(-30_000 // 64)
    assert (work_list[:, 3] - work_list[:, 2]).max() <= 64 + 4


def test_no_token():
    assert tile_schedule([], 64).shape == (0, 4)


def test_schedules_are_made_once_and_go_with_the_batch():
    segs = segments([5, 100, 7])
    known = schedules(segs.offsets, segs)
    assert schedules(segs.offsets) is known
    assert known.tiles(32) is known.tiles(32, 0, 112)
    assert known.tiles(32, 0, 50) is not known.tiles(32)
    assert known.bounds.tolist() == [list(pair) for pair in token_bounds([5, 100, 7])]
    before = len(tiles._KNOWN)
    del segs, known
    gc.collect()
    assert len(tiles._KNOWN) == before - 1


def test_offsets_alone_are_enough_and_are_checked():
    assert schedules(torch.tensor([0, 3, 5])).lengths.tolist() == [3, 2]
    assert schedules(torch.tensor([0, 0, 3, 3, 5, 5])).lengths.tolist() == [3, 2]
    for wrong in ([1, 3], [0, 3, 2], []):
        with pytest.raises(SettingsError, match="ascend from 0"):
            schedules(torch.tensor(wrong, dtype=torch.int64))


def test_offsets_that_were_written_to_are_read_again():
    """A static buffer, as CUDA graphs use it: the same tensor, another slide of as many tokens and segments."""
    buffer = torch.tensor([0, 10, 30, 33])
    assert schedules(buffer).lengths.tolist() == [10, 20, 3]
    assert schedules(buffer) is schedules(buffer)
    buffer.copy_(torch.tensor([0, 3, 13, 33]))
    assert schedules(buffer).lengths.tolist() == [3, 10, 20]
    with torch.inference_mode():
        assert schedules(torch.tensor([0, 4])).lengths.tolist() == [4]
