"""What a file can hold besides plain arrays is refused before HDF5 acts on it."""

import contextlib
import os
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

from exaonepath.errors import DamagedFileError, DataFileError, FileBusyError, ForeignFileError, OutputCollisionError
from exaonepath.files import atomic
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import read_features
from exaonepath.files.hdf5 import open_h5, open_h5_tree
from exaonepath.files.hdf5_output import atomic_h5
from exaonepath.files.patches import read_patches
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.synthetic import make_slide

N = 6


@pytest.fixture
def features(tmp_path):
    """A features file without checksums, as the original or another program writes it."""
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((N, 4), np.float32)
        file["coords"] = np.zeros((N, 2), np.int32)
        file["contour_index"] = np.zeros(N, np.int32)
    return path


@pytest.fixture
def elsewhere(tmp_path):
    """Another file, whose bytes must not get out."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file["contour_index"] = np.full(N, 7, np.int32)
        file["group/contour_index"] = np.full(N, 7, np.int32)
    return path


def replace(path, name, make):
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        make(file)


def external_storage(file, elsewhere):
    file.create_dataset("contour_index", (N,), "<i4", external=[(str(elsewhere), 0, 4 * N)])


def external_text(file, elsewhere):
    elsewhere.with_name("text").write_text("root:x:0:0:root:/root:/bin/bash" * 3)
    file.create_dataset("contour_index", (N,), "<i4", external=[(str(elsewhere.with_name("text")), 0, 4 * N)])


def external_pipe(file, elsewhere):
    os.mkfifo(elsewhere.with_name("pipe"))
    file.create_dataset("contour_index", (N,), "<i4", external=[(str(elsewhere.with_name("pipe")), 0, 4 * N)])


def external_link(file, elsewhere):
    file["contour_index"] = h5py.ExternalLink(str(elsewhere), "/contour_index")


def external_link_to_nothing(file, elsewhere):
    file["contour_index"] = h5py.ExternalLink(str(elsewhere) + "x", "/contour_index")


def soft_link(file, elsewhere):
    file["hidden"] = h5py.ExternalLink(str(elsewhere), "/group")
    file["contour_index"] = h5py.SoftLink("/hidden/contour_index")


def virtual(file, elsewhere):
    layout = h5py.VirtualLayout((N,), "<i4")
    layout[:] = h5py.VirtualSource(str(elsewhere), "contour_index", (N,))
    file.create_virtual_dataset("contour_index", layout)


def virtual_of_nothing(file, elsewhere):
    layout = h5py.VirtualLayout((N,), "<i4")
    layout[:] = h5py.VirtualSource(str(elsewhere) + "x", "contour_index", (N,))
    file.create_virtual_dataset("contour_index", layout, fillvalue=0)


def mapped_chunks(file, elsewhere):
    layout = h5py.VirtualLayout((N,), "<i4")
    for at in range(N):
        layout[at] = h5py.VirtualSource(str(elsewhere), "contour_index", (N,))[at]
    file.create_virtual_dataset("contour_index", layout)


ELSEWHERE = [
    external_storage,
    external_text,
    external_pipe,
    external_link,
    external_link_to_nothing,
    soft_link,
    virtual,
    virtual_of_nothing,
    mapped_chunks,
]


@pytest.mark.parametrize("make", ELSEWHERE, ids=lambda make: make.__name__)
def test_bytes_of_another_file_are_not_followed(features, elsewhere, make):
    replace(features, "contour_index", lambda file: make(file, elsewhere))
    with pytest.raises(ForeignFileError, match="is not read"):
        read_features(features)
    with pytest.raises(ForeignFileError, match="is not read"), open_h5_tree(features):
        pass


@pytest.mark.parametrize("name", ["features", "coords"])
def test_nor_for_any_other_dataset(features, elsewhere, name):
    replace(features, name, lambda file: file.update({name: h5py.ExternalLink(str(elsewhere), "/contour_index")}))
    for read in (read_features, read_patches, read_embedding):
        with pytest.raises(DataFileError):
            read(features)


def never_written(file):
    file.create_dataset("features", (50_000_000, 768), "<f4")


def never_written_chunks(file):
    file.create_dataset("features", (50_000_000, 768), "<f4", chunks=(64, 768), compression="gzip")


def one_chunk_of_many(file):
    stored = file.create_dataset("features", (50_000_000, 768), "<f4", chunks=(64, 768), compression="gzip")
    stored[:64] = 1


def chunk_of_everything(file):
    file.create_dataset("features", (2**31, 768), "<f4", chunks=(2**20, 768), compression="gzip", maxshape=(None, 768))


def too_many_rows(file):
    file.create_dataset("features", (2**60, 1), "<f4")


def unwritten_small(file):
    """Small enough to be read, and nothing but the fill value in it."""
    file.create_dataset("features", (N, 4), "<f4")


BOMBS = [never_written, never_written_chunks, one_chunk_of_many, chunk_of_everything, too_many_rows, unwritten_small]


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_declared_size_that_is_not_stored_is_refused_before_it_is_allocated(features, make):
    replace(features, "features", make)
    assert features.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((DamagedFileError, ForeignFileError)):
        read_features(features)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_text_of_300_megabytes_is_not_read(features):
    with h5py.File(features, "a") as file:
        file.attrs["weights"] = "x" * 300_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ForeignFileError, match="attributes"):
        read_features(features)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_an_attribute_that_nobody_asks_for_is_not_read(features):
    with h5py.File(features, "w", libver="latest") as file:  # which keeps large attributes outside the object header
        file["features"], file["coords"] = np.ones((N, 4), np.float32), np.zeros((N, 2), np.int32)
        file.attrs["note"] = np.zeros(10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_features(features).attrs == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("value", ["text", np.zeros(3), h5py.Empty("f"), np.array(["a", "b"], h5py.string_dtype())])
def test_attributes_of_other_types(features, value):
    with h5py.File(features, "a") as file:
        for name in ("complete", "weights", "patch_size"):
            file.attrs[name] = value
    with contextlib.suppress(DataFileError):
        read_features(features)


def test_a_reference_as_an_attribute(features):
    with h5py.File(features, "a") as file:
        file.attrs["weights"] = file["features"].ref
    with pytest.raises(ForeignFileError, match="neither text nor numbers"):
        read_features(features)


@pytest.mark.parametrize("name", ["features", "coords", "contour_index"])
def test_a_group_where_a_dataset_belongs(features, name):
    replace(features, name, lambda file: file.create_group(name))
    if name == "contour_index":
        assert read_features(features).contour_index.tolist() == [0] * N  # no such dataset: one fragment
    else:
        with pytest.raises(DataFileError, match=f"lacks {name}"):
            read_features(features)


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("x", "f4"), ("y", "f4")]),
        np.dtype("S8"),
        h5py.string_dtype(),
        h5py.vlen_dtype(np.float32),
        np.dtype(("f4", (3,))),
        np.dtype("V4"),
        np.dtype("c8"),
        np.dtype("f16"),
        np.dtype("?"),
        h5py.ref_dtype,
    ],
    ids=str,
)
def test_other_types_of_data(features, dtype):
    replace(features, "features", lambda file: file.create_dataset("features", (N, 4), dtype))
    with pytest.raises(DataFileError):
        read_features(features)


def test_a_scalar_and_an_empty_dataspace(features):
    for make in (lambda file: file.update({"coords": 3}), lambda file: file.update({"coords": h5py.Empty("i4")})):
        replace(features, "coords", make)
        with pytest.raises(DataFileError):
            read_features(features)


def test_what_is_packed_by_the_filters_of_hdf5_is_read(features):
    values = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
    for options in ({"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"}):
        replace(features, "features", lambda file, o=options: file.create_dataset("features", data=values, **o))
        assert np.array_equal(read_features(features).features, values)


def test_another_filter_is_not_loaded(features, monkeypatch):
    def make(file):
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((N, 4))
        plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # zstd, a plug-in
        space = h5py.h5s.create_simple((N, 4))
        h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F32LE, space, plan).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.ones((N, 4), np.float32)
        )

    replace(features, "features", make)
    with pytest.raises(ForeignFileError, match="filter"):
        read_features(features)


@pytest.mark.parametrize("code", [37, 95, 5])
def test_a_file_system_without_locks_reads_and_writes(tmp_path, features, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    assert len(read_features(features).features) == N
    with atomic_h5(tmp_path / "new.h5") as file:
        file.array("x", np.arange(3))
    with open_h5(tmp_path / "new.h5", ["x"]):
        pass


def test_a_file_that_another_process_writes_is_busy(features):
    code = f"""
