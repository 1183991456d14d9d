"""What was stored is what is read: no flipped bit of a file of ours gets through with other numbers."""

import contextlib

import h5py
import numpy as np
import pytest

from exaonepath.errors import DamagedFileError, DataFileError
from exaonepath.files import checksums
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import PatchFailure, read_features, write_features
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import atomic_h5

N, D = 40, 12


def write(path):
    """A file with every kind of content: floats, integers, strings, an empty dataset, attributes."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((N, D)).astype(np.float32)
    failures = [PatchFailure(3, 30, 40, "truncated tile"), PatchFailure(9, 1, 2, "ümläut")]
    kept = np.delete(np.arange(N), [3, 9])
    attrs = {"weights": "random:0", "slide_path": "/data/a.svs", "settings_hash": "ab" * 32, "patch_size": 256}
    write_features(path, [(kept, features[kept])], rng.integers(0, 9999, (N, 2)), kept_index(), D, failures, attrs)


def kept_index():
    return (np.arange(N) // 7).astype(np.int32)


def write_embedding(path):
    rng = np.random.default_rng(1)
    with atomic_h5(path) as file:
        for name, shape in (("slide_embedding", (D,)), ("patch_embedding", (N, D))):
            file.array(name, rng.standard_normal(shape).astype(np.float32))
        file.array("coords", rng.integers(0, 9999, (N, 2)).astype(np.int32))
        file.array("contour_index", kept_index())
        file.attributes({"weights": "random:0", "settings_hash": "cd" * 32, "complete": True})


def content(read, path):
    """What a reader returns, as bytes that can be compared."""
    stored = read(path)
    return [value.tobytes() if isinstance(value, np.ndarray) else repr(value) for value in vars(stored).values()]


@pytest.mark.parametrize(
    ("make", "read"), [(write, read_features), (write_embedding, read_embedding)], ids=["features", "embedding"]
)
def test_no_flipped_bit_is_accepted_with_other_content(tmp_path, make, read):
    """Bits spread over the whole file: data, attributes, HDF5's own tables. What is accepted is unchanged."""
    path = tmp_path / "whole.h5"
    make(path)
    whole, expected = path.read_bytes(), content(read, path)
    damaged = tmp_path / "damaged.h5"
    refused = 0
    step = max(1, 8 * len(whole) // 600) | 1
    for bit in range(0, 8 * len(whole), step):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        try:
            assert content(read, damaged) == expected, f"bit {bit % 8} of byte {bit // 8}"
        except DataFileError:
            refused += 1
    assert refused > 100


def test_every_bit_of_the_data_is_guarded(tmp_path):
    path = tmp_path / "whole.h5"
    write_embedding(path)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        places = [(file[name].id.get_offset(), file[name].id.get_storage_size()) for name in file]
    for offset, size in places:
        for byte in range(offset, offset + size, 7):
            flipped = bytearray(whole)
            flipped[byte] ^= 1 << byte % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedFileError, match="checksum"):
                read_embedding(path)


@pytest.mark.parametrize("name", ["weights", "slide_path", "patch_size", "complete"])
def test_a_changed_attribute_is_damage(tmp_path, name):
    path = tmp_path / "f.h5"
    write(path)
    with h5py.File(path, "a") as file:
        file.attrs[name] = {"patch_size": 512, "complete": False}.get(name, "random:1")
    with pytest.raises(DamagedFileError, match="attributes"):
        read_features(path)


@pytest.mark.parametrize("name", [checksums.COVERED, checksums.ATTRIBUTES, "features"])
def test_checksums_cannot_be_lost_one_by_one(tmp_path, name):
    path = tmp_path / "f.h5"
    write(path)
    with h5py.File(path, "a") as file:
        if name == "features":
            del file.attrs[checksums.of_dataset(name)]
        else:
            del file.attrs[name]
    with pytest.raises(DamagedFileError):
        read_features(path)


