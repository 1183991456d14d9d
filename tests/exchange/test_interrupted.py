"""Exports and imports that are interrupted, meet a full disk, or are larger than memory should be."""

import os
import signal
import tracemalloc

import numpy as np
import pytest

from exaonepath.errors import DataFileError
from exaonepath.exchange.slide_patches import CheckedMatrix
from exaonepath.files.features import read_features, write_features
from exaonepath.slides.exporting import export_slides
from exaonepath.slides.importing import import_features
from exaonepath.slides.outputs import output_paths

from .conftest import FIRST, SECOND
from .test_round_trips import FOREIGN, OWN, given, needs

PARTS = ("trident", "clam", "slide2vec", "patho-bench", "anndata", "parquet", "zarr")


def left(folder):
    """Files in a folder that are not whole exports: temporary names, and files of working folders."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name or ".replaced" in path.name]


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C while the vectors of the second slide are read."""
    real = CheckedMatrix.parts

    def parts(self):
        for start, part in real(self):
            yield start, part
            if SECOND in self._where:
                raise KeyboardInterrupt

    monkeypatch.setattr(CheckedMatrix, "parts", parts)


@pytest.mark.parametrize("format", PARTS)
def test_an_interrupted_export(made, tmp_path, format, interrupted):
    needs(format)
    with pytest.raises(KeyboardInterrupt):
        export_slides(made, tmp_path / "there", format)
    assert left(tmp_path) == []
    # The first slide is whole; of the second, no file with vectors exists.
    names = [path.name for path in (tmp_path / "there").rglob("*")]
    vectors = {"trident": "features_", "clam": "_files", "slide2vec": "tile_embeddings", "patho-bench": "patches"}
    of_second = [p for p in (tmp_path / "there").rglob(f"{SECOND}*") if vectors.get(format, "") in str(p)]
    assert of_second == []
    assert any(name.startswith(FIRST) for name in names)


@pytest.mark.parametrize("format", list(OWN))
def test_an_interrupted_file_of_all_slides(made, tmp_path, format, interrupted):
    needs(format)
    to = tmp_path / f"all{OWN[format]}"
    with pytest.raises(KeyboardInterrupt):
        export_slides(made, to, format)
    assert list(tmp_path.iterdir()) == []
    # An earlier export stays as it is.
    export_slides(made, to, format, slides=[FIRST])
    before = sorted((path, path.read_bytes()) for path in [to, *to.rglob("*")] if path.is_file())
    with pytest.raises(KeyboardInterrupt):
        export_slides(made, to, format, overwrite=True)
    assert sorted((path, path.read_bytes()) for path in [to, *to.rglob("*")] if path.is_file()) == before
    assert left(tmp_path) == []


@pytest.mark.parametrize("format", [*FOREIGN, *OWN])
def test_an_interrupted_import(made, tmp_path, format, monkeypatch):
    needs(format)
    export_slides(made, tmp_path / "there", format)
    real = CheckedMatrix.parts

    def parts(self):
        for start, part in real(self):
            yield start, part
            if SECOND in self._where:
                raise KeyboardInterrupt

    monkeypatch.setattr(CheckedMatrix, "parts", parts)
    with pytest.raises(KeyboardInterrupt):
        import_features(tmp_path / "there", tmp_path / "back", format, **given(format))
    assert left(tmp_path) == []
    assert read_features(output_paths(tmp_path / "back", FIRST).features)
    assert not output_paths(tmp_path / "back", SECOND).features.exists()


