"""What is planted in the synthetic cohort is there, and is where it is said to be."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("mudata", reason="needs the extra `train`")

from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from exaonepath.alignment.data.cohort import load_cohort
from exaonepath.alignment.data.config import CohortConfig
from exaonepath.alignment.data.standardizer import Standardizer
from exaonepath.errors import OutputCollisionError, SettingsError
from exaonepath.files.features import read_features
from exaonepath.synthetic.cohort import SyntheticCohortSettings, draw_patient_slides, write_synthetic_cohort
from exaonepath.synthetic.cohort_biology import (
    MODALITIES,
    OMICS,
    draw_availability,
    draw_latents,
    measure_modality,
    visibility,
)
from exaonepath.synthetic.cohort_morphology import arrange, draw_appearance, fragment_positions

SETTINGS = SyntheticCohortSettings(patients=240, slides_per_patient=(1, 1))
LATENTS = draw_latents(SETTINGS.patients, SETTINGS.programmes, SETTINGS.subtypes, SETTINGS.batches, SETTINGS.seed)
# An accuracy by guessing over 240 patients lies within 0.5 +- 0.10 in all but two of a thousand draws.
CHANCE = 0.60


def omics(modality, settings=SETTINGS, latents=LATENTS):
    values = measure_modality(
        modality,
        latents,
        getattr(settings, modality),
        noise=settings.noise,
        gain=settings.gain(modality),
        batch_effect=settings.batch_effect,
        seed=settings.seed,
    ).astype(np.float64)
    return np.log1p(values) if modality == "rna" else values


def probe(values, labels):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=500))
    return cross_val_score(model, values, labels, cv=3).mean()


def correlations(values):
    """Of each programme with what ridge regression predicts of it for patients it has not seen: float64 [K]."""
    programmes = LATENTS.programmes
    found = cross_val_predict(make_pipeline(StandardScaler(), Ridge(30.0)), values, programmes, cv=3)
    return np.array([np.corrcoef(found[:, k], programmes[:, k])[0, 1] for k in range(programmes.shape[1])])


@pytest.fixture(scope="module")
def clouds():
    appearance = draw_appearance(
        SETTINGS.programmes, SETTINGS.batches, SETTINGS.feature_dim, SETTINGS.batch_effect, SETTINGS.seed
    )
    return [draw_patient_slides(at, LATENTS, appearance, SETTINGS)[0] for at in range(SETTINGS.patients)]


@pytest.mark.parametrize("modality", OMICS)
def test_programmes_show_in_each_modality_but_in_the_one_it_is_blind_to(modality):
    seen = visibility(modality, SETTINGS.programmes)
    recovered = correlations(omics(modality))
    assert recovered[seen == 1].min() > 0.4
    assert recovered[seen == 1].mean() > 0.6
    # Programmes go together through the subtypes, so even a blind modality guesses a little.
    assert recovered[seen < 1].max() < recovered[seen == 1].mean()


def test_programmes_show_in_the_mean_of_patch_features(clouds):
    means = np.stack([cloud.features.mean(0) for cloud in clouds])
    assert correlations(means)[visibility("wsi", SETTINGS.programmes) == 1].min() > 0.6


def test_the_arrangement_drives_expression_and_methylation_and_nothing_else():
    assert probe(omics("rna"), LATENTS.spatial) > 0.95
    assert probe(omics("methylation"), LATENTS.spatial) > 0.95
    for modality in ("snp", "cnv"):
        assert probe(omics(modality), LATENTS.spatial) < CHANCE
    assert probe(LATENTS.programmes, LATENTS.spatial) < CHANCE


def bag_statistics(cloud, contours):
    """Means, spreads and products of features, of the slide and of each fragment apart: all without positions."""
    out = []
    for contour in np.unique(contours):
        part = cloud.features[contours == contour]
        out += [part.mean(0), part.std(0), np.quantile(part, 0.9, axis=0)]
    return np.concatenate([np.concatenate(out), cloud.features.mean(0), cloud.features.std(0)])


def neighbour_products(cloud, coords, contours, direction):
    """Mean product of types (as seen in the features) at each of the shortest distances inside a fragment."""
    types = cloud.features @ direction
    same = contours[:, None] == contours[None]
    steps = np.abs(coords[:, None] - coords[None]).sum(-1) // 256
    types = types - types.mean()
    products = np.outer(types, types)
    return np.array([products[same & (steps == step)].mean() for step in (1, 2, 3)])


@pytest.fixture(scope="module")
def direction(clouds):
    """The axis along which patches of a slide differ most: what tells the types, found without the truth."""
    spread = sum(np.cov(cloud.features.T) for cloud in clouds[:20])
    return np.linalg.eigh(spread)[1][:, -1]


def test_no_bag_of_patches_knows_the_arrangement(clouds):
    values = np.stack([bag_statistics(cloud, cloud.contour_index) for cloud in clouds])
    assert probe(values, LATENTS.spatial) < CHANCE
    for cloud in clouds[:40]:
        for contour in np.unique(cloud.contour_index):
            assert cloud.types[cloud.contour_index == contour].sum() == 0


def test_neighbours_inside_fragments_know_it(clouds, direction):
    values = np.stack([neighbour_products(c, c.coords, c.contour_index, direction) for c in clouds])
    assert probe(values, LATENTS.spatial) > 0.95


def test_it_is_gone_when_positions_are_shuffled(clouds, direction):
    rng = np.random.default_rng(0)
    values = []
    for cloud in clouds:
        coords = cloud.coords.copy()
        for contour in np.unique(cloud.contour_index):
            rows = np.flatnonzero(cloud.contour_index == contour)
            coords[rows] = coords[rng.permutation(rows)]
        values.append(neighbour_products(cloud, coords, cloud.contour_index, direction))
    assert probe(np.stack(values), LATENTS.spatial) < CHANCE


def test_it_is_gone_when_fragments_are_mixed(clouds, direction):
    values = [neighbour_products(c, c.coords, np.zeros_like(c.contour_index), direction) for c in clouds]
    assert probe(np.stack(values), LATENTS.spatial) < CHANCE


def test_without_fragments_positions_and_types_are_the_same_for_every_arrangement(clouds):
    """Not only by that statistic: both types are at every position, so nothing at all is left."""
    for cloud in clouds[:40]:
        places, counts = np.unique(np.c_[cloud.coords, cloud.types], axis=0, return_counts=True)
        assert (counts == 1).all()
        assert np.array_equal(places[0::2, :2], places[1::2, :2])
        assert (places[0::2, 2] == -1).all()
        assert (places[1::2, 2] == 1).all()


@pytest.mark.parametrize("period", SETTINGS.spatial_periods)
def test_arrangements_have_the_period_they_say(period):
    rng = np.random.default_rng(0)
    positions = fragment_positions(400, rng)
    types = arrange(positions, period, rng)
    assert types.sum() == 0
    turns = np.array([2.0, 3.1623, 5.0, 10.0, 20.0])
    power = [np.abs((types * np.exp(2j * np.pi * positions[:, axis] / turns[:, None])).sum(1)) for axis in (0, 1)]
    assert (turns[np.argmax(power, axis=1)] == turns[np.argmin(np.abs(turns - period))]).all()


def test_survival_goes_with_a_programme_and_the_arrangement():
    latents = draw_latents(2000, 5, 4, 3, 1)
    died = latents.event == 1
    assert 0.4 < died.mean() < 0.8
    # Rank correlation of hazard and time to death: of independent ones it is within 0.08 in 999 of 1000 draws.
    order = np.argsort(np.argsort(latents.time[died])).astype(float)
    assert np.corrcoef(order, latents.programmes[died, 0])[0, 1] < -0.25
    assert np.corrcoef(order, latents.spatial[died])[0, 1] < -0.08
    assert abs(np.corrcoef(order, latents.programmes[died, 4])[0, 1]) < 0.25


def test_dials_turn_what_they_say():
    turned = (SyntheticCohortSettings(noise=0.1), SyntheticCohortSettings(noise=8.0))
    usual, *others = (correlations(omics("snp", s)).mean() for s in (SETTINGS, SyntheticCohortSettings(dominant="rna")))
    assert usual > others[0] + 0.1
    quiet, loud = (correlations(omics("methylation", s)).mean() for s in turned)
    assert quiet > loud + 0.1
    np.testing.assert_array_equal(omics("rna"), omics("rna", SyntheticCohortSettings(dominant="rna")))
    centres = [probe(omics("methylation", SyntheticCohortSettings(batch_effect=e)), LATENTS.batch) for e in (0.0, 2.0)]
    assert centres[0] < 0.45  # a third by guessing
    assert centres[1] > 0.95


def test_missing_modalities_go_at_their_rates_and_two_always_stay():
    available = draw_availability(2000, {"wsi": 0.5, "rna": 0.2}, 0)
    # Shares of 2000 draws: within four deviations (0.011).
    np.testing.assert_allclose(available.mean(0), [0.5, 0.8, 1, 1, 1], atol=0.045)
    assert (draw_availability(500, dict.fromkeys(MODALITIES, 0.95), 0).sum(1) >= 2).all()


SMALL = SyntheticCohortSettings(
    patients=12, patches_per_slide=24, rna=20, snp=12, cnv=12, methylation=10, feature_dim=8
)


def test_a_folder_is_written_whole_and_read_without_a_warning(tmp_path):
    folder = write_synthetic_cohort(tmp_path / "c", SMALL)
    cohort = load_cohort(CohortConfig.from_folder(folder))
    assert len(cohort.patients) == 12
    assert not cohort.report.warnings
    Standardizer.fit(cohort, cohort.patients)
    truth = json.loads((folder / "README.json").read_text())
    assert truth["complete"]
    assert set(truth["truth"]) == set(cohort.patients)
    states = cohort.labels["spatial"].map({"intermixed": 0, "nested": 1})
    assert states.to_dict() == {p: t["spatial"] for p, t in truth["truth"].items()}
    slide = cohort.slides.slides[0]
    features = read_features(slide.features)
    assert features.features.shape == (24, 8)
    assert features.attrs["weights"] == "synthetic"

    again = load_cohort(CohortConfig.from_folder(write_synthetic_cohort(tmp_path / "d", SMALL)))
    assert again.fingerprint == cohort.fingerprint
    np.testing.assert_array_equal(read_features(again.slides.slides[0].features).features, features.features)

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5*")}
    assert write_synthetic_cohort(folder, SMALL) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5*")}
    (folder / "README.json").write_text(
        (folder / "README.json").read_text().replace('"complete": true', '"complete": 0')
    )
    (folder / "cohort.h5mu").unlink()
    write_synthetic_cohort(folder, SMALL)
    assert load_cohort(CohortConfig.from_folder(folder)).fingerprint == cohort.fingerprint


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputCollisionError, match="not empty"):
        write_synthetic_cohort(tmp_path, SMALL)
    (tmp_path / "README.json").write_text('{"settings_hash": "other"}')
    with pytest.raises(OutputCollisionError, match="other settings"):
        write_synthetic_cohort(tmp_path, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.json", "mine.txt"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"patients": 0},
        {"slides_per_patient": (2, 1)},
        {"patches_per_slide": 3},
        {"noise": -1},
        {"dominant": "protein"},
        {"missing": {"rna": 1.5}},
        {"missing": {"protein": 0.1}},
        {"spatial_periods": (0, 3)},
    ],
)
def test_dials_that_cannot_be_turned_so(wrong):
    with pytest.raises(SettingsError):
        SyntheticCohortSettings(**wrong)
