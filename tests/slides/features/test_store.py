"""Reading features files: every way in which one can be wrong has its own message."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from exaonepath.errors import DamagedFileError, DataFileError, ForeignFileError
from exaonepath.files.features import PatchFailure, merge_by_index, read_features, write_features

N, D = 50, 768


@pytest.fixture
def original(tmp_path):
    """A file as the original writes it: three datasets, no attributes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "features.h5"
    with h5py.File(path, "w") as file:
        file["features"] = rng.standard_normal((N, D)).astype(np.float32)
        file["coords"] = rng.integers(0, 10**5, (N, 2)).astype(np.int32)
        file["contour_index"] = (np.arange(N) // 9).astype(np.int32)
    return path


def change(path, **datasets):
    """Replace datasets; None deletes."""
    with h5py.File(path, "a") as file:
        for name, values in datasets.items():
            del file[name]
            if values is not None:
                file[name] = values


def test_a_file_of_the_original(original):
    stored = read_features(original, expected_dim=D)
    with h5py.File(original) as file:
        assert np.array_equal(stored.features, file["features"][:])
        assert np.array_equal(stored.coords, file["coords"][:])
        assert np.array_equal(stored.contour_index, file["contour_index"][:])
    assert [a.dtype for a in (stored.features, stored.coords, stored.contour_index)] == [np.float32, np.int32, np.int32]
    assert stored.attrs == {}
    assert stored.failures == ()


def test_no_contour_index_is_one_fragment(original):
    change(original, contour_index=None)
    assert np.array_equal(read_features(original).contour_index, np.zeros(N))


def test_coords_may_be_left_out_only_where_allowed(original):
    change(original, coords=None)
    with pytest.raises(DataFileError, match="lacks coords"):
        read_features(original)
    assert read_features(original, require_coords=False).coords is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_taken(original, dtype):
    change(original, features=np.ones((N, D), dtype))
    assert read_features(original).features.dtype == np.float32


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        ({"features": None}, "lacks features"),
        ({"features": np.zeros((1, N, D), np.float32)}, r"features \[1, 50, 768\], one slide as a batch"),
        ({"features": np.zeros((2, N, D), np.float32)}, r"must be floating point \[N, D\], got float32 \[2, 50, 768\]"),
        ({"features": np.zeros(N, np.float32)}, r"\[N, D\]"),
        ({"features": np.zeros((N, D), np.int64)}, "floating point"),
        ({"coords": np.zeros((N - 1, 2), np.int32)}, "49 rows in coords but 50 in features"),
        ({"coords": np.zeros((N, 3), np.int32)}, r"coords must be integers \[N, 2\], got int32 \[50, 3\]"),
        ({"coords": np.zeros((N, 2), np.float32)}, "integers"),
        ({"contour_index": np.zeros(N + 2, np.int32)}, "52 rows in contour_index but 50 in features"),
        ({"contour_index": np.zeros((N, 1), np.int32)}, r"contour_index must be integers \[N\]"),
    ],
)
def test_wrong_datasets(original, datasets, says):
    change(original, **datasets)
    with pytest.raises(DataFileError, match=says):
        read_features(original)


def test_wrong_width(original):
    with pytest.raises(DataFileError, match="768 wide, the model takes 1024"):
        read_features(original, expected_dim=1024)


def test_features_that_are_not_finite(original):
    with h5py.File(original, "a") as file:
        file["features"][3, 5] = np.nan
        file["features"][40:48, 0] = np.inf
    with pytest.raises(DataFileError, match=r"9 of 50 feature rows .* \(row 3, 40, 41, 42, 43, \.\.\. \(9 in all\)\)"):
        read_features(original)


def test_missing_file(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        read_features(tmp_path / "absent.h5")


def test_not_hdf5(tmp_path):
    path = tmp_path / "text.h5"
    path.write_text("features")
    with pytest.raises(ForeignFileError, match="cannot be read as HDF5: it is another kind of file"):
        read_features(path)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_half_a_file(original, keep):
    data = original.read_bytes()
    original.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_features(original)


def test_a_damaged_chunk(original):
    with h5py.File(original, "a") as file:
        values = file["features"][:]
        del file["features"]
        stored = file.create_dataset("features", data=values, chunks=(10, D), compression="gzip")
        place = stored.id.get_chunk_info(2)
    with original.open("r+b") as raw:
        raw.seek(place.byte_offset)
        raw.write(b"\x00" * 200)
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_features(original)


def test_marked_as_not_complete(original):
    with h5py.File(original, "a") as file:
        file.attrs["complete"] = False
    with pytest.raises(DataFileError, match="not complete"):
        read_features(original)


def test_written_files_read_back(tmp_path):
    rng = np.random.default_rng(1)
    features = rng.standard_normal((N, 7)).astype(np.float32)
    coords, contours = rng.integers(0, 1000, (N, 2)), rng.integers(0, 4, N)
    failures = [PatchFailure(30, *coords[30].tolist(), "spoilt: ümläut"), PatchFailure(2, *coords[2].tolist(), "x")]
    kept = np.delete(np.arange(N), [2, 30])
    # in between each other, as when recovered patches are added to those of an earlier file
    first, second = kept[kept % 3 != 0], kept[kept % 3 == 0]
    recovered = [(second[:4], features[second[:4]]), (second[4:], features[second[4:]])]
    blocks = merge_by_index(iter([(first, features[first])]), iter(recovered))
    path = tmp_path / "out.h5"
    assert write_features(path, blocks, coords, contours, 7, failures, {"weights": "random:0"}) == N - 2
    stored = read_features(path)
    assert np.array_equal(stored.features, features[kept])
    assert np.array_equal(stored.coords, coords[kept])
    assert np.array_equal(stored.contour_index, contours[kept])
    assert stored.failures == (failures[1], failures[0])
    assert stored.attrs == {"weights": "random:0", "complete": True, "n_features": N - 2, "n_failed": 2}


def test_blocks_that_do_not_cover_the_patches_leave_no_file(tmp_path):
    blocks = [(np.arange(3), np.zeros((3, 7), np.float32))]
    with pytest.raises(DataFileError, match="3 feature rows for 5"):
        write_features(tmp_path / "out.h5", blocks, np.zeros((5, 2), np.int32), np.zeros(5, np.int32), 7, [], {})
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_removed_by_its_owner_is_not_written_to_by_the_next(tmp_path):
    """The next process opened the file before the owner removed it, and gets the lock afterwards."""
    from exaonepath.slides.features import partial

    path = tmp_path / ".f.part"
    owner = partial.PartialFile(path, {"a": 1})
    locked = partial._lock

    def lock_after_the_owner_has_gone(file, where):
        if not owner._file.closed:
            owner.remove()
        locked(file, where)

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(partial, "_lock", lock_after_the_owner_has_gone)
        late = partial.PartialFile(path, {"a": 1})
    assert path.exists()
    assert late._file.fileno() >= 0
    late.close()
