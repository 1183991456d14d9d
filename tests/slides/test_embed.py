"""The slide stage and its file."""

import re

import h5py
import numpy as np
import pytest
import torch

from exaonepath.encoders.loading import load_slide_encoder
from exaonepath.errors import BackendError, DataFileError, MemoryLimitError, OutputCollisionError
from exaonepath.files.embeddings import read_embedding
from exaonepath.files.features import FeatureSet, read_features
from exaonepath.slides.embed import embed_features_file, embed_slide


@pytest.fixture(scope="module")
def encoder():
    return load_slide_encoder("random:0")


@pytest.fixture
def write(tmp_path):
    """Write a features file as the original does; keyword arguments replace or (None) drop datasets."""

    def make(n=30, name="f.h5", attrs=(), **changes):
        rng = np.random.default_rng(0)
        data = {
            "features": rng.standard_normal((n, 768)).astype(np.float32),
            "coords": rng.integers(0, 90_000, (n, 2), dtype=np.int32),
            "contour_index": np.sort(rng.integers(0, 3, n, dtype=np.int32)),
        }
        with h5py.File(tmp_path / name, "w") as file:
            for key, value in {**data, **changes}.items():
                if value is not None:
                    file[key] = value
            file.attrs.update(dict(attrs))
        return tmp_path / name

    return make


def test_file_in_file_out(write, encoder, tmp_path):
    source = write()
    path, reused = embed_features_file(source, tmp_path / "e" / "out.h5", encoder)
    assert not reused
    embedding = read_embedding(path)
    assert embedding.slide_embedding.shape == (1536,)
    assert embedding.patch_embedding.shape == (30, 1536)
    features = read_features(source)
    assert np.array_equal(embedding.patch_embedding[:, :768], features.features)
    assert np.array_equal(embedding.coords, features.coords)
    assert np.allclose(embedding.slide_embedding, embedding.patch_embedding.mean(0), atol=1e-5)
    assert embedding.attrs["weights"] == "random:0"
    assert bool(embedding.attrs["random_weights"])
    with torch.inference_mode():
        direct = encoder.model(*(torch.from_numpy(a)[None] for a in (features.features,)))
    assert not np.allclose(direct.slide_embedding[0].numpy(), embedding.slide_embedding, atol=1e-4)  # coords are used


def test_finished_work_is_kept_and_stale_work_is_not(write, encoder, tmp_path):
    out = tmp_path / "out.h5"
    embed_features_file(write(), out, encoder)
    before = out.read_bytes()
    assert embed_features_file(tmp_path / "f.h5", out, encoder) == (out, True)
    assert out.read_bytes() == before
    assert embed_features_file(tmp_path / "f.h5", out, load_slide_encoder("random:1")) == (out, False)
    assert embed_features_file(write(n=31), out, load_slide_encoder("random:1")) == (out, False)
    assert embed_features_file(tmp_path / "f.h5", out, encoder, overwrite=True) == (out, False)
    out.write_bytes(before[:3000])
    assert embed_features_file(tmp_path / "f.h5", out, encoder) == (out, False)


def test_another_slides_embedding_is_not_overwritten(write, encoder, tmp_path):
    out = tmp_path / "out.h5"
    embed_features_file(write(attrs={"slide_fingerprint": "one"}.items()), out, encoder)
    before = out.read_bytes()
    with pytest.raises(OutputCollisionError, match="a different slide"):
        embed_features_file(write(attrs={"slide_fingerprint": "two"}.items()), out, encoder)
    with pytest.raises(OutputCollisionError, match="input of this command"):
        embed_features_file(tmp_path / "f.h5", tmp_path / "f.h5", encoder)
    assert out.read_bytes() == before


def test_features_that_do_not_say_whose_they_are_do_not_replace_a_known_embedding(write, encoder, tmp_path):
    out = tmp_path / "out.h5"
    embed_features_file(write(attrs={"slide_fingerprint": "one"}.items()), out, encoder)
    before = out.read_bytes()
    with pytest.raises(OutputCollisionError, match="perhaps of another slide"):
        embed_features_file(write(n=12), out, encoder)
    assert out.read_bytes() == before
    assert not embed_features_file(write(n=12), out, encoder, overwrite=True)[1]


def test_no_patches_is_a_result(write, encoder, tmp_path, caplog):
    path, _ = embed_features_file(write(n=0), tmp_path / "out.h5", encoder)
    embedding = read_embedding(path)
    assert embedding.patch_embedding.shape == (0, 1536)
    assert (embedding.slide_embedding == 0).all()
    assert "no patch" in caplog.text
    assert embed_features_file(tmp_path / "f.h5", tmp_path / "out.h5", encoder)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": None}, "lacks features"),
        ({"coords": None}, "lacks coords"),
        ({"features": np.zeros((30, 512), np.float32)}, "512 wide, the model takes 768"),
        ({"coords": np.zeros((29, 2), np.int32)}, "29 rows in coords but 30"),
        ({"coords": np.full((30, 2), 2**33)}, "coords holds values beyond 32 bits"),
        ({"contour_index": np.full(30, 2**33)}, "contour_index holds values beyond 32 bits"),
        ({"contour_index": np.zeros(31, np.int32)}, "31 rows in contour_index but 30"),
        ({"features": np.full((30, 768), np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_broken_features_are_refused_and_nothing_is_written(write, encoder, tmp_path, changes, message):
    out = tmp_path / "out.h5"
    with pytest.raises(DataFileError, match=message):
        embed_features_file(write(**changes), out, encoder)
    assert not out.exists()


def test_a_slide_that_does_not_fit_is_refused_and_nothing_is_written(write, encoder, tmp_path):
    source, out = write(n=500), tmp_path / "out.h5"
    with pytest.raises(MemoryLimitError, match=r"500 patches need 0\.[12]\d GB on cpu") as refused:
        embed_features_file(source, out, encoder, max_memory="0.18GB")
    # What is advised needs less than what was refused.
    needed, *advised = map(float, re.findall(r"(?:need|bfloat16 \() ?([\d.]+) GB", str(refused.value)))
    assert all(number <= needed for number in advised)
    assert not out.exists()
    embed_features_file(source, out, encoder, max_memory="0.4GB")
    # The limit changes chunks, not results: what is finished stays finished.
    assert embed_features_file(source, out, encoder)[1]


def test_an_encoder_that_gives_nan_is_an_error(encoder):
    features = FeatureSet(np.full((3, 768), 3e38, np.float32), np.zeros((3, 2), np.int32), np.zeros(3, np.int32))
    with pytest.raises(BackendError, match="NaN or infinity"):
        embed_slide(features, encoder)


def test_reading_a_broken_embedding(write, encoder, tmp_path, drop_checksums):
    out = tmp_path / "out.h5"
    embed_features_file(write(), out, encoder)
    with h5py.File(out, "a") as file:
        del file["coords"]
        file["coords"] = np.zeros((2, 2), np.int32)
    with pytest.raises(DataFileError, match=r"coords must be integers \[30, 2\], got int32 \[2, 2\]"):
        read_embedding(out)
    with h5py.File(out, "a") as file:
        file.attrs["complete"] = False
        drop_checksums(file)
    with pytest.raises(DataFileError, match="half written"):
        read_embedding(out)
