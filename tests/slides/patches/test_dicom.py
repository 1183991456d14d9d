"""A DICOM slide as scanners store it: levels, label and overview are a file each, of one series."""

import io

import numpy as np
import pytest
from PIL import Image

from exaonepath.slides.encode import find_slides
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
    assert not caplog.text


def test_any_file_of_the_series_opens_the_whole_slide(series):
    folder, _ = series
    with SlideImage(folder / "2.dcm") as slide:
        assert slide.dimensions == (2000, 1500)
