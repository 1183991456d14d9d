"""Exported files, read back the way TRIDENT and Patho-Bench read them."""

import h5py
import numpy as np
import pytest

from exaonepath.alignment.metrics.exports import export_patches, export_pooled, export_slide
from exaonepath.errors import SettingsError


def load_h5(path, keys):
    """What their loaders do: whole datasets, attributes per dataset."""
    with h5py.File(path) as file:
        return {k: file[k][:] for k in keys}, {k: dict(file[k].attrs) for k in keys}


def test_pooled_samples_as_patho_bench_reads_them(tmp_path):
    rows = {"TCGA-A1": np.arange(5, dtype=np.float64), "TCGA-B2.x": np.ones(5)}
    paths = export_pooled(tmp_path / "pooled", rows, model="abc")
    found = {p.stem: p for p in (tmp_path / "pooled").iterdir() if p.suffix == ".h5"}  # id: the name less ".h5"
    assert list(found.values()) == sorted(paths) or set(found.values()) == set(paths)
    assert set(found) == set(rows)
    for sample, path in found.items():
        assets, attrs = load_h5(path, ["features"])
        features = assets["features"].squeeze(0)  # raises where the first axis is not 1
        assert features.ndim == 1
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, rows[sample].astype(np.float32))
        assert attrs["features"]["model"] == "abc"


def test_patches_as_patho_bench_and_trident_read_them(tmp_path):
    features, coords = np.random.default_rng(0).normal(size=(4, 3)), np.arange(8).reshape(4, 2)
    path = export_patches(tmp_path / "features_x", "s1", features, coords, patch_size_level0=512)
    assets, attrs = load_h5(path, ["features", "coords"])
    assert path == tmp_path / "features_x" / "s1.h5"
    np.testing.assert_array_equal(assets["features"], features.astype(np.float32))
    np.testing.assert_array_equal(assets["coords"], coords)
    assert attrs["coords"]["patch_size_level0"] == 512
    assert attrs["features"]["name"] == "s1"


def test_slides_as_trident_writes_them(tmp_path):
    path = export_slide(
        tmp_path, "s1", np.ones(6), np.zeros((2, 2), int), patch_size_level0=256, coords_attrs={"overlap": 0}
    )
    assets, attrs = load_h5(path, ["features", "coords"])
    assert assets["features"].shape == (6,)
    assert assets["coords"].shape == (2, 2)
    assert attrs["coords"]["overlap"] == 0


def test_bad_input_writes_nothing(tmp_path):
    for rows, message in (
        ({"a": np.ones(3), "b": np.ones(4)}, "width"),
        ({"a": np.ones(3), "../b": np.ones(3)}, "file name"),
        ({"a": np.ones(3), "b": np.full(3, np.nan)}, "of b must be finite"),
    ):
        with pytest.raises(SettingsError, match=message):
            export_pooled(tmp_path / "out", rows)
    with pytest.raises(SettingsError, match="4 feature rows for 3"):
        export_patches(tmp_path / "out", "s", np.ones((4, 2)), np.zeros((3, 2), int), patch_size_level0=256)
    with pytest.raises(SettingsError, match="integers"):
        export_slide(tmp_path / "out", "s", np.ones(4), np.zeros((3, 2)), patch_size_level0=256)
    assert not list(tmp_path.rglob("*.h5"))
