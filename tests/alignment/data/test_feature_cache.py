"""The cache of patch features: one budget for all processes, the values of the files, and no change unnoticed."""

import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader

from exaonepath.alignment.data import feature_cache
from exaonepath.alignment.data.dataset import PatientDataset
from exaonepath.alignment.data.feature_cache import FeatureCache
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.slides import read_slides
from exaonepath.alignment.data.standardizer import Standardizer
from exaonepath.errors import DamagedFileError, DataFileError, SettingsError
from exaonepath.files.features import read_features


@pytest.fixture
def table(write_csv):
    """`table(files)`: the slides of a table with these features files."""

    def read(*files, **options):
        rows = [[f"P{at}", f"S{at}", str(file)] for at, file in enumerate(files)]
        report = CohortReport()
        found = read_slides(write_csv("slides.csv", ["patient", "slide", "features"], rows), report, **options)
        report.raise_errors()
        return found.slides

    return read


def same(rows, file, chosen=None):
    stored = read_features(file)
    chosen = slice(None) if chosen is None else chosen
    np.testing.assert_array_equal(rows.features, stored.features[chosen])
    np.testing.assert_array_equal(rows.coords, stored.coords[chosen])
    np.testing.assert_array_equal(rows.contour_index, stored.contour_index[chosen])


def test_the_budget_holds_and_what_is_stored_is_read_once(table, write_slide):
    files = [write_slide(f"{n}.h5", n=n) for n in (100, 101, 102, 103)]
    slides = table(*files)
    budget = sum(slide.n_bytes for slide in slides[:2]) + 200
    cache = FeatureCache(slides, budget)
    for _ in range(3):
        for slide, file in zip(slides, files, strict=True):
            same(cache.read(slide), file)
            same(cache.read(slide, lambda c, _: np.arange(3, len(c), 7)), file, slice(3, None, 7))
            assert cache.n_bytes <= budget
    assert cache.n_opened == 2 + 2 * 2 * 3
    assert cache.capacity == budget
    assert FeatureCache(slides, 1 << 40).capacity < 2 * sum(slide.n_bytes for slide in slides)
    nothing = FeatureCache(slides, 0)
    same(nothing.read(slides[0]), files[0])
    assert nothing.n_bytes == 0
    assert FeatureCache((), 1 << 20).capacity == 0


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_a_caller_may_change_what_it_got(table, write_slide, budget):
    file = write_slide("a.h5")
    cache = FeatureCache(table(file), budget)
    for choose in (None, lambda coords, _: np.arange(len(coords))):
        rows = cache.read(cache._slides[0], choose)
        for tensor in (rows.features, rows.coords, rows.contour_index):
            tensor.zero_()
        same(cache.read(cache._slides[0], choose), file)


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize("choose", [None, lambda coords, _: np.arange(0, len(coords), 3)])
def test_float16_gives_the_values_of_converting_first(table, write_slide, budget, choose):
    half, full = write_slide("half.h5", n=60, feature_dtype="float16"), write_slide("full.h5", n=60)
    converted = full.with_name("converted.h5")
    converted.write_bytes(full.read_bytes())
    with h5py.File(converted, "r+") as file:
        file["features"][:] = file["features"][:].astype(np.float16)
        for name in [name for name in file.attrs if name.startswith("crc32")]:
            del file.attrs[name]
    slides = table(half, converted)
    assert [slide.half for slide in slides] == [True, False]
    cache = FeatureCache(slides, budget)
    a, b = (cache.read(slide, choose) for slide in slides)
    np.testing.assert_array_equal(a.features, b.features)
    assert a.features.dtype == b.features.dtype
    assert slides[0].n_bytes - 60 * 12 == (slides[1].n_bytes - 60 * 12) // 2


