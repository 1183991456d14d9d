"""Variants against their base: paired over seeds and patients, and corrected for their number."""

import numpy as np
import pytest
from scipy import stats

from exaonepath.alignment.studies.paired import compare_variants, holm, paired_over_draws, paired_over_seeds
from exaonepath.errors import SettingsError


def runs(shift, seeds=3, patients=80, seed=0, spread=0.05):
    """Hits of the same patients in several runs: patients differ much, runs little."""
    rng = np.random.default_rng(0)
    ease = rng.random(patients)
    own = np.random.default_rng([seed, 1])
    return [
        {f"P{p}": float(x) for p, x in enumerate(np.clip(ease + shift + spread * own.normal(size=patients), -1, 2))}
        for _ in range(seeds)
    ]


def test_pairing_removes_the_variation_of_patients():
    """Values of patients vary by 0.3, the difference is 0.03: unpaired intervals would overlap by far."""
    found = paired_over_seeds(runs(0.03, seed=1), runs(0.0, seed=2))
    assert found.difference.low > 0
    assert found.difference.value == pytest.approx(0.03, abs=0.01)
    assert found.p < 0.05
    nothing = paired_over_seeds(runs(0.0, seed=1), runs(0.0, seed=2))
    assert nothing.difference.low < 0 < nothing.difference.high
    assert nothing.p > 0.05


def test_seeds_that_disagree_widen_the_interval():
    agree = paired_over_seeds(runs(0.1, seed=1), runs(0.0, seed=2))
    unsteady = [*runs(0.3, 1, seed=1), *runs(-0.1, 1, seed=2), *runs(0.1, 1, seed=3)]
    disagree = paired_over_seeds(unsteady, runs(0.0, seed=4))
    assert disagree.difference.value == pytest.approx(agree.difference.value, abs=0.02)
    assert disagree.difference.low < 0 < agree.difference.low
    assert disagree.p > 0.05 > agree.p


def test_equal_runs_differ_by_nothing():
    same = runs(0.0)
    found = paired_over_seeds(same, same)
    assert found.difference.value == 0
    assert found.p == 1
    assert found.difference.low < 0 < found.difference.high


def test_the_interval_covers_the_truth():
    """The difference of each run has its own error: 95 % of the intervals hold the true 0.05, within 3 errors."""
    covered = 0
    for trial in range(120):
        rng = np.random.default_rng(trial)
        base, variant = [], []
        for _ in range(3):
            error = 0.03 * rng.normal()
            base.append({p: float(rng.normal()) for p in range(40)})
            variant.append({p: base[-1][p] + 0.05 + error + 0.2 * rng.normal() for p in range(40)})
        found = paired_over_seeds(variant, base).difference
        covered += found.low <= 0.05 <= found.high
    assert covered / 120 >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 120)


def test_p_is_that_of_students_test_of_the_draws_and_of_a_normal_one_of_the_patients():
    """Effects that are the same for all patients: the t test over draws, far from its usual level too."""
    for effects in ([0.30, 0.31, 0.28, 0.33], [0.3, -0.2, 0.1], [0.5, 0.1]):
        base = [{f"P{p}": 0.25 * (p % 3) for p in range(20)} for _ in effects]
        variant = [{p: value + effect for p, value in run.items()} for run, effect in zip(base, effects, strict=True)]
        expected = stats.ttest_1samp(effects, 0).pvalue
        assert paired_over_draws(variant, base, len(effects)).p == pytest.approx(expected, rel=1e-3)
        assert paired_over_seeds(variant, base).p == pytest.approx(expected, rel=1e-3)
    one = paired_over_seeds(runs(0.03, 1, seed=1), runs(0.0, 1, seed=2))
    z = one.difference.value / ((one.difference.value - one.difference.low) / stats.norm.ppf(0.975))
    assert one.p == pytest.approx(2 * stats.norm.sf(z), rel=1e-6)


