"""The layout of concatenated slides is the padded one's, without the padding."""

import numpy as np
import pytest
import torch

from exaonepath.errors import SettingsError
from exaonepath.ops.attention.layout import build_fragment_layout, build_ragged_layout


def padded(lengths, values):
    out = torch.zeros((len(lengths), max(lengths, default=0)), dtype=values.dtype)
    mask = torch.arange(out.shape[1])[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    out[mask] = values
    return out, mask


@pytest.mark.parametrize("lengths", [[5, 0, 9, 1], [7], [0], [0, 3]])
@pytest.mark.parametrize("n_prefix", [0, 3])
@pytest.mark.parametrize("fragments", [True, False])
def test_equals_the_padded_layout(lengths, n_prefix, fragments):
    total = sum(lengths)
    contour = torch.randint(-1, 3, (total,), generator=torch.Generator().manual_seed(total))
    grid, mask = padded(lengths, contour)
    ragged = build_ragged_layout(n_prefix, lengths, contour if fragments else None)
    dense = build_fragment_layout(n_prefix, mask, grid if fragments else None)
    assert torch.equal(ragged.is_prefix, dense.is_prefix)
    assert torch.equal(ragged.source[ragged.is_prefix], dense.source[dense.is_prefix])
    assert torch.equal(ragged.prefix_kinds[ragged.is_prefix], dense.prefix_kinds[dense.is_prefix])
    assert (ragged.slides.lengths, ragged.fragments.lengths) == (dense.slides.lengths, dense.fragments.lengths)
    # Both reach the same patches, each by its own row numbers.
    patch = ~ragged.is_prefix
    numbers = torch.arange(total)
    dense_numbers, _ = padded(lengths, numbers)
    assert torch.equal(numbers[ragged.patch_rows[patch]], dense_numbers.view(-1)[dense.patch_rows[patch]])


def test_unpack_restores_the_callers_order():
    lengths, contour = [4, 0, 6], torch.tensor([2, 0, 1, 0, 5, 5, 1, 1, 0, 3])
    layout = build_ragged_layout(2, lengths, contour)
    tokens = torch.arange(10.0)[:, None].repeat(1, 3)
    packed = tokens[layout.patch_rows].masked_fill(layout.is_prefix[:, None], -7)
    assert torch.equal(layout.unpack_patches(packed), tokens)


@pytest.mark.parametrize(
    ("lengths", "contour"),
    [
        ([2, -1], torch.zeros(1, dtype=torch.int64)),
        ([2], torch.zeros(3, dtype=torch.int64)),
        ([2], torch.zeros(2)),
        ([2.5, 0.5], torch.zeros(3, dtype=torch.int64)),
        ([2.7], None),
        (["2"], None),
    ],
)
def test_lengths_and_contours_have_to_fit(lengths, contour):
    with pytest.raises(SettingsError):
        build_ragged_layout(1, lengths, contour)


def test_integers_of_other_libraries_are_lengths():
    found = build_ragged_layout(1, [np.int32(2), torch.tensor(3)], None)
    assert found.slides.lengths == (3, 4)


@pytest.mark.parametrize("n_prefix", [-1, 1.5])
def test_the_number_of_prefix_tokens_has_to_be_one(n_prefix):
    with pytest.raises(SettingsError, match="n_prefix"):
        build_ragged_layout(n_prefix, [3], None)
    with pytest.raises(SettingsError, match="n_prefix"):
        build_fragment_layout(n_prefix, torch.ones(1, 3, dtype=torch.bool))
