"""A manifest in use: ids, pixel sizes, masks, weights and patients of its own for each slide."""

import h5py
import pytest

from exaonepath.encoders import loading
from exaonepath.files.embeddings import read_slide_embedding
from exaonepath.files.patches import read_patches
from exaonepath.slides.cohort.encoder_pool import EncoderPool
from exaonepath.slides.outputs import output_paths
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    make_slide(folder / "one.svs", 2500, 2000, fragments=2, holes=False)
    (folder / "deep").mkdir()
    (folder / "deep" / "one.svs").write_bytes((folder / "one.svs").read_bytes())
    square = [[[200, 200], [1400, 200], [1400, 1400], [200, 1400], [200, 200]]]
    feature = f'{{"type": "Feature", "geometry": {{"type": "Polygon", "coordinates": {square}}}, "properties": {{}}}}'
    (folder / "region.geojson").write_text(f'{{"type": "FeatureCollection", "features": [{feature}]}}')
    return folder


@pytest.fixture
def write(folder, tmp_path):
    """A manifest in the folder of the slides, under a name of its own."""

    def manifest(text):
        path = folder / f"{tmp_path.name}.csv"
        path.write_text(text)
        return path

    return manifest


@pytest.mark.parametrize("command", ["encode", "patch"])
def test_each_slide_has_its_own_settings(run, write, folder, tmp_path, command):
    path = write(
        "slide,id,patient,mpp,mask\none.svs,plain,P1,,\none.svs,fine,P1,0.25,\ndeep/one.svs,masked,,,region.geojson\n"
    )
    weights = ("--weights", "random:0") if command == "encode" else ()
    done = run(command, "--manifest", path, "--out", tmp_path / "out", *weights)
    assert done.exit_code == 0, done.stderr
    patches = {name: read_patches(output_paths(tmp_path / "out", name).patches) for name in ("plain", "fine", "masked")}
    sizes = {name: found.patch_size for name, found in patches.items()}
    assert sizes["fine"] == 512
    assert sizes["plain"] == sizes["masked"] != 512
    assert patches["masked"].outcome.segmenter == "mask"
    assert patches["plain"].outcome.segmenter == "exaone"
    assert patches["plain"].name == "plain"
    if command == "encode":
        attrs = {n: read_slide_embedding(output_paths(tmp_path / "out", n).embedding)[1] for n in patches}
        assert attrs["plain"]["patient"] == "P1"
        assert "patient" not in attrs["masked"]
        again = run(command, "--manifest", path, "--out", tmp_path / "out", *weights)
        assert again.stdout.count("already there") == 3


def test_each_slide_has_its_own_weights(run, write, tmp_path, monkeypatch):
    path = write("slide,id,weights\none.svs,a,random:1\none.svs,b,\none.svs,c,random:1\n")
    loaded = []
    load = loading.load_patch_encoder
    monkeypatch.setattr(loading, "load_patch_encoder", lambda w, **kw: loaded.append(w) or load(w, **kw))
    done = run("encode", "--manifest", path, "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 0, done.stderr
    weights = [read_slide_embedding(output_paths(tmp_path / "out", name).embedding)[1]["weights"] for name in "abc"]
    assert weights == ["random:1", "random:0", "random:1"]
    assert sorted(loaded) == ["random:0", "random:1"]


def test_nothing_is_done_with_a_bad_manifest(run, write, tmp_path):
    path = write("slide,id\none.svs,a\ngone.svs,b\none.svs,a\n")
    done = run("encode", "--manifest", path, "--out", tmp_path / "out", "--weights", "random:0")
    assert done.exit_code == 1
    assert "gone.svs does not exist" in done.stderr
    assert "the id a is given twice" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("slide,mask\none.svs,region.geojson\n", ("--segmenter", "otsu"), "takes no mask"),
        ("slide,id\none.svs,a\none.svs,b\n", ("--mask", "{folder}/region.geojson"), "one file for 2 slides"),
        ("slide\none.svs\n", ("--mask-class", "Tumour"), "there is none"),
    ],
)
def test_contradictions_are_found_before_work(run, write, folder, tmp_path, text, arguments, message):
    arguments = [argument.format(folder=folder) for argument in arguments]
    done = run("patch", "--manifest", write(text), "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_slides_are_named_or_listed(run, write, folder, tmp_path):
    assert run("encode", "--out", tmp_path / "out").exit_code == 2
    both = run("encode", folder / "one.svs", "--manifest", write("slide\none.svs\n"), "--out", tmp_path / "out")
    assert both.exit_code == 1
    assert "not both" in both.stderr


def test_a_mapping_of_columns_is_stated(run, write, tmp_path):
    path = write("File Name,case_id\none.svs,P\n")
    done = run("patch", "--manifest", path, "--out", tmp_path / "out")
    assert "slide = column 'File Name', patient = column 'case_id'" in done.stderr
    assert done.stderr not in run("patch", "--manifest", path, "--out", tmp_path / "out", "--quiet").stderr


def test_recursive_and_hashed(run, folder, tmp_path):
    done = run("patch", folder, "-r", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "--manifest" in done.stderr
    done = run("patch", folder / "deep*", "--out", tmp_path / "out", "--layout", "hashed")
    assert done.exit_code == 0, done.stderr
    with h5py.File(tmp_path / "out" / "patches" / "76" / "92" / "one.h5") as file:
        assert file.attrs["complete"]
    assert run("patch", folder / "one.svs", "--out", tmp_path / "out", "--layout", "flat").exit_code == 1
    assert run("patch", folder / "one.svs", "--out", tmp_path / "out", "--layout", "deep").exit_code == 2


def test_at_most_two_encoders_are_loaded():
    alive = set()

    class Loaded:
        def __init__(self, weights):
            self.weights = weights
            alive.add(weights)

        def __del__(self):
            alive.discard(self.weights)

    pool = EncoderPool(Loaded)
    for weights in ("a", "b", "c", "a", "c", "b", "b"):
        assert pool.get(weights).weights == weights
        assert len(alive) <= 2
