"""Which other files belong to a slide, and that they are part of what it is."""

import hashlib
import os

import numpy as np
import pytest
import tifffile

from exaonepath.errors import SlideChangedError
from exaonepath.slides.companions import companion_files
from exaonepath.slides.image import SlideImage


def write(path, shade=200):
    pixels = np.full((600, 600, 3), shade, np.uint8)
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="jpeg", photometric="rgb")
    return path


def test_a_slide_of_one_file_has_no_others_and_keeps_its_fingerprint(tmp_path):
    path = write(tmp_path / "a.tif")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x")
    assert companion_files(path) == ()
    digest = hashlib.sha256()
    data = path.read_bytes()
    with SlideImage(path) as slide:
        before = slide.fingerprint()
        digest.update(f"{len(data)}:{slide.properties['openslide.quickhash-1']}".encode())
    for i in range(64):
        at = (len(data) - 1) * i // 64
        digest.update(data[at : at + 65536])
    assert before == digest.hexdigest()  # stored results depend on it
    write(tmp_path / "b.tif", 100)
    with SlideImage(path) as slide:
        assert slide.fingerprint() == before


def test_the_files_that_a_hamamatsu_index_names(tmp_path):
    for name in ("a.jpg", "a(1,0).jpg", "a.opt", "other.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path.parent / "outside.jpg").write_bytes(b"x")
    path = tmp_path / "a.vms"
    path.write_text(
        "[Virtual Microscope Specimen]\nImageFile=a.jpg\r\nImageFile(1,0)=a(1,0).jpg\nOptimisationFile = a.opt\n"
        "MapFile=gone.jpg\nMacroImage=../outside.jpg\nNoLayers=1\n[broken\n=\nx=\0\n" + "y=" + "z" * 5000
    )
    assert [file.name for file in companion_files(path)] == ["a(1,0).jpg", "a.jpg", "a.opt"]


@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 20])
def test_an_index_of_any_content_names_nothing(tmp_path, content):
    path = tmp_path / "a.vmu"
    path.write_bytes(content)
    assert companion_files(path) == ()


def test_the_data_folder_of_a_mirax_slide_is_part_of_it(tmp_path):
    # OpenSlide opens a TIFF by its content, whatever its suffix: the data folder is all that matters here.
    path = write(tmp_path / "a.mrxs")
    assert companion_files(path) == ()
    (tmp_path / "a").mkdir()
    data = [tmp_path / "a" / name for name in ("Data0000.dat", "Data0001.dat", "Slidedat.ini")]
    for file in data:
        file.write_bytes(bytes(1 << 20))
    os.utime(data[1], (2**31, 2**31))
    prints = set()
    with SlideImage(path) as slide:
        assert companion_files(path) == tuple(data)
        assert slide.mtime_ns == 2**31 * 10**9
        prints.add(slide.fingerprint())
        data[0].write_bytes(b"x" * (1 << 20))
        with pytest.raises(SlideChangedError, match=r"Data0000\.dat"):
            slide.check_unchanged()
    with SlideImage(path) as slide:
        prints.add(slide.fingerprint())
    data[2].write_bytes(bytes(100))
    with SlideImage(path) as slide:
        prints.add(slide.fingerprint())
    data[2].rename(tmp_path / "a" / "Other.ini")
    with SlideImage(path) as slide:
        prints.add(slide.fingerprint())
    assert len(prints) == 4
