"""Directions from all pairs together: exact for blocks of low rank, better than pairs alone where processes are shared,
and each pair by itself where they are not."""

import itertools
from statistics import median

import numpy as np
import pytest

from exaonepath.alignment.baselines.cca import Principal, choose_directions, reciprocal_rank
from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.training.joint_directions import (
    Whitened,
    beyond,
    joint_directions,
    low_rank,
    pair_directions,
)

NAMES = ("a", "b", "c", "d")
PAIRS = list(itertools.combinations(NAMES, 2))


def test_blocks_of_low_rank_are_found_without_their_diagonal():
    rng = np.random.default_rng(0)
    factors = {name: rng.standard_normal((width, 3)) / 5 for name, width in zip(NAMES, (9, 7, 8, 6), strict=True)}
    blocks = {(x, y): factors[x] @ factors[y].T for x, y in PAIRS}
    found = low_rank(blocks, 3)
    for x, y in PAIRS:
        np.testing.assert_allclose(found[x] @ found[y].T, blocks[x, y], atol=5e-3)
    u, v, s = pair_directions(found["a"], found["b"], 8)
    np.testing.assert_allclose(u * s @ v.T, found["a"] @ found["b"].T, atol=1e-9)
    assert (np.diff(s) <= 0).all()


def test_a_rank_above_the_size_of_the_blocks_is_no_error():
    found = low_rank({("a", "b"): np.ones((1, 2))}, 32)
    assert found["a"].shape[0] == 1
    assert found["b"].shape[0] == 2


def cohort(n, processes, seed, noise):
    """Patients with four modalities of 40 features that show the same few processes, two of them with much noise."""
    rng = np.random.default_rng(seed)
    loads = {name: np.random.default_rng([7, at]).standard_normal((processes, 40)) for at, name in enumerate(NAMES)}
    hidden = rng.standard_normal((n, processes))
    ids = tuple(f"P{seed}-{at:04d}" for at in range(n))
    return {
        name: Profiles(ids, hidden @ loads[name] + noise[at] * rng.standard_normal((n, 40)))
        for at, name in enumerate(NAMES)
    }


def fit(train, validation):
    axes = {name: Principal.of(train[name].values) for name in NAMES}
    own = {
        (x, y): choose_directions(
            axes[x], axes[y], Profiles.common(train[x], train[y]), Profiles.common(validation[x], validation[y])
        )
        for x, y in PAIRS
    }
    shrinkage = {
        name: median(own[pair].shrinkage[pair.index(name)] for pair in PAIRS if name in pair) for name in NAMES
    }
    return axes, own, Whitened.of(axes, train, PAIRS, shrinkage)


def found_by(axes, directions, asked, pair):
    x, y = pair
    return reciprocal_rank(
        axes[x].scores(asked[x].values) @ directions[pair].left,
        axes[y].scores(asked[y].values) @ directions[pair].right,
    )


def test_exact_modalities_help_a_pair_of_noisy_ones():
    """c and d are noisy; their shared directions are known better with a and b. On patients of a third draw."""
    noise = (1.0, 1.0, 5.0, 5.0)
    train, validation, asked = (cohort(n, 5, seed, noise) for seed, n in ((1, 120), (2, 60), (3, 150)))
    axes, own, white = fit(train, validation)
    together, ranks = joint_directions(white, axes, validation, own, 40)
    assert ranks["c", "d"] == 8
    assert found_by(axes, together, asked, ("c", "d")) > 1.05 * found_by(axes, own, asked, ("c", "d"))
    for pair in PAIRS:
        assert found_by(axes, together, asked, pair) > 0.9 * found_by(axes, own, asked, pair)


def test_pairs_with_processes_of_their_own_stay_as_they_are():
    """Each pair of (a, b) and (c, d) shares 60 directions that the others lack: no low rank describes that."""
    rng = np.random.default_rng(0)
    parts = []
    for seed, n in ((1, 200), (2, 60)):
        left, right = (np.random.default_rng([seed, at]).standard_normal((n, 60)) for at in (1, 2))
        ids = tuple(f"P{seed}-{at}" for at in range(n))
        values = (left, left, right, right)
        parts.append(
            {
                name: Profiles(ids, value + 1.5 * rng.standard_normal(value.shape))
                for name, value in zip(NAMES, values, strict=True)
            }
        )
    axes, own, white = fit(*parts)
    together, ranks = joint_directions(white, axes, parts[1], own, 60)
    for pair in (("a", "b"), ("c", "d")):  # the others share nothing, and chance chooses
        assert ranks[pair] == 0
        assert together[pair] is own[pair]


