"""Packing and sorting: every valid token once, fragments contiguous, order restored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import Segments, build_fragment_layout


@st.composite
def batches(draw):
    batch, n, prefix = draw(st.integers(0, 3)), draw(st.integers(0, 12)), draw(st.integers(0, 3))
    size = batch * n
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    contour = torch.tensor(draw(st.lists(st.integers(-2, 4), min_size=size, max_size=size)), dtype=torch.int64)
    return prefix, mask.view(batch, n), contour.view(batch, n)


@settings(max_examples=200, deadline=None)
@given(batches(), st.booleans())
def test_segments_are_the_classes_of_equal_slide_and_contour(case, with_contour):
    prefix, mask, contour = case
    batch, n = mask.shape
    layout = build_fragment_layout(prefix, mask, contour if with_contour else None)

    valid = torch.cat([torch.ones(batch * prefix, dtype=torch.bool), mask.flatten()])
    assert sorted(layout.source.tolist()) == valid.nonzero().flatten().tolist()

    labels = torch.cat([torch.full((batch * prefix,), -1), contour.flatten()])
    of_slides = torch.arange(batch)
    slides = torch.cat([of_slides.repeat_interleave(prefix), of_slides.repeat_interleave(n)])[layout.source]
    for segments, label in (
        (layout.slides, torch.zeros_like(labels)),
        (layout.fragments, labels if with_contour else torch.zeros_like(labels)),
    ):
        assert segments.n_tokens == layout.source.numel()
        assert segments.offsets.tolist() == [sum(segments.lengths[:i]) for i in range(len(segments.lengths) + 1)]
        assert all(length > 0 for length in segments.lengths)
        key = list(zip(slides.tolist(), label[layout.source].tolist(), strict=True))
        ids = segments.ids().tolist()
        same_segment = [[i == j for j in ids] for i in ids]
        same_key = [[a == b for b in key] for a in key]
        assert same_segment == same_key


@settings(max_examples=100, deadline=None)
@given(batches())
def test_unpacking_restores_the_callers_order(case):
    prefix, mask, contour = case
    batch, n = mask.shape
    layout = build_fragment_layout(prefix, mask, contour)
    tokens = torch.arange(batch * (prefix + n), dtype=torch.float64)[:, None] + 1
    unpacked = layout.unpack_patches(tokens[layout.source])
    expected = tokens[batch * prefix :] * mask.view(-1, 1)
    assert torch.equal(unpacked, expected)
    rows = layout.patch_rows[~layout.is_prefix]
    assert torch.equal(rows.sort().values, mask.flatten().nonzero().flatten())


@pytest.mark.parametrize(
    ("offsets", "lengths", "message"),
    [
        ([0, 3, 2], (3, -1), "must be positive"),
        ([0, 3, 3], (3, 0), "must be positive"),
        ([0, 3, 6], (3, 2), "ascend from 0 by the segment lengths"),
        ([1, 4, 6], (3, 2), "ascend from 0 by the segment lengths"),
        ([0, 3], (3, 2), "2 segment lengths need 3 offsets, got 2"),
        ([[0, 3]], (3,), "int64"),
        ([0.0, 3.0], (3,), "int64"),
    ],
)
def test_segments_that_do_not_fit_together_are_refused(offsets, lengths, message):
    with pytest.raises(SettingsError, match=message):
        Segments(torch.tensor(offsets), lengths)
    with pytest.raises(SettingsError, match="cannot hold -2 tokens"):
        Segments.from_lengths(torch.tensor([3, -2, 5]))


def test_stable_inside_a_fragment():
    contour = torch.tensor([[1, 0, 1, 0, 1]])
    layout = build_fragment_layout(1, torch.ones(1, 5, dtype=torch.bool), contour)
    assert layout.source.tolist() == [0, 2, 4, 1, 3, 5]
    assert layout.fragments.lengths == (1, 2, 3)


def test_thousands_of_fragments_keep_their_lengths():
    contour = torch.arange(30_000)[None] // 3
    layout = build_fragment_layout(8, torch.ones(1, 30_000, dtype=torch.bool), contour)
    assert layout.fragments.lengths == (8,) + (3,) * 10_000


def test_float_contours_from_other_tools_are_taken_where_whole_and_padding_does_not_matter():
    mask = torch.tensor([[True, True, False]])
    layout = build_fragment_layout(0, mask, torch.tensor([[1.0, 0.0, float("nan")]]))
    assert layout.source.tolist() == [1, 0]
    with pytest.raises(SettingsError, match="whole numbers"):
        build_fragment_layout(0, mask, torch.tensor([[1.5, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("mask", "contour"),
    [
        (torch.ones(2, 3), None),
        (torch.ones(3, dtype=torch.bool), None),
        (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.int64)),
        (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)),
    ],
)
def test_inputs_that_do_not_fit_are_refused(mask, contour):
    with pytest.raises(SettingsError):
        build_fragment_layout(1, mask, contour)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40))
def test_equal_length_groups_cover_every_token_once(lengths):
    segments = Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    tokens = torch.arange(segments.n_tokens)
    seen = [tokens[rows].view(count, length) for rows, count, length in segments.equal_length_groups]
    assert sorted(torch.cat([s.flatten() for s in seen]).tolist() if seen else []) == tokens.tolist()
    ids = segments.ids()
    for group in seen:
        for run in group:
            assert len(set(ids[run].tolist())) == 1
            assert run.diff().eq(1).all()


def test_equal_length_members_hold_every_segment_once():
    segments = Segments.from_lengths(torch.tensor([3, 200, 5, 3, 200, 3, 1]))
    assert sorted(map(sorted, segments.equal_length_members)) == [[0, 3, 5], [1], [2], [4], [6]]


def test_runs_of_short_segments_and_single_long_ones():
    segments = Segments.from_lengths(torch.tensor([3, 5, 60, 41, 40]))
    runs = segments.runs(40)
    assert [run.lengths for run in runs] == [(3, 5), (60,), (41,), (40,)]
    assert segments.runs(40) is runs
    assert [run.lengths for run in segments.runs(60)] == [segments.lengths]
    assert Segments.from_lengths(torch.zeros(0, dtype=torch.int64)).runs(40) == []
