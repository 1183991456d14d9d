"""Baselines on patches read them where they need them: the patches of a cohort do not fit into memory together."""

import tracemalloc

import numpy as np
import pytest

from exaonepath.alignment.baselines.abmil import AbmilSettings, fit_abmil
from exaonepath.alignment.baselines.bags import bags_of
from exaonepath.alignment.baselines.neighbourhood import read_neighbourhoods
from exaonepath.alignment.baselines.profiles import parts_of
from exaonepath.alignment.training.run import prepare
from exaonepath.alignment.training.settings import build_settings
from exaonepath.synthetic.cohort import SyntheticCohortSettings, write_synthetic_cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dials = SyntheticCohortSettings(
        patients=120,
        patches_per_slide=256,
        feature_dim=32,
        rna=12,
        snp=5,
        cnv=5,
        methylation=5,
        slides_per_patient=(1, 2),
    )
    return write_synthetic_cohort(tmp_path_factory.mktemp("bags"), dials)


def training_data(folder, **more):
    files = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
    wsi = {"embed_dim": 16, "depth": 1, "num_heads": 2, "n_storage_tokens": 0}
    run = {"device": "cpu", "tensorboard": False}
    found = {key: str(folder / name) for key, name in files.items()} | more
    return prepare(build_settings({"data": found, "model": {"wsi": wsi}, "run": run})).data


@pytest.fixture(scope="module")
def data(folder):
    return training_data(folder)


@pytest.mark.parametrize("cache_mb", [0, 10])
def test_a_bag_has_the_patches_of_all_slides_in_their_order(folder, cache_mb):
    data = training_data(folder, cache_mb=cache_mb)
    patient, bag = next((p, bag) for p, bag in bags_of(data, data.train).items() if len(bag.slides) == 2)
    whole = np.concatenate([data.slide_features(slide) for slide in bag.slides])
    assert len(bag) == len(whole)
    np.testing.assert_array_equal(bag[:], whole)
    np.testing.assert_array_equal(bag[:1], whole[:1])
    middle = bag.slides[0].n_patches
    for rows in ([0, middle - 1, middle, len(whole) - 1], [middle + 1], [2], [], list(range(middle))):
        np.testing.assert_array_equal(bag[np.array(rows, int)], whole[rows])
    assert set(bags_of(data, [patient, "nobody"])) == {patient}


def test_attention_mil_is_the_same_as_on_arrays(data):
    bags = list(bags_of(data, data.train).values())
    labels = np.arange(len(bags)) % 2
    few = AbmilSettings(hidden=8, epochs=2, patches=5)
    found = fit_abmil(bags, labels, None, 2, few)(bags[:4])
    arrays = [bag[:] for bag in bags]
    np.testing.assert_array_equal(found, fit_abmil(arrays, labels, None, 2, few)(arrays[:4]))


def most_memory(work):
    """Bytes of arrays alive at once while it runs, those it began with left out."""
    work()  # what is imported here stays
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_patches_of_all_patients_are_never_in_memory_together(data):
    """Attention MIL keeps a batch of patients for its gradient; statistics of neighbours need one slide at a time."""
    whole = sum(slide.n_bytes for slide in data.cohort.slides.slides)

    def attention_mil():
        bags = list(bags_of(data, data.cohort.patients).values())
        few = AbmilSettings(hidden=8, epochs=1, batch_size=4)
        fit_abmil(bags, np.arange(len(bags)) % 2, (bags, np.arange(len(bags)) % 2), 2, few)(bags)

    def neighbours():
        read_neighbourhoods(parts_of(data))

    assert most_memory(attention_mil) < whole / 5
    assert most_memory(neighbours) < whole / 5
