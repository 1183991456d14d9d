"""Rows of patients: what they hold, and that they depend on seed, epoch and patient alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from exaonepath.alignment.data.dataset import PatientDataset, collate_patients
from exaonepath.alignment.data.slides import SlideTable
from exaonepath.alignment.data.standardizer import Standardizer
from exaonepath.alignment.modalities import MODALITIES
from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.features import read_features


@pytest.fixture(scope="module")
def standardizer(small):
    return Standardizer.fit(small, small.patients[:30])[0]


def test_a_row_holds_what_the_files_hold(small, standardizer):
    data = PatientDataset(small, standardizer, small.patients[10:20], slides="all")
    assert len(data) == 10
    rows = standardizer.align(small)[0]
    for at in range(10):
        row = data[at]
        assert row.patient == small.patients[10 + at]
        assert row.patient_index == 10 + at
        assert row.available.tolist() == small.availability()[10 + at].tolist()
        assert [s.slide for s in row.slides] == [s.slide for s in small.slides.of(row.patient)]
        for got, slide in zip(row.slides, small.slides.of(row.patient), strict=True):
            stored = read_features(slide.features)
            np.testing.assert_array_equal(got.features, stored.features)
            np.testing.assert_array_equal(got.coords, stored.coords)
            np.testing.assert_array_equal(got.contour_index, stored.contour_index)
        for name in ("rna", "snp", "cnv", "methylation"):
            patients = small.modalities[name].patients
            if row.patient in patients:
                expected = rows[name].rows([patients.index(row.patient)])[0]
                np.testing.assert_array_equal(row.omics[name], expected)
            else:
                assert not row.omics[name].any()


def digest(rows):
    return [
        (row.patient, [(s.slide, len(s.features), float(s.features.sum())) for s in row.slides])
        for row in sorted(rows, key=lambda row: row.patient)
    ]


def one(rows):
    return rows[0]


def test_draws_depend_on_seed_epoch_and_patient_alone(small, standardizer):
    data = PatientDataset(small, standardizer, patch_budget=20, seed=5)

    def epoch(number, **loader):
        data.set_epoch(number)
        return digest(DataLoader(data, batch_size=1, collate_fn=one, **loader))

    first = epoch(0)
    assert first == epoch(0)
    assert first == epoch(0, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert first == epoch(0, num_workers=2)
    assert first != epoch(1)
    again = PatientDataset(small, standardizer, patch_budget=20, seed=5, cache_bytes=0)
    assert first == digest([again[i] for i in reversed(range(len(again)))])
    other = PatientDataset(small, standardizer, patch_budget=20, seed=6)
    assert first != digest([other[i] for i in range(len(other))])
    part = PatientDataset(small, standardizer, small.patients[3:7], patch_budget=20, seed=5)
    assert digest([part[i] for i in range(4)]) == first[3:7]


def test_the_epoch_reaches_workers_that_stay(small, standardizer):
    data = PatientDataset(small, standardizer, patch_budget=20)
    loader = DataLoader(data, batch_size=1, collate_fn=one, num_workers=1, persistent_workers=True)
    seen = []
    for number in range(2):
        data.set_epoch(number)
        seen.append(digest(loader))
    fresh = PatientDataset(small, standardizer, patch_budget=20)
    for number in range(2):
        fresh.set_epoch(number)
        assert seen[number] == digest([fresh[i] for i in range(len(fresh))])


def test_the_three_ways_to_choose_slides(small, standardizer):
    drawn, all_of_them, rows = (PatientDataset(small, standardizer, slides=how) for how in ("one", "all", "rows"))
    several = [p for p in small.patients if len(small.slides.of(p)) == 2]
    assert several
    at = small.patients.index(several[0])
    assert len(drawn[at].slides) == 1
    assert len(all_of_them[at].slides) == 2
    assert len(rows) == len(small.slides)
    assert len({row.patient_index for row in (rows[i] for i in range(len(rows)))}) == len(small.patients)
    names = set()
    for epoch in range(20):
        drawn.set_epoch(epoch)
        names.add(drawn[at].slides[0].slide)
    assert names == {s.slide for s in small.slides.of(several[0])}


def test_a_batch_keeps_slides_ragged(small, standardizer):
    data = PatientDataset(small, standardizer, slides="all")
    short = PatientDataset(small, standardizer, slides="all", patch_budget=11)
    rows = [data[0], short[1], data[2]]
    batch = collate_patients(rows)
    assert len(batch) == 3
    assert batch.patients == small.patients[:3]
    assert batch.patient_index.tolist() == [0, 1, 2]
    assert set(batch.available) == set(MODALITIES)
    for at, name in enumerate(MODALITIES):
        assert batch.available[name].tolist() == [bool(row.available[at]) for row in rows]
    assert batch.profiles["rna"].shape == (3, standardizer.manifest.dims["rna"])
    assert list(batch.slides.patients) == [r for r in range(3) for _ in small.slides.of(small.patients[r])]
    slides = [slide for row in rows for slide in row.slides]
    assert batch.slides.lengths == tuple(len(slide.features) for slide in slides)
    assert len(set(batch.slides.lengths)) > 1
    for mine, slide in zip(batch.slides.split(), slides, strict=True):
        for name in ("features", "coords", "contour_index"):
            torch.testing.assert_close(getattr(mine, name), getattr(slide, name), rtol=0, atol=0)
    assert batch.slides.coords.dtype == torch.int32
    assert batch.to("cpu").slides.features is not None
    empty = collate_patients([])
    assert (len(empty), empty.slides, dict(empty.profiles), dict(empty.available)) == (0, None, {}, {})


@pytest.mark.parametrize("choice", ["one", "all", "rows"])
@pytest.mark.parametrize("options", [{}, {"patch_budget": 11}, {"patch_budget": 11, "cache_bytes": 0}])
def test_a_batch_is_that_of_its_rows(small, standardizer, choice, options):
    data = PatientDataset(small, standardizer, slides=choice, **options)
    rows = [5, 0, 7, 3]
    batch, expected = data.batch(rows, 2), collate_patients([data.row(row, 2) for row in rows])
    assert batch.patients == expected.patients
    assert (batch.slides.lengths, batch.slides.patients) == (expected.slides.lengths, expected.slides.patients)
    for name in ("features", "coords", "contour_index"):
        assert torch.equal(getattr(batch.slides, name), getattr(expected.slides, name))
    for name in expected.profiles:
        assert torch.equal(batch.profiles[name], expected.profiles[name])
    assert len(data.batch([], 0)) == 0
    first = small.patients[0]
    fewer = replace(small, slides=SlideTable(tuple(s for s in small.slides.slides if s.patient != first)))
    data = PatientDataset(fewer, standardizer, slides=choice, **options)
    assert data.batch([0], 0).slides is None
    assert torch.equal(data.batch([0, 1], 0).slides.features, data.batch([1], 0).slides.features)


def test_what_a_caller_does_to_a_row_does_not_reach_the_cache(small, standardizer):
    data = PatientDataset(small, standardizer)
    before = data[0].slides[0].features.clone()
    data[0].slides[0].features.zero_()
    torch.testing.assert_close(data[0].slides[0].features, before, rtol=0, atol=0)


def test_a_slide_that_changed_under_way_is_named(small, standardizer, write_slide):
    data = PatientDataset(small, standardizer, cache_bytes=0)
    slide = data._slides[small.patients[0]][0]
    data._slides[small.patients[0]] = [replace(slide, features=write_slide("other.h5", n=3, dim=8))]
    with pytest.raises(DataFileError, match=r"other\.h5 changed"):
        data[0]
    data._slides[small.patients[0]] = [replace(slide, features=write_slide("gone.h5").with_name("none.h5"))]
    with pytest.raises(DataFileError, match="no such file"):
        data[0]


def test_arguments_that_cannot_be_used(small, standardizer):
    with pytest.raises(SettingsError, match="sideways"):
        PatientDataset(small, standardizer, slides="sideways")
    with pytest.raises(SettingsError, match="budget is 0"):
        PatientDataset(small, standardizer, patch_budget=0)
    with pytest.raises(SettingsError, match="nobody"):
        PatientDataset(small, standardizer, ["nobody"])
