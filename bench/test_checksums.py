"""What the checksums of a features file of 50,000 patches cost: the same code with the checksums left out.

The share of the stage is what counts for a user: a features stage encodes 50,000 patches while it writes this file
once, and a slide stage encodes them into one vector after reading it once. The ratio to reading and writing alone is
the hardest comparison there is, since a file that has just been written comes back from memory and not from a disk.
"""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from exaonepath.files import checksums
from exaonepath.files.features import read_features, write_features

N, D, BLOCK = 50_000, 768, 64


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, D), np.float32), rng.integers(0, 10**5, (N, 2)), np.arange(N) // 500


def write(path, values):
    features, coords, contours = values
    blocks = ((np.arange(at, min(at + BLOCK, N)), features[at : at + BLOCK]) for at in range(0, N, BLOCK))
    write_features(path, blocks, coords, contours, D, [], {})


class NoCrc:
    """Stands for the module zlib."""

    @staticmethod
    def crc32(data, value=0):
        return 0


@pytest.mark.parametrize("what", ["writing", "reading"])
def test_checksums(benchmark, compare, values, tmp_path, monkeypatch, what):
    with_checksums, without = tmp_path / "with.h5", tmp_path / "without.h5"
    write(with_checksums, values)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "zlib", NoCrc)
        write(without, values)
    with h5py.File(without, "a") as file:  # a file without checksums is read without checking
        for name in [name for name in file.attrs if name.startswith("crc32")]:
            del file.attrs[name]
    assert np.array_equal(read_features(with_checksums).features, read_features(without).features)

    def write_without() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "zlib", NoCrc)
            write(tmp_path / "again.h5", values)

    ours, baseline = {
        "writing": (lambda: write(tmp_path / "again.h5", values), write_without),
        "reading": (lambda: read_features(with_checksums), lambda: read_features(without)),
    }[what]
    compare(f"checksums, {what} 50,000 patches", ours, baseline, rounds=9, patches=N)
