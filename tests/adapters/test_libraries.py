"""The adapters inside the real libraries, where these are installed: `pip install timm lazyslide`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from exaonepath import SlideImage
from exaonepath.adapters import lazyslide as lazyslide_adapter
from exaonepath.adapters import timm as timm_adapter
from exaonepath.adapters.modules import PatchEncoderModule, PatchTransform, SlideEncoderModule
from exaonepath.encoders import loading
from exaonepath.errors import SettingsError
from exaonepath.slides.patches.fragments import fragments_of_grid
from exaonepath.synthetic import make_slide


def test_timm_builds_the_model_and_its_transform():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    timm_adapter.register("random:0")
    model = timm.create_model("exaonepath_patch_encoder", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    inputs = PatchTransform()(pixels)
    assert torch.equal(transform(Image.fromarray(pixels)), inputs)
    with torch.inference_mode():
        assert torch.equal(model(inputs[None]), loading.load_patch_encoder("random:0").model(inputs[None]))
    assert timm.create_model("exaonepath_patch_encoder", pretrained=True, num_classes=3)(inputs[None]).shape == (1, 3)
    with pytest.raises(SettingsError, match="img_size"):
        timm.create_model("exaonepath_patch_encoder", pretrained=True, img_size=448)


def test_lazyslide_extracts_and_aggregates(tmp_path):
    zs = pytest.importorskip("lazyslide", reason="lazyslide is not installed")
    from lazyslide_models import ImageModelProtocol
    from lazyslide_models.base import SlideEncoderModelProtocol

    path = make_slide(tmp_path / "one.svs", 1500, 1200, fragments=1, holes=False, seed=4)
    lazyslide_adapter.register("random:0", device="cpu")
    assert isinstance(lazyslide_adapter.LazySlidePatchEncoder("random:0"), ImageModelProtocol)
    assert isinstance(lazyslide_adapter.LazySlideSlideEncoder("random:0"), SlideEncoderModelProtocol)
    wsi = zs.open_wsi(path, store=str(tmp_path / "one.zarr"))
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, 256, mpp=0.5)
    zs.tl.feature_extraction(wsi, "exaonepath", device="cpu", batch_size=4, pbar=False, amp=True)
    features = np.asarray(wsi.tables["exaonepath_tiles"].X)
    coords = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy().astype(np.int32)
    with SlideImage(path) as slide:
        tiles = [slide.read_region(tuple(map(int, corner)), 0, (256, 256)) for corner in coords[:4]]
    inputs = torch.stack([PatchTransform()(tile) for tile in tiles])
    assert (features[:4] == PatchEncoderModule("random:0")(inputs).numpy()).all()
    zs.tl.feature_aggregation(wsi, "exaonepath", encoder="exaonepath-slide-encoder", device="cpu")
    found = wsi.tables["exaonepath_tiles"].uns["agg_ops"]["agg_slide"]["features"]
    expected = SlideEncoderModule("random:0").embed(features, coords, fragments_of_grid(coords, 256))
    assert (found[0] == expected.numpy()).all()
