"""What each modality tells about patients, on arrays whose answer is known, and on cohorts of the generator."""

import numpy as np
import pytest

from exaonepath.alignment.baselines.profiles import Profiles
from exaonepath.alignment.training import information
from exaonepath.alignment.training.data import (
    TrainingData,
    fit_standardizer,
    load_training_cohort,
    make_split,
)
from exaonepath.alignment.training.information import measure_information, read_for_information
from exaonepath.alignment.training.monitors import HealthMonitors
from exaonepath.alignment.training.settings import build_settings
from exaonepath.errors import DataFileError
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort

NAMES = ("rna", "snp", "cnv", "methylation")


def profiles_of(strength, n=300, seed=0, site_shift=0.0, missing=0.0):
    """Modalities that show the same three processes, each with its own strength; profiles and sites."""
    rng = np.random.default_rng(seed)
    process = rng.normal(size=(n, 3))
    site = np.arange(n) % 3
    found = {}
    for name, amount in strength.items():
        values = amount * process @ rng.normal(size=(3, 40)) + rng.normal(size=(n, 40))
        values += site_shift * rng.normal(size=(3, 40))[site]
        has = rng.random(n) >= missing
        found[name] = Profiles(tuple(f"P{at}" for at in np.flatnonzero(has)), values[has].astype(np.float32))
    return found, {f"P{at}": f"S{number}" for at, number in enumerate(site)}


def dominant(profiles, sites):
    return [w.subject for w in HealthMonitors().observe_information(0, measure_information(profiles, sites))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("missing", "weak"), [(0.0, 0.06), (0.3, 0.08)])  # a weaker signal needs more patients
def test_a_dominant_modality_is_found(name, missing, weak):
    strength = {**dict.fromkeys(NAMES, weak), name: 2.0}
    assert dominant(*profiles_of(strength, missing=missing, n=500, site_shift=1.0)) == [name]


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_equal_modalities_are_not_reported(strength, seed):
    profiles, sites = profiles_of(dict.fromkeys(NAMES, strength), seed=seed)
    assert dominant(profiles, sites) == []
    found = measure_information(profiles, sites)
    if not strength:
        assert all(abs(one.own) < 4 * 0.29 / np.sqrt(300) for one in found.values())
    if strength > 1:
        assert all(one.own > 0.45 and one.others > 0.45 for one in found.values())


@pytest.mark.parametrize("names", [NAMES, NAMES[:3]])
@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize("seed", range(3))
def test_two_equal_modalities_among_noise_are_named_together(names, n, seed):
    """Without either, nothing is left; which one is chance, so both are named."""
    strength = {**dict.fromkeys(names, 0.0), "rna": 1.0, "cnv": 1.0}
    profiles, sites = profiles_of(strength, n=n, seed=seed)
    found = measure_information(profiles, sites)
    assert (found["rna"].partner, found["cnv"].partner) == ("cnv", "rna")
    assert all(found[name].own > 0.15 and found[name].others < 0.1 for name in ("rna", "cnv"))
    assert dominant(profiles, sites) == ["cnv and rna"]


def test_a_site_tells_nothing_about_a_patient():
    """Differences between sites alone, as large as they may be, are no information; not known, they are."""
    profiles, sites = profiles_of(dict.fromkeys(NAMES, 0.0), site_shift=3.0)
    known, unknown = measure_information(profiles, sites), measure_information(profiles, {})
    for name in NAMES:
        assert abs(known[name].own) < 4 * 0.29 / np.sqrt(300)
        assert unknown[name].own > 0.25


def test_patients_alone_in_their_site_are_left_out():
    profiles, sites = profiles_of(dict.fromkeys(NAMES, 2.0))
    alone = {patient: patient for patient in sites}
    assert measure_information(profiles, alone) == {}  # nobody to be compared with
    some = {**sites, "P0": "elsewhere", "P1": "further"}
    assert measure_information(profiles, some)["rna"].own > 0.45