import h5py, sys
with h5py.File({str(features)!r}, "a") as file:
    print("open", flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(FileBusyError, match="another process"):
            read_features(features)
        writer.communicate("\n")
    assert len(read_features(features).features) == N


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04" + bytes(100), r"\.pt or NumPy's \.npz"),
        (b"\x80\x02}q\x00." + bytes(50), "pickle"),
        (b"\x93NUMPY\x01\x00" + bytes(50), r"\.npy"),
        (b"II*\0" + bytes(50), "TIFF"),
        (b"x,y\n1,2\n" * 20, "another kind of file"),
    ],
)
def test_other_formats_are_named(tmp_path, content, says):
    path = tmp_path / "features.h5"
    path.write_bytes(content)
    for read in (read_features, read_patches, read_embedding):
        with pytest.raises(ForeignFileError, match=says) as caught:
            read(path)
        assert "delete" not in str(caught.value)


def test_a_folder_a_pipe_and_a_link_to_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("folder", "pipe", "link"):
        with pytest.raises(DataFileError, match=name):
            read_features(tmp_path / name)


def test_an_hdf5_file_with_a_user_block_is_read(tmp_path):
    path = tmp_path / "f.h5"
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["features"] = np.ones((N, 4), np.float32)
        file["coords"] = np.zeros((N, 2), np.int32)
    assert len(read_features(path).features) == N


