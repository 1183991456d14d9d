"""The encoders in the forms of other libraries give the numbers of `encode_slide`; those libraries are not needed."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in_encoders import EMBED, WIDTH, stand_in_patch_encoder, stand_in_slide_encoder

import exaonepath
from exaonepath import read_embedding, read_features
from exaonepath.adapters import huggingface, lazyslide, timm, trident
from exaonepath.adapters.modules import PatchEncoderModule, PatchTransform, SlideEncoderModule
from exaonepath.encoders import loading
from exaonepath.errors import DataFileError, MissingDependencyError, SettingsError
from exaonepath.slides.encode import encode_slide
from exaonepath.slides.features.encoding import BatchEncoder
from exaonepath.slides.features.preprocessing import PreprocessingConfig, normalise, resize_and_crop
from exaonepath.slides.patches.fragments import fragments_of_grid
from exaonepath.synthetic import make_slide

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slide_encoder():
    return stand_in_slide_encoder()


@pytest.fixture(scope="module")
def patch_encoder():
    return stand_in_patch_encoder()


@pytest.fixture(scope="module")
def vit():
    """The real patch encoder."""
    return loading.load_patch_encoder("random:0")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, patch_encoder, slide_encoder):
    folder = tmp_path_factory.mktemp("adapters")
    slide = make_slide(folder / "one.svs", 1900, 1300, fragments=3, holes=False, seed=4, levels=(1, 4))
    encode_slide(slide, folder / "out", patch_encoder, slide_encoder, num_workers=0, batch_size=7)
    features = read_features(folder / "out" / "patches" / "one_features.h5")
    return slide, features, read_embedding(folder / "out" / "embeddings" / "one.h5")


# ---- what is shared


@pytest.mark.parametrize("size", [(256, 256), (300, 300), (231, 400)])
def test_the_transform_is_the_preprocessing(size):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    config = PreprocessingConfig(resize=230)
    expected = normalise(torch.from_numpy(np.ascontiguousarray(resize_and_crop(pixels, config)))[None], config)[0]
    transform = pickle.loads(pickle.dumps(PatchTransform(config)))  # noqa: S301  as workers of a DataLoader get it
    alpha = np.dstack([pixels, np.full(size, 255, np.uint8)])
    for image in (pixels, alpha, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        assert torch.equal(transform(image), expected)
    for image in (pixels.astype(np.float32), pixels[..., 0], np.empty((0, 5, 3), np.uint8)):
        with pytest.raises(SettingsError):
            transform(image)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_those_of_extraction(vit, dtype):
    images = np.random.default_rng(0).integers(0, 255, (2, 56, 56, 3)).astype(np.uint8)
    config, device = PreprocessingConfig(resize=56, crop=56), torch.device("cpu")
    expected = BatchEncoder(vit.model, config, device, getattr(torch, dtype), batch_size=2).start(images).result()
    module = PatchEncoderModule(vit, dtype=dtype)
    inputs = normalise(torch.from_numpy(images), config)
    for autocast in (False, True):  # whatever the caller has switched on
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.inference_mode(autocast):
            assert (module(inputs).numpy() == expected).all()
    assert module.embedding_dim == expected.shape[1]
    assert set(module.state_dict()) == {f"model.{name}" for name in vit.model.state_dict()}
    assert list(lazyslide.LazySlidePatchEncoder(vit, dtype=dtype).encode_image(inputs).shape) == [2, 768]


def test_changed_weights_are_seen(vit):
    module = PatchEncoderModule(vit, dtype="bfloat16")
    x, bias = torch.zeros(1, 3, 28, 28), vit.model.patch_encoder.backbone.norm.bias
    before = module(x)
    with torch.no_grad():
        bias += 1
        assert (module(x) != before).all()
        bias -= 1


# ---- TRIDENT


def as_trident_calls(encoder, features, coords, attributes, **more):
    """What TRIDENT's `extract_slide_features` does with an encoder."""
    encoder.to("cpu")
    encoder.eval()
    batch = {
        "features": torch.from_numpy(features).float()[None],
        "coords": torch.from_numpy(coords)[None],
        "attributes": attributes,
        **more,
    }
    with torch.inference_mode(), torch.autocast("cpu", enabled=encoder.precision != torch.float32):
        return encoder(batch, "cpu").float().cpu().numpy().squeeze()


