"""patchfy from outside: the goldens, what it leaves on disk, when it works again, and how it fails."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from exaonepath.errors import (
    OutputCollisionError,
    OutputError,
    SettingsError,
    SlideError,
    SlideOpenError,
    SlideReadError,
    SlideSkippedError,
)
from exaonepath.files.patches import read_patches
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches import pipeline
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.slides.patches.segmentation import segment_tissue
from exaonepath.slides.patches.settings import SegmentationSettings
from exaonepath.synthetic import make_slide

GOLDENS = [
    "CMU-1-Small-Region",
    "CMU-1-Small-Region_otsu",
    "CMU-1-Small-Region_p64",
    "empty",
    "nompp",
    "nompp_p100",
    "nonint",
    "nonint_lvl1",
    "single_tex",
    "single_tex_sd4",
    "small",
    "small_at",
    "small_close0",
    "small_lvl1",
    "small_otsu",
    "small_overlap",
    "small_p64",
    "small_s20",
    "small_sd2",
]


def plain(attributes):
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in attributes.items()}


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(golden, data_dir, tmp_path, name):
    expected = golden(f"patchfy_{name}")
    kwargs = json.loads(str(expected["kwargs"]))
    with SlideImage(data_dir / "slides" / str(expected["slide"])) as slide:
        knobs = SegmentationSettings.__dataclass_fields__
        tissue = segment_tissue(slide, SegmentationSettings(**{k: v for k, v in kwargs.items() if k in knobs}))
        h5_path, coords, contour_index = patchfy(wsi=slide, out=tmp_path, save_mask=False, **kwargs)

    assert [len(c) for c in tissue.contours] == expected["contour_len"].tolist()
    assert [len(group) for group in tissue.holes] == expected["n_holes"].tolist()
    holes = [hole for group in tissue.holes for hole in group]
    assert [len(hole) for hole in holes] == expected["hole_len"].tolist()
    none = np.empty((0, 2), np.int32)
    np.testing.assert_array_equal(np.concatenate([none, *tissue.contours]), expected["contour_pts"])
    np.testing.assert_array_equal(np.concatenate([none, *holes]), expected["hole_pts"])

    assert coords.dtype == contour_index.dtype == np.int32
    if expected["empty"]:
        assert (coords.shape, contour_index.shape) == ((0, 2), (0,))
        return
    np.testing.assert_array_equal(coords, expected["coords"])
    np.testing.assert_array_equal(contour_index, expected["contour_index"])
    attributes = json.loads(str(expected["h5_attrs"]))
    with h5py.File(h5_path) as file:
        np.testing.assert_array_equal(file["coords"], expected["coords"])
        np.testing.assert_array_equal(file["contour_index"], expected["contour_index"])
        assert file["coords"].dtype == file["contour_index"].dtype == np.int32
        assert plain(file["coords"].attrs) == attributes["coords"]
        assert plain(file["contour_index"].attrs) == attributes["contour_index"]
        assert plain(file.attrs).items() >= attributes["file"].items()


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slide") / "case.svs", 3000, 2200, fragments=2, seed=1)


@pytest.fixture(scope="module")
def other_slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("other") / "case.svs", 3000, 2200, fragments=3, seed=2)


@pytest.fixture
def no_work(monkeypatch):
    """After `no_work()`, segmenting a slide fails the test."""

    def forbidden(*args):
        pytest.fail("the slide was segmented again")

    return lambda: monkeypatch.setattr(pipeline, "find_tissue", forbidden)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_output_files(slide_path, tmp_path):
    h5_path, coords, contour_index = patchfy(wsi=slide_path, out=tmp_path)
    assert files(tmp_path) == ["contours/case.geojson", "masks/case.jpg", "patches/case.h5"]
    assert h5_path == tmp_path / "patches" / "case.h5"
    assert len(coords) == len(contour_index) > 20
    assert set(contour_index) == {0, 1}
    stored = read_patches(h5_path)
    np.testing.assert_array_equal(stored.coords, coords)
    np.testing.assert_array_equal(stored.contour_index, contour_index)
    assert (stored.patch_size, stored.patch_level, stored.name, len(stored)) == (256, 0, "case", len(coords))
    with h5py.File(h5_path) as file, SlideImage(slide_path) as slide:
        assert file.attrs["slide_fingerprint"] == slide.fingerprint() == stored.slide_fingerprint
        assert file.attrs["slide_path"] == str(slide_path)
        assert json.loads(file.attrs["settings"])["patch_size"] == 256
        assert (file.attrs["mpp"], file.attrs["mpp_source"]) == (0.5, "openslide.mpp-x")


def test_mask_shows_contours_and_holes(tmp_path):
    slide = make_slide(tmp_path / "flat.tif", 4600, 2300, fragments=1, levels="flat", vendor="generic", seed=3)
    patchfy(slide, tmp_path, save_h5=False, a_h=0.2)
    picture = cv2.imread(str(tmp_path / "masks" / "flat.jpg"))
    assert picture.shape == (2048, 4096, 3)  # a flat slide is drawn reduced
    blue, green, red = (picture[..., channel].astype(int) for channel in range(3))
    assert np.count_nonzero((green > 200) & (red < 80) & (blue < 80)) > 2000
    assert np.count_nonzero((blue > 200) & (red < 80) & (green < 80)) > 500


@pytest.mark.parametrize("opened", [False, True])
def test_finished_slide_is_not_worked_on_again(slide_path, tmp_path, no_work, opened):
    first = patchfy(slide_path, tmp_path)
    written = first[0].stat().st_mtime_ns
    no_work()
    # line_thickness and max_seg_pixels change no patch; 8.0 is 8.
    again = {"line_thickness": 7, "max_seg_pixels": None, "sthresh": 8.0, "a_t": 1.0}
    if opened:
        with SlideImage(slide_path) as slide:
            second = patchfy(slide, tmp_path, **again)
            slide.read_region((0, 0), 0, (1, 1))  # still open
    else:
        second = patchfy(slide_path, tmp_path, **again)
    assert second[0] == first[0]
    np.testing.assert_array_equal(second[1], first[1])
    np.testing.assert_array_equal(second[2], first[2])
    assert first[0].stat().st_mtime_ns == written


def test_auto_skip_off_works_again(slide_path, tmp_path):
    h5_path, coords, _ = patchfy(slide_path, tmp_path)
    written = h5_path.stat().st_mtime_ns
    np.testing.assert_array_equal(patchfy(slide_path, tmp_path, auto_skip=False)[1], coords)
    assert h5_path.stat().st_mtime_ns != written


@pytest.mark.parametrize(("name", "value"), [("step_size", 128), ("sthresh", 12), ("seg_downsample", 2), ("a_t", 2)])
def test_changed_settings_redo(slide_path, tmp_path, caplog, name, value):
    patchfy(slide_path, tmp_path, save_mask=False)
    with caplog.at_level(logging.WARNING):
        h5_path, coords, _ = patchfy(slide_path, tmp_path, save_mask=False, **{name: value})
    assert f"other settings ({name})" in caplog.text
    np.testing.assert_array_equal(read_patches(h5_path).coords, coords)
    np.testing.assert_array_equal(patchfy(slide_path, tmp_path / "fresh", save_mask=False, **{name: value})[1], coords)


def test_changed_slide_redone(slide_path, other_slide, tmp_path, caplog):
    slide = tmp_path / "case.svs"
    shutil.copy(slide_path, slide)
    patchfy(slide, tmp_path / "out")
    shutil.copy(other_slide, slide)
    with caplog.at_level(logging.WARNING):
        _, coords, _ = patchfy(slide, tmp_path / "out")
    assert "other content" in caplog.text
    np.testing.assert_array_equal(coords, patchfy(other_slide, tmp_path / "fresh")[1])


def test_moved_slide_is_still_finished(slide_path, tmp_path, no_work):
    patchfy(slide_path, tmp_path / "out")
    moved = tmp_path / "elsewhere" / "case.svs"
    moved.parent.mkdir()
    shutil.copy(slide_path, moved)
    no_work()
    assert len(patchfy(moved, tmp_path / "out")[1])


@pytest.mark.parametrize("auto_skip", [True, False])
def test_two_slides_with_one_stem(slide_path, other_slide, tmp_path, auto_skip):
    patchfy(slide_path, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(OutputCollisionError, match="different slide"):
        patchfy(other_slide, tmp_path, auto_skip=auto_skip)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_file_of_the_original_is_redone(slide_path, tmp_path, caplog):
    """It does not state what made it."""
    h5_path, coords, _ = patchfy(slide_path, tmp_path)
    with h5py.File(h5_path, "r+") as file:
        for name in set(file.attrs) - {"complete", "n_coords"}:
            del file.attrs[name]
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(patchfy(slide_path, tmp_path)[1], coords)
    assert "does not state which slide" in caplog.text
    assert read_patches(h5_path).slide_fingerprint


def test_missing_mask_is_made(slide_path, tmp_path):
    patchfy(slide_path, tmp_path, save_mask=False)
    assert files(tmp_path) == ["contours/case.geojson", "patches/case.h5"]
    patchfy(slide_path, tmp_path)
    assert files(tmp_path) == ["contours/case.geojson", "masks/case.jpg", "patches/case.h5"]


def test_save_nothing(slide_path, tmp_path):
    h5_path, coords, contour_index = patchfy(slide_path, tmp_path, save_h5=False, save_mask=False)
    assert h5_path is None
    assert len(coords) == len(contour_index) > 0
    assert files(tmp_path) == []


def test_empty_slide_is_a_result(tmp_path, no_work):
    slide = make_slide(tmp_path / "empty.svs", 1500, 1000, fragments=0)
    h5_path, coords, contour_index = patchfy(slide, tmp_path / "out")
    assert (coords.shape, contour_index.shape) == ((0, 2), (0,))
    with h5py.File(h5_path) as file:
        assert file.attrs["complete"]
        assert file.attrs["n_coords"] == 0
    assert files(tmp_path / "out") == ["contours/empty.geojson", "masks/empty.jpg", "patches/empty.h5"]
    no_work()
    again = patchfy(slide, tmp_path / "out")
    assert again[0] == h5_path
    assert (again[1].shape, again[2].shape) == ((0, 2), (0,))


def test_no_mpp_says_what_is_assumed(tmp_path, caplog):
    slide = make_slide(tmp_path / "nompp.tif", 1500, 1000, mpp=None, vendor="generic")
    with caplog.at_level(logging.WARNING):
        h5_path, _, _ = patchfy(slide, tmp_path)
    assert "assuming 0.50 um per pixel" in caplog.text
    with h5py.File(h5_path) as file:
        assert (file.attrs["mpp"], file.attrs["mpp_source"]) == (0.5, "assumed")


@pytest.mark.parametrize(("mpp", "effective"), [(0.25, 512), (0.499, 256), (0.4942, 259), (1000, 256)])
def test_effective_patch_size(tmp_path, monkeypatch, slide_path, mpp, effective):
    """Truncated, and as asked for where nothing would be left."""
    with SlideImage(slide_path) as slide:
        slide.mpp = mpp
        h5_path, _, _ = patchfy(slide, tmp_path, save_mask=False)
    assert read_patches(h5_path).patch_size == effective


def test_skipped_slide(slide_path, tmp_path):
    with pytest.raises(SlideSkippedError, match="max_seg_pixels"):
        patchfy(slide_path, tmp_path, max_seg_pixels=100)
    assert files(tmp_path) == ["skipped/case.txt"]
    assert "max_seg_pixels = 100" in (tmp_path / "skipped" / "case.txt").read_text()
    patchfy(slide_path, tmp_path)
    assert files(tmp_path) == ["contours/case.geojson", "masks/case.jpg", "patches/case.h5"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"patch_size": 0},
        {"patch_size": -256},
        {"patch_size": 25.5},
        {"step_size": 0},
        {"step_size": -1},
        {"patch_level": -1},
        {"patch_level": 99},
        {"patch_level": 0.5},
        {"sthresh": 300},
        {"seg_downsample": 0},
        {"line_thickness": 0},
    ],
    ids=str,
)
def test_impossible_settings_before_any_work(slide_path, tmp_path, kwargs):
    with pytest.raises(SettingsError):
        patchfy(slide_path, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_missing_slide(tmp_path):
    with pytest.raises(SlideOpenError, match=r"nowhere\.svs: no such file"):
        patchfy(tmp_path / "nowhere.svs", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a slide", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_not_a_slide(tmp_path, content):
    path = tmp_path / "thing.svs"
    path.write_bytes(content)
    with pytest.raises(SlideOpenError, match=r"thing\.svs"):
        patchfy(path, tmp_path / "out")


def test_a_folder_is_not_a_slide(tmp_path):
    with pytest.raises(SlideOpenError):
        patchfy(tmp_path, tmp_path / "out")


def test_unreadable_slide(slide_path, tmp_path, monkeypatch):
    """Root may read everything, so the refusal is simulated where it would come from."""

    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(SlideOpenError, match="permission denied"):
        patchfy(slide_path, tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_slide(slide_path, tmp_path, share):
    data = slide_path.read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SlideError, match=r"cut\.svs"):
        patchfy(path, tmp_path / "out")
    assert not list(tmp_path.glob("out/patches/*"))


def test_damaged_pixels(slide_path, tmp_path):
    """The directory is whole, the tiles are not: the level read and its replacement both fail."""
    data = bytearray(slide_path.read_bytes())
    path = tmp_path / "damaged.svs"
    start = data.find(b"\xff\xd8\xff")
    data[start:] = data[start:].replace(b"\xff\xd8\xff", b"\x00\x00\x00")
    path.write_bytes(data)
    with pytest.raises(SlideReadError, match=r"damaged\.svs"):
        patchfy(path, tmp_path / "out")
    assert not list(tmp_path.glob("out/patches/*"))


@pytest.mark.parametrize("blocked", ["out", "out/patches", "out/masks"])
def test_a_file_stands_where_a_folder_is_needed(slide_path, tmp_path, blocked):
    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(OutputError, match="a file stands where a folder is needed"):
        patchfy(slide_path, tmp_path / "out")
    assert path.read_text() == "in the way"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed: errno = 28, No space left")],
    ids=["OSError", "RuntimeError"],
)
def test_full_disk(slide_path, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(h5py.File, "create_dataset", full)
        with pytest.raises(OutputError, match="disk"):
            patchfy(slide_path, tmp_path)
    assert files(tmp_path) == ["contours/case.geojson", "masks/case.jpg"]
    assert len(patchfy(slide_path, tmp_path)[1])


LIMITED = """
import resource, sys
from exaonepath.errors import OutputError
from exaonepath.patches import patchfy
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    patchfy(sys.argv[1], sys.argv[2], save_mask=False)
except OutputError as error:
    print("refused:", error)
