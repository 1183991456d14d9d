"""The 2D rotation: the definition, exactness far from the origin, and what it must leave alone."""

import math

import pytest
import torch

from exaonepath.errors import SettingsError
from exaonepath.ops.attention import rotary
from exaonepath.ops.attention.rotary import Rotation, apply_rotation, rotary_periods, rotate_inplace
from exaonepath.reference.fragment_attention import rotate


def rotation(coords, head_dim=64, patch_size=256):
    return Rotation.from_coords(torch.tensor(coords), rotary_periods(head_dim), patch_size)


def test_periods_follow_the_definition():
    periods = rotary_periods(64)
    assert periods.dtype == torch.float32
    assert torch.allclose(
        periods.double(), torch.tensor([10_000 ** (2 * j / 32) for j in range(16)]).double(), rtol=1e-6
    )
    limits = rotary_periods(32, base=None, min_period=2.0, max_period=32.0)
    assert limits[0] == 2
    assert limits[-1] == pytest.approx(32)
    assert torch.allclose(limits[1:] / limits[:-1], torch.tensor(16 ** (1 / 7)), rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"head_dim": 30},
        {"head_dim": 64, "base": None},
        {"head_dim": 64, "base": 10.0, "min_period": 1.0, "max_period": 2.0},
        {"head_dim": 64, "base": None, "min_period": 1.0},
        {"head_dim": 64, "base": -1.0},
        {"head_dim": 64, "base": None, "min_period": 3.0, "max_period": 2.0},
    ],
)
def test_impossible_periods_are_refused(arguments):
    with pytest.raises(SettingsError):
        rotary_periods(**arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_positions_and_periods_must_be_finite(bad):
    with pytest.raises(SettingsError, match=r"row 1 holds \[3\.0, "):
        rotation([[1.0, 2.0], [3.0, bad]])
    with pytest.raises(SettingsError, match="periods must be positive and finite"):
        Rotation.from_coords(torch.zeros(2, 2), torch.tensor([1.0, bad]), 256)
    with pytest.raises(SettingsError, match="periods must be positive and finite"):
        Rotation.from_coords(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), 256)


def test_tables_made_in_parts_are_the_same(monkeypatch):
    coords = torch.randint(0, 100_000, (100, 2), generator=torch.Generator().manual_seed(2)).tolist()
    whole = rotation(coords).cos_sin()
    monkeypatch.setattr(rotary, "_TABLE_ROWS", 7)
    for ours, theirs in zip(rotation(coords).cos_sin(), whole, strict=True):
        assert torch.equal(ours, theirs)
    assert Rotation(torch.zeros(0, 2, dtype=torch.float64), rotary_periods(64)).cos_sin()[0].shape == (0, 32)


def test_one_angle_by_hand():
    # x axis first: u = (1000 + 128) / 256, period 1 for j = 0; the pair is (d, d + D/2).
    turn = 2 * math.pi * (1000 + 128) / 256
    x = torch.zeros(1, 1, 64, dtype=torch.float64)
    x[0, 0, 0] = 1
    cos, sin = rotation([[1000, 5]]).cos_sin(torch.float64)
    out = apply_rotation(x, cos, sin)
    assert out[0, 0, 0].item() == pytest.approx(math.cos(turn), abs=1e-12)
    assert out[0, 0, 32].item() == pytest.approx(math.sin(turn), abs=1e-12)
    y = torch.zeros(1, 1, 64, dtype=torch.float64)
    y[0, 0, 16] = 1
    out = apply_rotation(y, cos, sin)
    assert out[0, 0, 16].item() == pytest.approx(math.cos(2 * math.pi * (5 + 128) / 256), abs=1e-12)


@pytest.mark.parametrize("offset", [0, 65_504, 200_000, 10_000_000])
def test_float32_tables_are_exact_at_any_position(offset):
    coords = [[offset + 13 * i, offset + 7 * i] for i in range(50)]
    cos, sin = rotation(coords).cos_sin()
    positions = (torch.tensor(coords).double() + 128) / 256
    turns = (positions[:, :, None] / rotary_periods(64).double()).flatten(1)
    # One rounding of the cosine to float32 (6e-8), plus what float64 loses in `turns` at this size.
    tolerance = 6e-8 + 2 * math.pi * turns.abs().max().item() * 2**-52
    assert (cos.double() - torch.cos(2 * math.pi * (turns % 1))).abs().max() <= tolerance
    assert (sin.double() - torch.sin(2 * math.pi * (turns % 1))).abs().max() <= tolerance


def test_position_zero_is_left_bit_for_bit():
    x = torch.randn(5, 2, 32)
    cos, sin = Rotation(torch.zeros(5, 2, dtype=torch.float64), rotary_periods(32)).cos_sin()
    assert torch.equal(apply_rotation(x, cos, sin), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_reference_and_the_inplace_form(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, 32, generator=generator).to(dtype)
    r = rotation(torch.randint(0, 100_000, (300, 2), generator=generator).tolist(), 32)
    cos, sin = r.cos_sin(torch.promote_types(dtype, torch.float32))
    out = apply_rotation(x, cos, sin)
    exact = rotate(x.double(), r.positions, r.periods)
    # Rounding of the result to `dtype`, and float32 tables under it.
    eps = torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() <= (
        eps + 4e-7 * (dtype != torch.float64) + 1e-12
    ) * x.double().abs().max() * 2
    inplace = x.clone()
    rotate_inplace(inplace, cos, sin, chunk=64)
    assert torch.equal(inplace, out)


def test_only_differences_of_coordinates_matter():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 40, 2, 64, generator=generator, dtype=torch.float64).unbind(0)
    coords = torch.randint(0, 50_000, (40, 2), generator=generator)
    scores = []
    for shift in (0, 123_456):
        cos, sin = rotation((coords + shift).tolist()).cos_sin(torch.float64)
        scores.append(torch.einsum("ihd,jhd->hij", apply_rotation(q, cos, sin), apply_rotation(k, cos, sin)))
    assert torch.allclose(*scores, rtol=0, atol=1e-9)


def test_gradcheck():
    x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rotation([[1, 2], [3000, 4], [5, 60_000], [7, 8]], 8).cos_sin(torch.float64)
    assert torch.autograd.gradcheck(lambda t: apply_rotation(t, cos, sin), (x,))


def test_a_compiled_graph_stores_nothing_outside_itself():
    """The memory of a CUDA graph's results is written again by its next run: tables that were kept would change."""
    made = rotation([[0, 0], [512, 256]])
    torch._dynamo.reset()
    compiled = torch.compile(lambda r: r.cos_sin()[0] * 2, fullgraph=True, backend="eager")
    in_graph = compiled(made)
    assert not made._tables
    assert torch.equal(in_graph, made.cos_sin()[0] * 2)
    assert torch.equal(compiled(made), in_graph)
