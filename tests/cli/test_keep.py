"""What remains of a finished slide, and that it still counts as finished."""

import h5py
import numpy as np
import pytest

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.embeddings import read_embedding, read_slide_embedding
from exaonepath.slides import stages
from exaonepath.slides.embed import embed_features_file
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.outputs import output_paths
from exaonepath.synthetic import make_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return make_slide(tmp_path_factory.mktemp("slides") / "one.svs", 2500, 2000, fragments=2, holes=False)


@pytest.fixture
def encode(run, slide, tmp_path):
    def call(*arguments, out="out", status=0, weights="random:0"):
        done = run("encode", slide, "--out", tmp_path / out, "--weights", weights, *arguments)
        assert done.exit_code == status, done.stderr
        return done, output_paths(tmp_path / out, "one")

    return call


@pytest.fixture
def never(monkeypatch):
    """From here on, no features may be computed."""

    def refuse():
        monkeypatch.setattr(stages, "prepare_extraction", lambda *_, **__: pytest.fail("computed again"))

    return refuse


@pytest.mark.parametrize("keep", ["slide", "features", "all", None])
def test_what_remains(encode, keep):
    _, paths = encode(*(() if keep is None else ("--keep", keep)))
    assert paths.features.exists() == (keep != "slide")
    assert paths.patches.is_file()
    assert paths.mask.is_file()
    with h5py.File(paths.embedding) as file:
        assert ("patch_embedding" in file) == (keep in ("all", None))
    assert not [path for path in paths.features.parent.iterdir() if path.name.startswith(".")]


def test_the_slide_embedding_does_not_depend_on_it(encode):
    vectors = [read_slide_embedding(encode("--keep", keep, out=keep)[1].embedding)[0] for keep in ("slide", "all")]
    assert np.array_equal(*vectors)


@pytest.mark.parametrize("again", [(), ("--keep", "slide")])
def test_a_finished_slide_is_finished_without_its_features(encode, never, again):
    _, paths = encode("--keep", "slide")
    before = paths.embedding.stat()
    never()
    done, _ = encode(*again)
    assert "already there" in done.stdout
    assert paths.embedding.stat().st_mtime_ns == before.st_mtime_ns
    paths.patches.unlink()  # is computed from the slide alone
    assert "already there" in encode(*again)[0].stdout


@pytest.mark.parametrize(
    "change",
    [
        ("--step-size", "128"),
        ("--resize", "224"),
        ("--feature-dtype", "float16"),
        ("--dtype", "bfloat16"),
        ("--mpp", "0.4"),
        ("--overwrite",),
    ],
)
def test_any_other_input_is_computed(encode, change):
    _, paths = encode("--keep", "slide")
    before = paths.embedding.stat().st_mtime_ns
    done, _ = encode("--keep", "slide", *change)
    assert "already there" not in done.stdout
    assert paths.embedding.stat().st_mtime_ns > before
    assert not paths.features.exists()


def test_other_weights_are_computed(encode):
    _, paths = encode("--keep", "slide")
    encode("--keep", "slide", weights="random:1")
    assert read_slide_embedding(paths.embedding)[1]["weights"] == "random:1"


def test_a_damaged_embedding_is_computed(encode):
    _, paths = encode("--keep", "slide")
    good = read_embedding(paths.embedding, require_patches=False)
    data = bytearray(paths.embedding.read_bytes())
    at = data.find(good.slide_embedding.tobytes())
    data[at + 5] ^= 1
    paths.embedding.write_bytes(data)
    done, _ = encode("--keep", "slide")
    assert "damaged" in done.stderr
    assert np.array_equal(read_slide_embedding(paths.embedding)[0], good.slide_embedding)


def test_reducing_and_restoring(encode, never, tmp_path):
    _, paths = encode("--keep", "all")
    everything = read_embedding(paths.embedding)
    encode("--keep", "slide")
    assert not paths.features.exists()
    assert np.array_equal(read_slide_embedding(paths.embedding)[0], everything.slide_embedding)
    with pytest.raises(DataFileError, match="--keep all"):
        read_embedding(paths.embedding)
    assert read_embedding(paths.embedding, require_patches=False).patch_embedding is None
    encode("--keep", "features")
    assert paths.features.exists()
    encode("--keep", "all")
    assert np.array_equal(read_embedding(paths.embedding).patch_embedding, everything.patch_embedding)


def test_embeddings_of_earlier_versions_can_be_reduced(encode, never, monkeypatch):
    """They do not state what their features were made from: the statement is added before the features are removed."""
    from exaonepath.slides import embed

    with monkeypatch.context() as earlier:
        earlier.setattr(embed, "_OF_FEATURES", {})
        _, paths = encode()
    encode("--keep", "slide")
    assert not paths.features.exists()
    never()
    assert "already there" in encode()[0].stdout


def test_features_of_other_settings_are_not_removed(encode, tmp_path):
    _, paths = encode("--keep", "slide")
    _, other = encode("--resize", "224", out="other")
    paths.features.write_bytes(other.features.read_bytes())
    done, _ = encode("--keep", "slide")
    assert "made with other settings" in done.stderr
    assert paths.features.exists()


def test_features_stay_while_patches_are_unreadable(encode, monkeypatch, never):
    from exaonepath.errors import SlideReadError
    from exaonepath.slides.image import SlideImage

    read = SlideImage.read_rgb
    broken = True

    def sometimes(self, location, level, size):
        if broken and level == 0 and location[0] < 400:
            raise SlideReadError("broken")
        return read(self, location, level, size)

    monkeypatch.setattr(SlideImage, "read_rgb", sometimes)
    _, paths = encode("--keep", "slide", status=3)
    assert paths.features.exists()
    broken = False
    encode("--keep", "slide")
    assert not paths.features.exists()
    assert read_slide_embedding(paths.embedding)[1]["n_failed"] == 0


def test_embeddings_are_those_of_the_stored_features(encode, slide_encoder, tmp_path):
    _, paths = encode("--feature-dtype", "float16")
    again, _ = embed_features_file(paths.features, tmp_path / "again.h5", slide_encoder)
    assert np.array_equal(read_embedding(again).patch_embedding, read_embedding(paths.embedding).patch_embedding)
    assert read_embedding(paths.embedding).attrs["feature_dtype"] == "float16"


@pytest.mark.parametrize("wrong", [("--keep", "nothing"), ("--feature-dtype", "float64")])
def test_wrong_values_are_refused_before_anything_is_done(encode, tmp_path, wrong):
    done, _ = encode(*wrong, status=1)
    assert wrong[1] in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_function_refuses_them_too(slide, tmp_path):
    with pytest.raises(SettingsError, match="slide, features or all"):
        encode_slide(slide, tmp_path / "out", "random:0", "random:0", keep="none")