def test_workers_share_the_budget_and_read_each_file_once(small):
    standardizer = Standardizer.fit(small, small.patients[:30])[0]

    def epochs(cache_bytes, workers):
        data = PatientDataset(small, standardizer, slides="all", patch_budget=20, cache_bytes=cache_bytes)
        loader = DataLoader(data, batch_size=1, collate_fn=_sums, num_workers=workers, persistent_workers=workers > 0)
        found = []
        for number in range(3):
            data.set_epoch(number)
            found.append(list(loader))
        return found, data.cache

    n = len(small.slides)
    expected, none = epochs(0, 0)
    assert none.n_opened == 3 * n
    for workers in (0, 2):
        found, cache = epochs(1 << 30, workers)
        assert found == expected
        assert cache.n_opened == n
        found, cache = epochs(cache.capacity // 3, workers)
        assert found == expected
        assert cache.n_bytes <= cache.capacity
        assert 2.2 * n < cache.n_opened < 2.5 * n  # a third is read once, the rest three times


def _sums(rows):
    return [(row.patient, [float(slide.features.sum()) for slide in row.slides]) for row in rows]


def test_a_copy_for_a_spawned_worker_takes_its_share(table, write_slide, monkeypatch):
    files = [write_slide(f"{n}.h5", n=200) for n in range(4)]
    slides = table(*files)
    size = slides[0].n_bytes
    cache = FeatureCache(slides, 4 * size)
    cache.read(slides[0])
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301 - what a spawned worker gets
    monkeypatch.setattr(feature_cache, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    assert (copy.n_bytes, copy.capacity) == (0, 2 * size)
    for slide, file in zip(slides, files, strict=True):
        same(copy.read(slide), file)
    assert copy.n_bytes <= 2 * size


def test_a_file_that_fails_fails_again(table, write_slide):
    good, bad = write_slide("a.h5", n=50), write_slide("b.h5", n=50)
    slides = table(good, bad)
    with h5py.File(bad, "r") as file:
        offset = file["features"].id.get_offset()
    with bad.open("r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)
        file.seek(offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    cache = FeatureCache(slides, 1 << 20)
    for _ in range(3):
        with pytest.raises(DamagedFileError, match=r"b\.h5"):
            cache.read(slides[1])
    same(cache.read(slides[0]), good)


def test_other_content_of_the_same_shape_is_noticed(table, write_slide, tmp_path):
    file = write_slide("a.h5", n=50)
    (slide,) = table(file)
    # The same content, written again (a copy that was restored): it may be used.
    content = file.read_bytes()
    os.utime(file, (1, 1))
    file.write_bytes(content)
    FeatureCache([slide], 0).read(slide)
    with h5py.File(write_slide("b.h5", n=51), "r") as other:
        values = other["features"][:50]
    write_slide("c.h5", n=50)
    _rewrite(tmp_path / "a.h5", values)
    for budget in (0, 1 << 20):
        with pytest.raises(DataFileError, match=r"a\.h5 changed since the cohort was checked: it holds other features"):
            FeatureCache([slide], budget).read(slide)
    FeatureCache([slide], 0).read(replace(slide, header=""))  # without a check, nothing is known


def _rewrite(path, values):
    from exaonepath.files.features import write_features

    n = len(values)
    coords = np.stack([np.arange(n), np.zeros(n)], 1).astype(np.int32) * 256
    write_features(path, [(np.arange(n), values)], coords, (np.arange(n) >= n // 2) * 1, values.shape[1], (), {})


def test_without_checksums_the_times_of_the_file_count(table, write_slide, drop_checksums):
    file = write_slide("a.h5", n=50)
    with h5py.File(file, "r+") as opened:
        drop_checksums(opened)
    (slide,) = table(file)
    cache = FeatureCache([slide], 0)
    cache.read(slide)
    file.chmod(0o600)
    cache.read(slide)
    os.utime(file, ns=(0, 10**18))
    with pytest.raises(DataFileError, match="it was replaced or written to"):
        cache.read(slide)


def test_memory_that_is_not_granted_is_an_error(table, write_slide, monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    slides = table(write_slide("a.h5"))
    monkeypatch.setattr(feature_cache.mmap, "mmap", refuse)
    with pytest.raises(SettingsError, match=r"data\.cache_mb.* cannot have .*allocate"):
        FeatureCache(slides, 1 << 20)