def test_p_is_below_a_level_when_the_interval_of_that_level_excludes_0():
    """Draws, seeds and patients vary: p and the 95 % interval say the same."""
    for seed, shift in enumerate((0.0, 0.01, 0.02, 0.03, 0.05, 0.1)):
        found = paired_over_draws(runs(shift, 4, seed=seed), runs(0.0, 4, seed=50), 2)
        excluded = found.difference.low > 0 or found.difference.high < 0
        assert excluded == (found.p < 0.05)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("patients", "expected"), [(1, 1.0), (3, 0.25), (10, 2 / 1024)])
def test_patients_who_all_differ_by_the_same_are_no_certainty(seeds, patients, expected):
    """Nothing varies, so p is that of the sign test: one patient shows nothing."""
    for value in (1.0, -1.0, 0.1 + 0.2):
        base = [dict.fromkeys(map(str, range(patients)), 0.0)] * seeds
        variant = [dict.fromkeys(map(str, range(patients)), value)] * seeds
        assert paired_over_seeds(variant, base).p == pytest.approx(expected)


def test_holm():
    """Holm's own rule: the smallest times their number, the next times one less, never falling."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_more_variants_need_stronger_evidence():
    base, better = runs(0.0, seed=2), runs(0.03, seed=1)
    alone = compare_variants({"base": [{"m": r} for r in base], "v0": [{"m": r} for r in better]}, "base")
    others = {f"v{k}": [{"m": r} for r in runs(0.0, seed=10 + k)] for k in range(1, 6)}
    many = compare_variants({"base": [{"m": r} for r in base], "v0": [{"m": r} for r in better], **others}, "base")
    assert alone["v0"]["m"].p_corrected == alone["v0"]["m"].p == many["v0"]["m"].p
    assert many["v0"]["m"].p_corrected == pytest.approx(6 * alone["v0"]["m"].p)


def test_a_measure_that_a_variant_lacks_is_left_out():
    found = compare_variants({"base": [{"m": {"p": 1.0}, "n": {"p": 1.0}}], "v": [{"m": {"p": 0.0}}]}, "base")
    assert set(found["v"]) == {"m"}
    with pytest.raises(SettingsError, match="same seeds"):
        paired_over_seeds(runs(0, 2), runs(0, 3))
    with pytest.raises(SettingsError, match="in all runs"):
        paired_over_seeds([{"a": 1.0}], [{"b": 1.0}])


def test_draws_are_averaged_with_other_patients_in_each():
    """Two draws with different effects: the mean of both, and an interval that holds either."""
    variant = [*runs(0.2, 2, seed=1), *runs(0.0, 2, seed=2)]
    base = [*runs(0.0, 2, seed=3), *runs(0.0, 2, seed=4)]
    found = paired_over_draws(variant, base, 2)
    assert found.difference.value == pytest.approx(0.1, abs=0.02)
    assert found.difference.n == 160
    assert found.difference.low < 0 < 0.2 < found.difference.high
    one = paired_over_draws(variant[:2], base[:2], 1)
    assert one == paired_over_seeds(variant[:2], base[:2])
    with pytest.raises(SettingsError, match="no runs of 3 draws"):
        paired_over_draws(variant, base, 3)
    single = {"a": [{"m": run} for run in variant], "b": [{"m": run} for run in base]}
    assert compare_variants(single, "b", 2)["a"]["m"].difference == found.difference


def test_intervals_over_draws_cover_the_truth():
    """Each draw has its own effect: 95 % of the intervals over three draws hold the mean, within 3 errors."""
    covered = 0
    for trial in range(150):
        rng = np.random.default_rng(trial)
        base, variant = [], []
        for _ in range(3):
            effect = 0.05 + 0.04 * rng.normal()
            base.append({p: float(rng.normal()) for p in range(40)})
            variant.append({p: base[-1][p] + effect + 0.2 * rng.normal() for p in range(40)})
        found = paired_over_draws(variant, base, 3).difference
        covered += found.low <= 0.05 <= found.high
    assert covered / 150 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 150)