def test_trident_slide_encoder(encoded, slide_encoder):
    _, features, stored = encoded
    encoder = trident.TridentSlideEncoder(slide_encoder)
    assert (encoder.enc_name, encoder.precision, encoder.embedding_dim) == ("exaonepath", torch.float32, WIDTH + EMBED)
    known = torch.from_numpy(features.contour_index)[None]
    found = as_trident_calls(encoder, features.features, features.coords, {}, contour_index=known)
    assert (found == stored.slide_embedding).all()
    # Without contours: pieces of the grid, which here are the contours of `fragments=3` tissue pieces or fewer.
    grid = fragments_of_grid(features.coords, 256)
    expected = as_trident_calls(
        encoder, features.features, features.coords, {}, contour_index=torch.from_numpy(grid)[None]
    )
    found = as_trident_calls(encoder, features.features, features.coords, {"patch_size_level0": 256})
    assert (found == expected).all()
    # One fragment is what `exaonepath slide` computes of a features file without contours.
    one = trident.TridentSlideEncoder(slide_encoder, fragments="one")
    zeros = torch.zeros(1, len(features.coords), dtype=torch.int64)
    expected = as_trident_calls(one, features.features, features.coords, {}, contour_index=zeros)
    assert (as_trident_calls(one, features.features, features.coords, {}) == expected).all()


def test_batches_that_cannot_be_encoded(encoded, slide_encoder):
    _, features, _ = encoded
    encoder = trident.TridentSlideEncoder(slide_encoder)
    values, coords = torch.from_numpy(features.features)[None], torch.from_numpy(features.coords)[None]
    for batch, what in [
        ({"features": values}, "no coords"),
        ({"features": values[0], "coords": coords}, r"features must be \[B, N, C\]"),
        ({"features": values, "coords": coords[:, :3]}, r"coords \[N, 2\]"),
        ({"features": values, "coords": coords, "contour_index": coords[:, :2, 0]}, "contour_index must be"),
        ({"features": values, "coords": coords.long() + 2**40}, "32 bits"),
    ]:
        with pytest.raises(SettingsError, match=what):
            encoder(batch)
    with pytest.raises(DataFileError, match="wide"):
        encoder({"features": values[..., :5], "coords": coords})
    assert encoder({"features": values[:0], "coords": coords[:0]}).shape == (0, WIDTH + EMBED)
    empty = encoder({"features": values[:, :0], "coords": coords[:, :0]})
    assert empty.shape == (1, WIDTH + EMBED)
    assert not empty.any()
    one = encoder({"features": values[:, :1], "coords": coords[:, :1]})
    assert torch.isfinite(one).all()
    with pytest.raises(SettingsError, match="grid or one"):
        SlideEncoderModule(slide_encoder, fragments="contours")


def test_trident_registration(monkeypatch):
    for name in ("trident", "trident.patch_encoder_models.load"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"github\.com/mahmoodlab/TRIDENT"):
        trident.register("random:0")
    # The layout of TRIDENT's factories; the package of this name on the index is another one, and has none.
    patches, slides = types.ModuleType("p"), types.ModuleType("s")
    names = {
        "trident": types.ModuleType("trident"),
        "trident.patch_encoder_models": types.ModuleType("a"),
        "trident.slide_encoder_models": types.ModuleType("b"),
        "trident.patch_encoder_models.load": patches,
        "trident.slide_encoder_models.load": slides,
    }
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(MissingDependencyError, match="another program"):
        trident.register("random:0")
    patches.encoder_registry, slides.encoder_registry, slides.slide_to_patch_encoder_name = {}, {}, {}
    trident.register("random:0", fragments="one")
    encoder = slides.encoder_registry["exaonepath"](pretrained=True, freeze=True)
    assert encoder.embedding_dim == 1536
    assert slides.slide_to_patch_encoder_name["exaonepath"] in patches.encoder_registry
    assert patches.encoder_registry["exaonepath"](weights_path=None).eval_transforms
    for registry, argument in ((patches.encoder_registry, "target_img_size"), (slides.encoder_registry, "model_name")):
        with pytest.raises(SettingsError, match=argument):
            registry["exaonepath"](**{argument: 448})


# ---- LazySlide, timm


def test_lazyslide_slide_encoder(encoded, slide_encoder):
    _, features, stored = encoded
    encoder = lazyslide.LazySlideSlideEncoder(slide_encoder)
    given = torch.from_numpy(features.features)[None], torch.from_numpy(features.coords)[None]
    found = encoder.to("cpu").encode_slide(*given, contour_index=features.contour_index)["embeddings"]
    assert (found.numpy()[0] == stored.slide_embedding).all()
    assert (encoder.encode_slide(features.features, features.coords)["embeddings"].shape) == (1, WIDTH + EMBED)
    with pytest.raises(SettingsError, match="coordinates"):
        encoder.encode_slide(given[0])
    with pytest.raises(SettingsError, match="one slide"):
        encoder.encode_slide(given[0].repeat(2, 1, 1), given[1])