"""

KILLED = """
import os, signal, sys
import h5py
from exaonepath.patches import patchfy
create = h5py.File.create_dataset
def create_and_die(self, name, *args, **kwargs):
    if name == "contour_index":
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return create(self, name, *args, **kwargs)
h5py.File.create_dataset = create_and_die
patchfy(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
def test_disk_that_really_refuses(warm_package, slide_path, tmp_path):
    done = warm_package.run(LIMITED, slide_path, tmp_path / "out", cwd=tmp_path)
    assert "refused:" in done.stdout, done.stderr
    assert files(tmp_path / "out") == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_killed_while_writing_then_resumed(warm_package, slide_path, tmp_path):
    done = warm_package.run(KILLED, slide_path, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out" / "patches" / "case.h5").exists()
    h5_path, coords, _ = patchfy(slide_path, tmp_path / "out")
    np.testing.assert_array_equal(read_patches(h5_path).coords, coords)


@pytest.mark.parametrize("step", ["find_tissue", "patch_grid", "write_picture", "write_patches"])
def test_interrupted_anywhere_then_resumed(slide_path, tmp_path, monkeypatch, step):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            patchfy(slide_path, tmp_path)
    assert set(files(tmp_path)) <= {"contours/case.geojson", "masks/case.jpg"}
    assert len(patchfy(slide_path, tmp_path)[1])


@pytest.mark.parametrize("damage", ["cut", "half"])
def test_damaged_result_is_redone(slide_path, tmp_path, caplog, damage):
    h5_path, coords, _ = patchfy(slide_path, tmp_path)
    if damage == "cut":
        h5_path.write_bytes(h5_path.read_bytes()[:1500])
    else:
        with h5py.File(h5_path, "r+") as file:
            file.attrs["complete"] = False
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(patchfy(slide_path, tmp_path)[1], coords)
    assert "making it again" in caplog.text
    assert len(read_patches(h5_path)) == len(coords)


@pytest.mark.parametrize(
    "knobs",
    [
        {"sthresh": "8"},
        {"mthresh": None},
        {"mthresh": float("nan")},
        {"close": None},
        {"a_t": None},
        {"seg_downsample": "2"},
        {"max_seg_pixels": "9"},
        {"line_thickness": None},
        {"line_thickness": float("nan")},
        {"wsi": None},
    ],
)
def test_values_of_the_wrong_kind_are_settings_errors(slide_path, tmp_path, knobs):
    with pytest.raises(SettingsError):
        patchfy(**{"wsi": slide_path, "out": tmp_path, **knobs})
    assert not (tmp_path / "patches").exists()