def test_layouts_of_other_programs_are_named_or_read(tmp_path, features):
    replace(features, "features", lambda file: file.update({"feats": np.ones((N, 4), np.float32)}))
    with pytest.raises(ForeignFileError, match="STAMP"):
        read_features(features)
    batch = tmp_path / "batch.h5"
    with h5py.File(batch, "w") as file:
        file["features"] = np.ones((1, N, 4), np.float32)
        file["coords"] = np.zeros((1, N, 2), np.int32)
    with pytest.raises(ForeignFileError, match="one slide as a batch"):
        read_features(batch)

    trident = tmp_path / "trident.h5"
    with h5py.File(trident, "w") as file:
        file["coords"] = np.arange(8).reshape(4, 2)
        file["coords"].attrs.update(
            patch_size=256,
            patch_level=0,
            level0_magnification=40,
            target_magnification=20,
            patch_size_level0=512,
            overlap=0,
            name="case",
        )
    patches = read_patches(trident)
    assert (patches.patch_size, patches.name, patches.contour_index.tolist()) == (512, "case", [0] * 4)

    clam = tmp_path / "clam.h5"
    with h5py.File(clam, "w") as file:
        file["coords"] = np.arange(8).reshape(4, 2)
        file["coords"].attrs.update(
            patch_size=256,
            patch_level=1,
            downsample=(4.0, 4.0),
            level_dim=(10, 10),
            name="case",
            save_path="/somewhere",
        )
    assert read_patches(clam).patch_size == 1024


def test_coordinates_of_other_programs_are_never_replaced(tmp_path):
    slide = make_slide(tmp_path / "case.svs", 1200, 1000, fragments=1, holes=False)
    target = tmp_path / "out" / "patches" / "case.h5"
    target.parent.mkdir(parents=True)
    for overwrite in (False, True):
        for attributes in (
            {"patch_size": 256, "patch_size_level0": 512},
            {"patch_size": 256, "patch_level": 0, "downsample": 1.0, "save_path": "/somewhere"},
        ):
            with h5py.File(target, "w") as file:
                file["coords"] = np.arange(8).reshape(4, 2)
                file["coords"].attrs.update(attributes)
            before = target.read_bytes()
            with pytest.raises(OutputCollisionError, match=r"TRIDENT|CLAM"):
                patchfy(slide, tmp_path / "out", overwrite=overwrite)
            assert target.read_bytes() == before
