"""Files appear whole or not at all, and every way an HDF5 file can be broken is one error."""

import errno
import os
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest

from exaonepath.errors import DamagedFileError, DataFileError, FileBusyError, OutputCollisionError, OutputError
from exaonepath.files import embeddings, features, patches
from exaonepath.files.artifact import MadeFrom, is_of_this_slide, reuse, settings_hash
from exaonepath.files.atomic import atomic_path, ensure_folder, write_text
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import atomic_h5, encodable


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "a.h5"
    with atomic_h5(target) as file:
        file.array("x", np.arange(3))
        assert not target.exists()
    with open_h5(target, ["x"]) as file:
        assert file.dataset("x", "iu", (None,)).read().tolist() == [0, 1, 2]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "a.h5"
    with atomic_h5(target) as file:
        file.array("x", np.ones(1))
    before = target.read_bytes()

    def interrupted():
        with atomic_h5(target) as file:
            file.array("x", np.zeros(1))
            raise error

    with pytest.raises(error):
        interrupted()
    assert target.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_text(tmp_path / "ours.txt", "x")
    (tmp_path / "plain.txt").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours.txt", "plain.txt")]
    assert modes[0] == modes[1]


def test_full_disk_is_told_and_nothing_stays(tmp_path):
    with pytest.raises(OutputError, match="disk is full"), atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_file_in_place_of_folder(tmp_path):
    with pytest.raises(OutputError, match="does not exist"), atomic_path(tmp_path / "no" / "a"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file stands where a folder"):
        ensure_folder(tmp_path / "file" / "sub")


def test_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="no permission"):
        ensure_folder(tmp_path / "out")


def test_broken_files_are_one_error(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(DataFileError, match="no such file"), open_h5(path):
        pass
    path.write_bytes(b"not hdf5 at all")
    with pytest.raises(DataFileError, match="cannot be read as HDF5"), open_h5(path):
        pass
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10_000)
        file.create_group("group")
    with pytest.raises(DataFileError, match=r"lacks y; it holds \['group', 'x'\]"), open_h5(path, ["x", "y"]):
        pass
    with pytest.raises(DataFileError, match="lacks group"), open_h5(path, ["group"]):
        pass
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DamagedFileError, match="is damaged"), open_h5(path):
        pass


def test_any_way_a_damaged_file_fails_is_a_data_error(tmp_path):
    """Bytes flipped at random all over a small file: HDF5 answers with half a dozen exception types."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(500)
        file.create_dataset("y", data=np.arange(500), chunks=(50,), compression="gzip")
        file.attrs["n"] = 3
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = whole.copy()
        for at in rng.integers(8, len(whole), rng.integers(1, 20)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with open_h5(path, ["x", "y"]) as file:
                file.dataset("x", "iu", (None,)).read(), file.dataset("y", "iu", (None,)).read(), file.attribute("n")
        except DataFileError:
            pass


def test_settings_hash_knows_values_but_not_order():
    assert settings_hash({"a": 1, "b": [2, None]}) == settings_hash({"b": [2, None], "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})


def test_a_slide_whose_name_is_not_utf8_is_replaced_like_any_other():
    """Attributes hold such a name escaped; compared as it is, the slide's own result would count as another slide's."""
    path = os.fsdecode(b"/slides/a\xff.svs")
    attrs = {"slide_fingerprint": "old", "slide_path": encodable(path)}
    assert not is_of_this_slide(Path("a.h5"), attrs, MadeFrom("", "new", path), overwrite=False)
    with pytest.raises(OutputCollisionError):
        is_of_this_slide(Path("a.h5"), attrs, MadeFrom("", "new", "/slides/b.svs"), overwrite=False)


LAYOUTS = {
    "STAMP's features": {"feats": np.ones((4, 8), np.float32), "coords": np.zeros((4, 2))},
    "a batch of features": {"features": np.ones((1, 4, 8), np.float32), "coords": np.zeros((4, 2), np.int32)},
    "features and coords": {"features": np.ones((4, 8), np.float32), "coords": np.zeros((4, 2), np.int32)},
    "features alone": {"features": np.ones(8, np.float32)},
    "coords alone": {"coords": np.zeros((4, 2), np.int32)},
    "coords and scores": {"coords": np.zeros((4, 2), np.int32), "scores": np.ones(4)},
    "coords and contours": {"coords": np.zeros((4, 2), np.int32), "contour_index": np.zeros(4, np.int32)},
    "an embedding": {"slide_embedding": np.ones(8, np.float32)},
}


@pytest.mark.parametrize("kind", [patches.KIND, features.KIND, embeddings.KIND], ids=["patches", "features", "slide"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_this_project_did_not_make_is_replaced_on_request_only(tmp_path, kind, layout):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, values in LAYOUTS[layout].items():
            file[name] = values
    made_from = MadeFrom("settings", "fingerprint", "/slides/a.svs", 1, features_sha256="0")
    with pytest.raises(OutputCollisionError):
        reuse(path, kind, made_from, lambda file: True)
    if kind.datasets[0] in LAYOUTS[layout] and not set(kind.others) & set(LAYOUTS[layout]):
        assert reuse(path, kind, made_from, lambda file: True, overwrite=True) is None
    else:
        with pytest.raises(OutputCollisionError):
            reuse(path, kind, made_from, lambda file: True, overwrite=True)


def test_a_result_is_used_again_with_a_warning_if_its_slide_was_written_to_since(tmp_path, caplog):
    """The fingerprint samples the file: a copy that was not finished can have the same one."""
    path = tmp_path / "a.h5"
    with atomic_h5(path) as file:
        file.array("coords", np.zeros((1, 2), np.int32))
        file.attributes({"settings_hash": "s", "slide_fingerprint": "f", "slide_path": "/a.svs", "slide_mtime_ns": 1})
        file.attributes({"complete": True})
    for mtime, where, warned in ((1, "/a.svs", False), (2, "/elsewhere/a.svs", False), (2, "/a.svs", True)):
        caplog.clear()
        assert reuse(path, patches.KIND, MadeFrom("s", "f", where, mtime), lambda file: "used") == "used"
        assert ("was written to since" in caplog.text) == warned


def test_a_file_that_may_not_be_read_is_an_error_with_that_reason(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is simulated where it would come from."""
    path = tmp_path / "a.h5"
    with atomic_h5(path) as file:
        file.array("coords", np.zeros((1, 2), np.int32))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("exaonepath.files.hdf5.os.open", refuse)
    with pytest.raises(FileBusyError, match=r"may not be read \(permission denied\)"), open_h5(path):
        pass
    monkeypatch.setattr("h5py.is_hdf5", refuse)
    with pytest.raises(OutputError, match=r"may not be read \(permission denied\)"):
        reuse(path, patches.KIND, MadeFrom("s", "f", "/a.svs", 1), lambda file: True)
