"""Rows of a features file: equal to those of the whole file, read without the rest of it, and checked."""

import h5py
import numpy as np
import pytest

from exaonepath.errors import DamagedFileError, DataFileError
from exaonepath.files import raw_file
from exaonepath.files.feature_rows import open_features
from exaonepath.files.features import read_features, write_features

N, D = 1_000, 24


def _values(n=N, seed=0):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


@pytest.fixture
def write(tmp_path):
    """`write(name, values, dtype)`: a features file of this package."""

    def make(name="f.h5", values=None, dtype="float32", **attrs):
        values = _values() if values is None else values
        n = len(values)
        coords = np.stack([np.arange(n), np.zeros(n)], 1) * 256
        blocks = [(np.arange(n), values)]
        attrs = {"feature_dtype": dtype, **attrs}
        write_features(tmp_path / name, blocks, coords, np.arange(n) // 100, D, (), attrs)
        return tmp_path / name

    return make


def _foreign(path, values, **options):
    """A features file of another program, without checksums."""
    n = len(values)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=values, **options)
        file["coords"] = np.zeros((n, 2), np.int64)
        file["contour_index"] = np.zeros(n, np.int64)
    return path


ROWS = {
    "none": [],
    "first": [0],
    "last": [N - 1],
    "one block": list(range(300, 400)),
    "two blocks with a gap": [3, 4, 700],
    "every seventh": list(range(0, N, 7)),
    "all": list(range(N)),
}


@pytest.mark.parametrize("kind", ["float32", "float16", "foreign", "foreign-float64", "compressed", "odd-chunks"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_those_of_the_whole_file(write, tmp_path, kind, name, monkeypatch):
    for limit in ("_READ_BYTES", "_READ_BYTES_IN_CHUNKS"):
        monkeypatch.setattr(f"exaonepath.files.stored_array.{limit}", 30_000)  # several reads for a run of blocks
    options = {"compressed": {"chunks": (64, D), "compression": "gzip"}, "odd-chunks": {"chunks": (17, 5)}}
    if kind in ("float32", "float16"):
        path = write(dtype=kind)
    else:
        values = _values().astype(np.float64 if kind == "foreign-float64" else np.float32)
        path = _foreign(tmp_path / "x.h5", values, **options.get(kind, {}))
    rows = np.array(ROWS[name], np.int64)
    with open_features(path) as file:
        taken, whole = file.take(rows), file.read()
        assert taken.dtype == whole.dtype == file.dtype == (np.float16 if kind == "float16" else np.float32)
    assert taken.shape == (len(rows), D)
    np.testing.assert_array_equal(taken, whole[rows])
    np.testing.assert_array_equal(whole.astype(np.float32), read_features(path).features)
    np.testing.assert_array_equal(whole, _values().astype(whole.dtype))


def test_only_blocks_with_the_rows_are_read(write, monkeypatch):
    values = _values(20_000)
    path = write(values=values)
    counts = []
    original = raw_file.RawFile.readinto

    def count(self, buffer):
        done = original(self, buffer)
        counts.append(done)
        return done

    monkeypatch.setattr(raw_file.RawFile, "readinto", count)
    with open_features(path) as file:
        before = sum(counts)
        taken = file.take(np.arange(5_000, 6_000))
        read = sum(counts) - before
    np.testing.assert_array_equal(taken, values[5_000:6_000])
    blocks = (6_000 - 1) // 256 - 5_000 // 256 + 1
    assert read <= blocks * 256 * D * 4 + 20_000  # and a small part of the header
    assert read < 0.08 * values.nbytes


def _flip(path, row):
    """Change one bit of a row of the features in the file."""
    with h5py.File(path, "r") as file:
        offset = file["features"].id.get_offset() + row * D * 4
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_changed_bit_is_found_in_every_block_that_is_read(write):
    path = write()
    _flip(path, 600)  # in the third block, rows 512 to 767
    with open_features(path) as file:
        np.testing.assert_array_equal(file.take(np.array([0, 511, 768])), _values()[[0, 511, 768]])
        for rows in ([512], [767], [10, 700]):
            with pytest.raises(DamagedFileError, match=r"checksum of features .*rows from 512"):
                file.take(np.array(rows))
        with pytest.raises(DamagedFileError):
            file.read()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_by_their_row(tmp_path, value, dtype):
    values = _values().astype(dtype)
    values[500, 3] = value
    path = _foreign(tmp_path / "x.h5", values)
    with open_features(path) as file:
        with pytest.raises(DataFileError, match=r"1 of 2 feature rows .*\(row 500\)"):
            file.take(np.array([20, 500]))
        with pytest.raises(DataFileError, match=r"1 of 1000 feature rows .*\(row 500\)"):
            file.read()
        file.take(np.array([20, 501]))


def test_the_largest_number_of_float16_is_finite(tmp_path):
    values = np.full((3, D), -65504, np.float16)
    with open_features(_foreign(tmp_path / "x.h5", values)) as file:
        np.testing.assert_array_equal(file.read(), values)


def test_the_header_shows_content_or_at_least_shapes(write, tmp_path, drop_checksums):
    def header(path):
        with open_features(path) as file:
            return file.header

    first, same, other = write("a.h5"), write("b.h5", reader="x"), write("c.h5", values=_values(seed=1))
    assert header(first) == header(same)
    assert len({header(p) for p in (first, other, write("d.h5", dtype="float16"), write("e.h5", _values(999)))}) == 4
    foreign = [_foreign(tmp_path / f"{seed}.h5", _values(seed=seed)) for seed in range(2)]
    assert header(foreign[0]) == header(foreign[1])


def test_empty_files_have_no_rows(write):
    path = write(values=_values(0))
    with open_features(path) as file:
        assert file.read().shape == file.take(np.array([], np.int64)).shape == (0, D)
        assert len(file.coords) == len(file.contour_index) == 0
