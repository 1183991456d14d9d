"""What read_patches accepts, and what it says about everything else."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from exaonepath.errors import DataFileError
from exaonepath.files.patches import read_contours, read_patches


@pytest.fixture
def original(tmp_path):
    """A file as EXAONE Path writes it: resizable datasets, none of our attributes."""
    path = tmp_path / "case.h5"
    with h5py.File(path, "w") as file:
        coords = file.create_dataset("coords", data=np.arange(10, dtype=np.int32).reshape(5, 2), maxshape=(None, 2))
        coords.attrs.update(patch_size=259, patch_level=1, name="case")
        file.create_dataset("contour_index", data=np.array([0, 0, 1, 1, 2], np.int32), maxshape=(None,))
        file.attrs.update(complete=True, n_coords=5)
    return path


def test_original(original):
    patches = read_patches(original)
    np.testing.assert_array_equal(patches.coords, np.arange(10).reshape(5, 2))
    np.testing.assert_array_equal(patches.contour_index, [0, 0, 1, 1, 2])
    assert patches.coords.dtype == patches.contour_index.dtype == np.int32
    assert (patches.patch_size, patches.patch_level, patches.name) == (259, 1, "case")
    assert patches.slide_fingerprint is None
    assert patches.settings_hash is None
    assert (patches.has_outlines, patches.outcome) == (False, None)
    with pytest.raises(DataFileError, match="holds no contours"):
        read_contours(original)


def test_without_contour_index(original):
    with h5py.File(original, "r+") as file:
        del file["contour_index"]
    np.testing.assert_array_equal(read_patches(original).contour_index, np.zeros(5))


def test_other_integers_and_missing_names(original):
    with h5py.File(original, "r+") as file:
        del file["coords"], file.attrs["n_coords"]
        file.create_dataset("coords", data=np.arange(10, dtype=np.uint64).reshape(5, 2)).attrs["patch_size"] = 256
    patches = read_patches(original)
    assert patches.coords.dtype == np.int32
    assert (patches.name, patches.patch_level) == ("case", 0)


def _replace(name, data, **attributes):
    def change(file):
        kept = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=data).attrs.update(kept | attributes)

    return change


def _drop_patch_size(file):
    del file["coords"].attrs["patch_size"]


def _drop_complete(file):
    del file.attrs["complete"]


def _drop_coords(file):
    del file["coords"]


def _coords_group(file):
    del file["coords"]
    file.create_group("coords")


def _unfinished(file):
    file.attrs["complete"] = False


def _wrong_count(file):
    file.attrs["n_coords"] = 4


def _text_size(file):
    file["coords"].attrs["patch_size"] = "large"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_complete, "half written"),
        (_unfinished, "half written"),
        (_drop_coords, "lacks coords"),
        (_coords_group, "lacks coords"),
        (_drop_patch_size, "no patch_size"),
        (_text_size, "patch_size is large"),
        (_wrong_count, "n_coords = 4 and holds 5"),
        (_replace("coords", np.zeros((5, 2), np.int32), patch_size=0), "patch_size is 0"),
        (_replace("coords", np.zeros((5, 2))), "coords must be integers .* got float64"),
        (_replace("coords", np.zeros((5, 3), np.int32)), r"must be integers \[N, 2\], got int32 \[5, 3\]"),
        (_replace("coords", np.zeros(10, np.int32)), r"must be integers \[N, 2\], got int32 \[10\]"),
        (_replace("coords", np.full((5, 2), 1 << 40)), "beyond 32 bits"),
        (_replace("contour_index", np.zeros(4, np.int32)), r"contour_index must be integers \[5\], got int32 \[4\]"),
        (
            _replace("contour_index", np.zeros((5, 1), np.int32)),
            r"must be integers \[5\], got int32 \[5, 1\]",
        ),
        (_replace("contour_index", np.zeros(5)), "contour_index must be integers .* got float64"),
    ],
)
def test_refused(original, change, message):
    with h5py.File(original, "r+") as file:
        change(file)
    with pytest.raises(DataFileError, match=message) as caught:
        read_patches(original)
    assert str(original) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut"])
def test_not_hdf5(original, content):
    original.write_bytes(original.read_bytes()[:1000] if content is None else content)
    with pytest.raises(DataFileError, match=r"case\.h5"):
        read_patches(original)


def test_missing_file(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        read_patches(tmp_path / "none.h5")
