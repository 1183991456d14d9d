"""A DICOM slide as scanners store it: levels, label and overview are a file each, of one series."""

import io
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from exaonepath.errors import SlideChangedError, SlideOpenError
from exaonepath.slides.companions import companion_files
from exaonepath.slides.find import find_slides
from exaonepath.slides.image import SlideImage
from exaonepath.slides.patches.pipeline import patchfy
from exaonepath.synthetic import make_slide

pydicom = pytest.importorskip("pydicom")

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class: VL Whole Slide Microscopy Image Storage
TILE, MPP = 256, 0.5


def frames(pixels, height, width):
    """JPEG tiles of `pixels`, row by row; those at the edge are filled up with white."""
    for y in range(0, pixels.shape[0], height):
        for x in range(0, pixels.shape[1], width):
            tile = np.full((height, width, 3), 255, np.uint8)
            part = pixels[y : y + height, x : x + width]
            tile[: part.shape[0], : part.shape[1]] = part
            buffer = io.BytesIO()
            Image.fromarray(tile).save(buffer, "JPEG", quality=95, subsampling=0)
            yield buffer.getvalue()


def write_instance(path, pixels, uids, number, flavor, mpp):
    """One file of a series. The attributes are those that OpenSlide asks for."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, generate_uid

    rows, columns = pixels.shape[:2]
    tile = (TILE, TILE) if flavor == "VOLUME" else (rows, columns)
    encoded = list(frames(pixels, *tile))
    dataset, meta = Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID = WHOLE_SLIDE
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = WHOLE_SLIDE, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = uids
    dataset.Modality, dataset.InstanceNumber = "SM", number
    dataset.ImageType = ["ORIGINAL", "PRIMARY", flavor, "NONE" if number == 1 else "RESAMPLED"]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "YBR_FULL_422", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.NumberOfFrames, (dataset.Rows, dataset.Columns) = len(encoded), tile
    dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns = rows, columns
    dataset.TotalPixelMatrixFocalPlanes, dataset.NumberOfOpticalPaths = 1, 1
    dataset.DimensionOrganizationType = "TILED_FULL"
    measures, groups, optics = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001  # in millimetres
    groups.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [groups]
    optics.OpticalPathIdentifier, optics.ObjectiveLensPower = "1", 20
    dataset.OpticalPathSequence = [optics]
    dataset.PixelData = encapsulate(encoded)
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """(folder of one series, the SVS file that it was made from)"""
    from pydicom.uid import generate_uid

    folder = tmp_path_factory.mktemp("dicom")
    svs = make_slide(folder / "source.svs", 2000, 1500, fragments=2, seed=1)
    with SlideImage(svs) as slide:
        whole = Image.fromarray(slide.read_region((0, 0), 0, slide.dimensions)[..., :3])
    (folder / "series").mkdir()
    uids = [generate_uid() for _ in range(3)]
    for level in range(3):
        pixels = np.asarray(whole.reduce(4**level))
        write_instance(folder / "series" / f"{level}.dcm", pixels, uids, level + 1, "VOLUME", MPP * 4**level)
    small = np.asarray(whole.resize((200, 150)))
    write_instance(folder / "series" / "label.dcm", small, uids, 4, "LABEL", 10 * MPP)
    write_instance(folder / "series" / "overview.dcm", small, uids, 5, "OVERVIEW", 10 * MPP)
    return folder / "series", svs


def test_a_series_is_one_slide_with_its_levels_and_scale(series, tmp_path, caplog):
    folder, svs = series
    (found,) = find_slides([folder])
    assert found == folder / "0.dcm"
    with SlideImage(found) as slide, SlideImage(svs) as source:
        assert slide.dimensions == source.dimensions
        assert len(slide.level_downsamples) == 3
        assert slide.mpp == pytest.approx(MPP)
        assert slide.scale_doubts == ()
        ours, theirs = (patchfy(one, tmp_path / one.path.stem)[1] for one in (slide, source))
    # The same tissue through another round of JPEG: a contour, and with it its grid, may begin some pixels elsewhere.
    assert min(len(ours), len(theirs)) > 10
    assert abs(len(ours) - len(theirs)) <= 2
    assert not [record for record in caplog.records if str(folder) in record.getMessage()]


def test_a_folder_of_one_series_is_the_slide(series, tmp_path):
    with SlideImage(series[0]) as slide:
        assert slide.path == series[0] / "0.dcm"
        assert (slide.dimensions, slide.reader) == ((2000, 1500), "openslide")
    with pytest.raises(SlideOpenError, match="not a slide"):
        SlideImage(tmp_path)


def test_a_folder_of_two_series_is_ambiguous(series, tmp_path):
    shutil.copy(series[0] / "0.dcm", tmp_path / "0.dcm")
    data = (series[0] / "1.dcm").read_bytes()
    at = data.index(b"\x20\x00\x0e\x00UI") + 10
    (tmp_path / "1.dcm").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(SlideOpenError, match="holds 2 DICOM slides"):
        SlideImage(tmp_path)


def test_any_file_of_the_series_opens_the_whole_slide(series):
    folder, _ = series
    with SlideImage(folder / "2.dcm") as slide:
        assert slide.dimensions == (2000, 1500)


@pytest.mark.parametrize("what", ["replaced", "gone", "added"])
def test_a_slide_of_several_files_is_another_one_if_any_of_them_is(series, tmp_path, what):
    folder = tmp_path / "copy"
    shutil.copytree(series[0], folder)
    with SlideImage(folder / "2.dcm") as slide:
        before = slide.fingerprint()
        newest = max(file.stat().st_mtime_ns for file in folder.iterdir())
        assert slide.mtime_ns == newest
        if what == "replaced":
            data = bytearray((folder / "0.dcm").read_bytes())
            data[-1000:] = bytes(1000)
            (folder / "0.dcm").write_bytes(data)
            with pytest.raises(SlideChangedError, match=r"0\.dcm, of which .*2\.dcm is a part, was replaced"):
                slide.check_unchanged()
        elif what == "gone":
            (folder / "label.dcm").unlink()
            with pytest.raises(SlideOpenError, match=r"label\.dcm cannot be read any more: it is gone"):
                slide.check_unchanged()
        else:
            shutil.copy(series[0] / "0.dcm", folder / "x.dcm")
            slide.check_unchanged()  # nothing is read from a file that was not there
            return
    data = bytearray(shutil.copy(series[0] / "0.dcm", folder / "0.dcm").read_bytes())
    if what == "replaced":  # what OpenSlide's own hash of the smallest level does not see
        data[len(data) // 2 : len(data) // 2 + 100_000] = bytes(100_000)
        (folder / "0.dcm").write_bytes(data)
    with SlideImage(folder / "2.dcm") as slide:
        assert slide.fingerprint() != before


def test_a_series_without_its_largest_level_is_warned_about(series, tmp_path, caplog):
    for name in ("1.dcm", "2.dcm", "label.dcm"):
        shutil.copy(series[0] / name, tmp_path / name)
    with caplog.at_level(logging.WARNING), SlideImage(tmp_path / "1.dcm") as slide:
        assert slide.dimensions == (500, 375)
    assert "the file of full resolution seems to be missing" in caplog.text


@pytest.mark.parametrize("suffix", ["", ".dicom", ".1"])
def test_a_series_is_read_whatever_its_files_are_called(series, tmp_path, suffix):
    for file in series[0].iterdir():
        shutil.copy(file, tmp_path / f"{file.stem}{suffix}")
    (found,) = find_slides([tmp_path])
    with SlideImage(found) as slide:
        assert slide.dimensions == (2000, 1500)
        assert len(companion_files(found)) == 4