def test_every_pair_chooses_for_itself():
    """All share five processes, two modalities sixty more that the others lack: only these stay as they are."""
    noise, rng = (2.0, 2.0, 5.0, 5.0), np.random.default_rng(0)
    more = rng.standard_normal((60, 40))
    parts = []
    for seed, n in ((1, 200), (2, 60)):
        part = cohort(n, 5, seed, noise)
        extra = 1.5 * np.random.default_rng([seed, 9]).standard_normal((n, 60)) @ more
        parts.append({k: Profiles(p.patients, p.values + extra * (k in "ab")) for k, p in part.items()})
    axes, own, white = fit(*parts)
    together, ranks = joint_directions(white, axes, parts[1], own, 40)
    assert ranks["a", "b"] == 0
    assert together["a", "b"] is own["a", "b"]
    assert ranks["c", "d"] > 0


def test_validation_patients_are_not_needed_and_two_modalities_are_one_pair():
    noise = (1.0, 1.0, 1.0, 1.0)
    train, validation = cohort(120, 3, 1, noise), cohort(4, 3, 2, noise)
    axes, own, white = fit(train, validation)
    changed = {name: Profiles(p.patients, p.values[::-1]) for name, p in validation.items()}
    both = [joint_directions(white, axes, held_out, own, 40)[0] for held_out in (validation, changed)]
    assert all(np.array_equal(both[0][pair].left, both[1][pair].left) for pair in PAIRS)
    pair = ("a", "b")
    alone = Whitened.of({n: axes[n] for n in pair}, {n: train[n] for n in pair}, [pair], dict.fromkeys(pair, 0.2))
    found, ranks = joint_directions(alone, axes, validation, {pair: own[pair]}, 40)
    assert ranks == {pair: 0}
    assert found == {pair: own[pair]}


def test_what_a_modality_shows_is_taken_out_of_what_the_others_share():
    """a shows the first of two processes exactly: beyond it, b, c and d share the second one alone."""
    rng = np.random.default_rng(0)
    n = 400
    hidden = rng.standard_normal((n, 2))
    ids = tuple(map(str, range(n)))
    values = {"a": hidden[:, :1] @ rng.standard_normal((1, 20)) + 0.01 * rng.standard_normal((n, 20))}
    values |= {name: hidden @ rng.standard_normal((2, 20)) + 0.3 * rng.standard_normal((n, 20)) for name in NAMES[1:]}
    train = {name: Profiles(ids, value) for name, value in values.items()}
    axes = {name: Principal.of(value.values, 2) for name, value in train.items()}
    white = Whitened.of(axes, train, PAIRS, dict.fromkeys(NAMES, 0.01))
    factors = beyond(white, "a", 0.01, 1)
    assert set(factors) == {"b", "c", "d"}
    for name, factor in factors.items():
        found = axes[name].scores(values[name]) * white.factor[name] @ factor[:, 0]
        assert abs(np.corrcoef(found, hidden[:, 1])[0, 1]) > 0.9
        assert abs(np.corrcoef(found, hidden[:, 0])[0, 1]) < 0.3


def test_a_missing_modality_is_missing_in_the_folds_too():
    """Folds are of patients, not of rows: a patient is in the same fold in every pair."""
    noise = (1.0,) * 4
    train = cohort(120, 3, 1, noise)
    train["d"] = Profiles(train["d"].patients[30:], train["d"].values[30:])
    axes = {name: Principal.of(train[name].values) for name in NAMES}
    white = Whitened.of(axes, train, PAIRS, dict.fromkeys(NAMES, 0.2))
    assert len(white.rows["a", "d"][0]) == 90
    np.testing.assert_array_equal(white.fold["a", "d"], white.fold["a", "b"][30:])
    without = white.covariances(without=0)
    keep = white.fold["a", "d"] != 0
    expected = white.rows["a", "d"][0][keep].T @ white.rows["a", "d"][1][keep] / keep.sum()
    assert without["a", "d"] == pytest.approx(expected)