@pytest.mark.parametrize("format", ["anndata", "zarr", "parquet"])
def test_ctrl_c_does_not_wait_for_the_other_slides(made, tmp_path, format, monkeypatch):
    """Files hold signals back while they are open; a file of a whole cohort is open for long."""
    needs(format)
    seen = []
    real = CheckedMatrix._stored

    def stored(self):
        seen.append(self._where)
        os.kill(os.getpid(), signal.SIGINT)
        yield from real(self)

    monkeypatch.setattr(CheckedMatrix, "_stored", stored)
    with pytest.raises(KeyboardInterrupt):
        export_slides(made, tmp_path / f"all{OWN[format]}", format)
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_float16_that_overflows(tmp_path):
    """Nothing infinite is written, in whatever part of the features it is."""
    source = tmp_path / "big_features.h5"
    features = np.ones((9, 4), np.float32)
    features[8, 3] = 70000
    rows = [(np.arange(9), features)]
    write_features(source, rows, np.zeros((9, 2)), np.zeros(9), 4, (), {"patch_size": 256, "weights": "e"})
    for format in PARTS:
        needs(format)
        to = tmp_path / format
        with pytest.raises(DataFileError, match="7e\\+04, which float16 cannot"):
            export_slides(source, to, format, dtype="float16", target_size=256)
        assert not [path for path in to.rglob("*") if path.suffix in (".pt", ".h5ad", ".parquet", ".zarr")]
        assert left(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from exaonepath.errors import OutputError
from exaonepath.slides.exporting import export_slides
import anndata, h5py, pyarrow.parquet, torch, zarr  # what they write at import is not limited
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, to, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for format in sys.argv[4:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export_slides(source, to / format, format)
    except OutputError as exc:
        print(format, "error", str(exc)[:100])
    except BaseException as exc:
        print(format, "other", type(exc), exc)
    else:
        print(format, "done")
"""


def test_a_full_disk(warm_package, tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write that passes it."""
    for format in PARTS:
        needs(format)
    source = tmp_path / "s_features.h5"
    features = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)  # 1 MB
    coords = np.stack([np.arange(4000) * 256, np.zeros(4000, int)], 1)
    attrs = {"patch_size": 256, "weights": "e"}
    write_features(source, [(np.arange(4000), features)], coords, np.zeros(4000), 64, (), attrs)
    formats = [format for format in PARTS if format not in ("trident", "slide2vec")]  # these need a size; see below
    done = warm_package.run(FULL_DISK, source, tmp_path / "out", 1 << 19, *formats)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[format, "error"] for format in formats]
    assert done.stdout.count("cannot write") == len(formats)
    assert left(tmp_path) == []
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.parts[-2:] == ("patches", "s.h5") and "clam" in path.parts for path in written), written


def test_memory_does_not_grow_with_the_slide(tmp_path):
    """160 MB of features pass through every format that can be written in parts with less than that in memory."""
    for format in PARTS:
        needs(format)
    n, width = 40_000, 1024
    source = tmp_path / "s_features.h5"
    block = np.random.default_rng(0).normal(size=(4000, width)).astype(np.float32)
    rows = ((np.arange(at, at + 4000), block) for at in range(0, n, 4000))
    coords = np.stack([np.arange(n) % 200 * 256, np.arange(n) // 200 * 256], 1)
    write_features(source, rows, coords, np.zeros(n), width, (), {"patch_size": 256, "weights": "e"})
    for format in ("trident", "clam", "anndata", "parquet", "zarr"):
        for run in (
            lambda to, back, format=format: export_slides(source, to, format, target_size=256),
            lambda to, back, format=format: import_features(to, back, format, **given(format)),
        ):
            tracemalloc.start()
            run(tmp_path / format, tmp_path / f"{format}-back")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 110e6, (format, run, peak)


def test_a_kill_leaves_nothing_after_the_next_run(warm_package, made, tmp_path):
    """Temporary files of a killed process are removed by the next export to the same place."""
    code = (
        "import os, signal, sys\n"
        "from exaonepath.exchange.slide_patches import CheckedMatrix\n"
        "from exaonepath.slides.exporting import export_slides\n"
        "CheckedMatrix.parts = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_slides(sys.argv[1], sys.argv[2], 'trident', slides=['first'])\n"
    )
    done = warm_package.run(code, made, tmp_path / "out")
    assert done.returncode == -signal.SIGKILL
    assert left(tmp_path)
    export_slides(made, tmp_path / "out", "trident", slides=[FIRST], overwrite=True)
    assert left(tmp_path) == []