def test_data_of_the_same_kind_in_the_wrong_place_are_damage(tmp_path):
    """Rows, blocks and whole datasets exchanged: every number in the file is one that was stored."""
    path = tmp_path / "f.h5"
    n = 3 * 256
    values = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)

    def make():
        with atomic_h5(path) as file:
            file.array("features", values)
            file.array("other", values[::-1].copy())

    for change in (
        lambda file: file["features"].write_direct(np.roll(values, 256, axis=0)),
        lambda file: file["features"].write_direct(values[np.r_[1, 0, 2:n]]),
        lambda file: (file.move("features", "x"), file.move("other", "features"), file.move("x", "other")),
    ):
        make()
        with h5py.File(path, "a") as file:
            change(file)
        with open_h5(path) as stored, pytest.raises(DamagedFileError):
            stored.verify()


def test_what_a_user_adds_is_no_damage(tmp_path):
    path = tmp_path / "f.h5"
    write(path)
    with h5py.File(path, "a") as file:
        file.attrs["note"] = "mine"
        file["clusters"] = np.zeros(N - 2)
        file["features"].attrs["unit"] = "1"
    assert read_features(path).attrs["weights"] == "random:0"


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1000])
def test_parts_of_a_dataset_are_checked_on_their_own(tmp_path, rows):
    path = tmp_path / "f.h5"
    values = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)
    with atomic_h5(path) as file:
        appended = file.rows("x", values.shape, "<f4")
        for start in range(0, rows, 100):
            appended.append(values[start : start + 100])
        appended.finish()
    with open_h5(path) as file:
        stored = file.dataset("x", "f", (None, 3))
        assert np.array_equal(stored.read(), values)
        for start, stop in ((0, rows), (rows // 3, rows // 2), (rows, rows)):
            assert np.array_equal(stored.rows(start, stop), values[start:stop])
    if rows < 1000:
        return
    with h5py.File(path, "a") as file:
        file["x"][700, 1] += 1
    with open_h5(path) as file:
        stored = file.dataset("x", "f", (None, 3))
        assert np.array_equal(stored.rows(10, 500), values[10:500])
        with pytest.raises(DamagedFileError, match="rows from 512"):
            stored.rows(690, 701)


def test_more_rows_than_an_attribute_has_room_for(tmp_path):
    n = 256 * 8192 + 5
    with atomic_h5(tmp_path / "f.h5") as file:
        file.array("x", np.arange(n, dtype=np.int32))
    with open_h5(tmp_path / "f.h5") as file:
        file.verify()
        assert file.dataset("x", "iu", (n,)).rows(n - 1, n).tolist() == [n - 1]


@pytest.mark.parametrize("written", [2, 4])
def test_a_dataset_that_was_not_filled_leaves_no_file(tmp_path, written):
    def work():
        with atomic_h5(tmp_path / "f.h5") as file:
            rows = file.rows("x", (3, 2), "<f4")
            rows.append(np.zeros((written, 2), np.float32))
            rows.finish()

    with pytest.raises(ValueError, match="3 rows"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path):
    path = tmp_path / "f.h5"
    with atomic_h5(path) as file:
        file.strings("s", ["a\udcff.svs"])
        file.attributes({"slide_path": "b\udcfe.svs"})
    with open_h5(path) as file:
        assert file.strings("s", 1) == [r"a\udcff.svs"]
        assert file.attribute("slide_path") == r"b\udcfe.svs"


@pytest.mark.parametrize(("at", "value"), [(24, 2**60), (24, 0), (16, 0), (8, 8)])
def test_a_damaged_heap_of_strings_is_no_endless_loop(tmp_path, at, value):
    """HDF5 follows the sizes of the objects in it, for ever where one is nonsense."""
    path = tmp_path / "f.h5"
    write(path)
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + at : heap + at + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedFileError):
        read_features(path)


def test_files_without_checksums_are_read_as_before(tmp_path):
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.ones((3, 2), np.float32), np.zeros((3, 2), np.int32)
    with open_h5(path) as file:
        assert not file.has_checksums
    assert read_features(path).features.tolist() == [[1, 1]] * 3


def test_random_damage_is_always_a_typed_error(tmp_path):
    path = tmp_path / "f.h5"
    write(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        start, length = int(rng.integers(len(whole))), int(rng.integers(1, 300))
        damaged[start : start + length] = rng.integers(0, 256, len(damaged[start : start + length]), np.uint8).tobytes()
        path.write_bytes(damaged[: len(whole) - int(rng.integers(0, 2)) * int(rng.integers(len(whole)))])
        with contextlib.suppress(DataFileError):
            read_features(path)