def test_timm_model(vit):
    model = timm.TimmPatchEncoder(vit)
    x = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), vit.model(x))
    assert model.num_features == 768
    assert model.pretrained_cfg["crop_pct"] == 224 / 256
    model.reset_classifier(5)
    logits = model(x)
    assert logits.shape == (1, 5)
    logits.sum().backward()  # it can be trained
    assert model.model.patch_encoder.backbone.cls_token.grad is not None
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 768)
    model.reset_classifier(0)
    assert model(x).shape == (1, 768)


def test_missing_libraries_are_named(monkeypatch):
    for module, name in ((lazyslide, "lazyslide_models"), (timm, "timm.models")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingDependencyError, match="pip install"):
            module.register("random:0")


def test_adapters_import_no_foreign_library(warm_torch):
    code = (
        "import sys; import exaonepath.adapters.trident, exaonepath.adapters.lazyslide, exaonepath.adapters.timm, "
        "exaonepath.adapters.huggingface; "
        "assert not {'trident', 'lazyslide', 'lazyslide_models', 'timm', 'torchvision'} & set(sys.modules)"
    )
    done = warm_torch.run(code, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


# ---- the pipeline


@pytest.fixture
def pipe(monkeypatch, patch_encoder, slide_encoder):
    monkeypatch.setattr(huggingface, "load_patch_encoder", lambda weights, device: patch_encoder)
    monkeypatch.setattr(huggingface, "load_slide_encoder", lambda weights, device: slide_encoder)
    return lambda *arguments, **options: exaonepath.pipeline(*arguments, num_workers=0, batch_size=7, **options)


def test_the_pipeline_gives_the_embeddings_of_encode_slide(pipe, encoded, tmp_path):
    slide, features, stored = encoded
    call = pipe("slide-embedding", "random:0", return_patches=True)
    assert call.task == "slide-embedding"
    one = call(slide)
    assert (one["slide_embedding"] == stored.slide_embedding).all()
    assert (one["patch_embedding"] == stored.patch_embedding).all()
    assert (one["coords"] == features.coords).all()
    assert (one["name"], one["n_patches"], one["n_failed"]) == ("one", len(features.coords), 0)
    assert "path" not in one
    empty = make_slide(tmp_path / "leer ü.svs", 700, 500, fragments=0)
    both = pipe(out=tmp_path / "out")([str(slide), empty])
    assert [result["name"] for result in both] == ["one", "leer ü"]
    assert (both[0]["slide_embedding"] == stored.slide_embedding).all()
    assert not both[1]["slide_embedding"].any()
    assert both[1]["no_patch"]
    assert both[0]["path"].exists()
    assert "patch_embedding" not in both[0]
    assert pipe()([]) == []


def test_the_pipeline_computes_an_iterable_bit_by_bit(pipe, encoded, tmp_path):
    slide, _, stored = encoded
    asked = []

    def slides():
        for path in (slide, tmp_path / "none.svs"):
            asked.append(path)
            yield path

    results = pipe()(slides())
    assert asked == []
    assert (next(results)["slide_embedding"] == stored.slide_embedding).all()
    assert len(asked) == 1
    with pytest.raises(exaonepath.ExaonePathError):
        next(results)


def test_tasks_and_inputs_that_do_not_exist(pipe):
    with pytest.raises(SettingsError, match="slide-embedding, image-feature-extraction"):
        exaonepath.pipeline("translation")
    with pytest.raises(SettingsError, match="not int"):
        pipe()(3)


def test_nothing_remains_of_a_pipeline_without_a_folder(pipe, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface.tempfile, "tempdir", str(tmp_path))
    slide, _, _ = encoded
    pipe()(slide)
    with pytest.raises(exaonepath.ExaonePathError):
        pipe()(slide, patching={"unknown": 1})
    assert list(tmp_path.iterdir()) == []


def test_images_through_the_pipeline_of_transformers(vit, monkeypatch):
    monkeypatch.setattr(huggingface, "load_patch_encoder", lambda weights: vit)
    pixels = np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8)
    found = exaonepath.pipeline("image-feature-extraction", "random:0")(Image.fromarray(pixels))
    expected = PatchEncoderModule(vit)(PatchTransform()(pixels)[None])[0].numpy()
    # The processor multiplies by 1/255, here it is divided by 255: a rounding of the input, or none.
    assert np.abs(np.asarray(found, np.float32) - expected).max() < 1e-5 * np.abs(expected).max()
    assert huggingface.image_processor(PreprocessingConfig(resize=224)).size["shortest_edge"] == 224
