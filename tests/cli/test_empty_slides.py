"""`patch` and `encode` name the slides without a patch, and fail for them if asked."""

import json

import pytest

from exaonepath.errors import SettingsError
from exaonepath.files.embeddings import read_embedding
from exaonepath.slides.cohort.run import encode_slides
from exaonepath.slides.encode import encode_slide
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    make_slide(folder / "a_empty.svs", 1000, 1000, fragments=0)
    make_slide(folder / "b_good.svs", 2000, 1500, fragments=1, holes=False)
    return folder


@pytest.mark.parametrize("command", ["patch", "encode"])
def test_slides_without_a_patch_are_listed_at_the_end(run, folder, tmp_path, command):
    weights = ["--weights", "random:0"] * (command == "encode")
    for _ in range(2 if command == "patch" else 1):  # also if the results are used again
        done = run(command, folder, "--out", tmp_path, *weights)
        assert done.exit_code == 0
        *_, head, line = done.stderr.splitlines()
        assert head == "1 of 2 slides have no patch:"
        assert line.startswith(f"  {folder / 'a_empty.svs'}: no textured pixel")
    if command == "patch":
        quiet = run(command, folder, "--out", tmp_path, "--quiet")
        assert "have no patch" not in quiet.stderr
    done = run(command, folder, "--out", tmp_path, "--fail-on-empty", "--quiet", *weights)
    assert done.exit_code == 1
    assert "error: 1 of 2 slides have no patch:" in done.stderr
    assert (tmp_path / "patches" / "a_empty.h5").is_file()
    if command == "encode":
        assert (read_embedding(tmp_path / "embeddings" / "a_empty.h5").slide_embedding == 0).all()


def test_a_single_empty_slide_fails_if_asked(run, folder, tmp_path):
    done = run("patch", folder / "a_empty.svs", "--out", tmp_path, "--fail-on-empty")
    assert done.exit_code == 1
    assert "error: 1 of 1 slides have no patch:" in done.stderr
    assert run("patch", folder / "b_good.svs", "--out", tmp_path, "--fail-on-empty").exit_code == 0


def test_python_gets_the_reason(run, folder, tmp_path):
    from exaonepath.encoders import loading

    patch, slide = loading.load_patch_encoder("random:0"), loading.load_slide_encoder("random:0", device="cpu")
    result = encode_slide(folder / "a_empty.svs", tmp_path, patch, slide)
    assert (result.n_patches, result.n_failed) == (0, 0)
    assert "no textured pixel" in result.no_patch
    assert encode_slide(folder / "b_good.svs", tmp_path, patch, slide).no_patch == ""


def test_one_mask_for_several_slides_is_refused_in_python_too(folder, tmp_path):
    mask = square(tmp_path / "b_good.geojson", 0, 0, 600, 600, "Tissue")
    with pytest.raises(SettingsError, match="one file for 2 slides"):
        next(encode_slides(folder, tmp_path, patching={"mask": mask}))
    with pytest.raises(SettingsError, match="known: exaone"):
        next(encode_slides(folder, tmp_path, patching={"segmenter": "none"}))


def square(path, x0, y0, x1, y1, name):
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    path.write_text(json.dumps([{**feature, "properties": {"classification": {"name": name}}}]))
    return path


def test_masks_and_their_options(run, folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    square(masks / "a_empty.geojson", 0, 0, 600, 600, "Tissue")
    square(masks / "b_good.geojson", 0, 0, 600, 600, "Tissue")
    pen = square(tmp_path / "pen.geojson", 0, 0, 200, 200, "Pen")
    good = folder / "b_good.svs"
    done = run("patch", folder, "--out", tmp_path / "1", "--mask", masks, "--mask-class", "Tissue")
    assert (done.exit_code, done.stdout.count("  9 patches")) == (0, 2)
    done = run("patch", good, "--out", tmp_path / "2", "--mask", masks, "--exclude", pen, "--exclude-class", "Pen")
    assert "  8 patches" in done.stdout
    done = run("patch", folder, "--out", tmp_path / "3", "--mask", masks / "b_good.geojson")
    assert (done.exit_code, "one file for 2 slides" in done.stderr) == (1, True)
    done = run("patch", good, "--out", tmp_path / "4", "--mask", masks, "--mask-class", "Tumor")
    assert (done.exit_code, "its classes are Tissue (1)" in done.stderr) == (1, True)
    assert run("patch", good, "--out", tmp_path / "5", "--segmenter", "none").exit_code == 1
    assert run("patch", good, "--out", tmp_path / "5", "--seg-downsample", "much").exit_code == 2
    for wrong in (["--segmenter", "none"], ["--remove", "dust"], ["--mask", "none.png"], ["--geojson-origin", "x"]):
        done = run("encode", good, "--out", tmp_path / "never", *wrong)
        assert (done.exit_code, done.stderr.count("error:"), (tmp_path / "never").exists()) == (1, 1, False)
    done = run("patch", good, "--out", tmp_path / "5", "--segmenter", "otsu", "--seg-downsample", "auto")
    assert done.exit_code == 0
    done = run("patch", good, "--out", tmp_path / "6", "--no-contours")
    assert done.exit_code == 0
    assert not (tmp_path / "6" / "contours").exists()
    done = run("encode", good, "--out", tmp_path / "7", "--mask", masks, "--exclude", pen, "--weights", "random:0")
    assert "  8 patches" in done.stdout