def test_what_cannot_be_compared_is_left_out():
    profiles, sites = profiles_of(dict.fromkeys(NAMES, 2.0))
    two = {name: profiles[name] for name in NAMES[:2]}
    assert measure_information(two, sites) == {}
    assert measure_information({}, sites) == {}
    few = {**two, "cnv": Profiles(profiles["cnv"].patients[:20], profiles["cnv"].values[:20])}
    assert measure_information(few, sites) == {}
    constant = {**profiles, "snp": Profiles(profiles["snp"].patients, np.ones_like(profiles["snp"].values))}
    found = measure_information(constant, sites)
    assert set(found) == {"rna", "cnv", "methylation"}
    assert all(one.own > 0.45 for one in found.values())
    rounding = np.random.default_rng(0).normal(1.0, 1e-7, profiles["snp"].values.shape)  # constant but for that
    assert set(measure_information({**profiles, "snp": Profiles(profiles["snp"].patients, rounding)}, sites)) == {
        "rna", "cnv", "methylation",
    }  # fmt: skip
    apart = {name: Profiles(tuple(f"{name}{p}" for p in one.patients), one.values) for name, one in profiles.items()}
    assert measure_information(apart, sites) == {}  # no patient has two modalities


def training_data(folder, dials, slides=False):
    cohort = write_synthetic_cohort(folder / "cohort", SyntheticCohortSettings(**dials))
    files = {"mudata": "cohort.h5mu", "labels": "labels.csv", **({"slides": "slides.csv"} if slides else {})}
    settings = build_settings({"data": {key: str(cohort / name) for key, name in files.items()}}).data
    held = load_training_cohort(settings)
    split = make_split(held, settings)
    return TrainingData(held, split, fit_standardizer(held, split, settings), settings, 0)


@pytest.mark.parametrize("name", ["snp", "cnv"])
def test_strong_mutations_and_copy_number_do_not_dominate(tmp_path, name):
    """They are few and noisy: eight times weaker, RNA and methylation together still tell as much."""
    dials = {"dominant": name, "dominance": 8.0, "missing": {"wsi": 1.0}}
    data = training_data(tmp_path, dials)
    found = measure_information(read_for_information(data), data.sites)
    assert found[name].own < 2 * found[name].others
    assert HealthMonitors().observe_information(0, found) == []


def test_slides_are_read_up_to_a_number_of_patches(tmp_path, monkeypatch):
    """Patients beyond it are compared without their slides."""
    data = training_data(tmp_path, {"patients": 100, "patches_per_slide": 20}, slides=True)
    monkeypatch.setattr(information, "_FEWEST_PATIENTS", 5)
    everything = read_for_information(data)
    assert set(everything["wsi"].patients) == set(data.train)
    monkeypatch.setattr(information, "_MOST_PATCHES", 600)
    some = read_for_information(data)
    of = {slide.slide: slide for slide in data.cohort.slides.slides}
    read = sum(one.n_patches for one in of.values() if one.patient in some["wsi"].patients)
    assert 500 < read <= 600
    monkeypatch.setattr(information, "_MOST_PATCHES", 1)  # slides so large that hardly one could be read
    assert len(read_for_information(data)["wsi"].patients) == 5
    assert some["rna"].patients == everything["rna"].patients
    monkeypatch.setattr(information, "_MOST_VALUES", 55 * len(data.standardizer.scalings["rna"].features))
    assert 40 < len(read_for_information(data)["rna"].patients) <= 55  # of 55, those who have RNA
    monkeypatch.undo()
    fresh = training_data(tmp_path, {"patients": 100, "patches_per_slide": 20}, slides=True)
    damaged = next(slide for slide in fresh.cohort.slides.slides if slide.patient in fresh.train)
    damaged.features.write_bytes(b"")  # after the check of the cohort
    with pytest.raises(DataFileError, match=damaged.features.name):
        read_for_information(fresh)
