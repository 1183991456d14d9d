"""Preprocessing: the golden files, the obvious implementation, and the settings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from exaonepath.errors import SettingsError
from exaonepath.slides.features.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PreprocessingConfig,
    normalise,
    read_window,
    resize_and_crop,
)


def obvious(image: np.ndarray, resize: int, crop: int = 224) -> np.ndarray:
    """Resize(resize) then CenterCrop(crop) as torchvision does them on a PIL image."""
    picture = Image.fromarray(np.ascontiguousarray(image[..., :3]))
    width, height = picture.size
    size = (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - crop) / 2.0), round((size[1] - crop) / 2.0)
    return np.asarray(picture.crop((left, top, left + crop, top + crop)))


@pytest.mark.golden
@pytest.mark.parametrize("resize", [256, 224])
def test_golden_is_met_exactly(golden, resize):
    data = golden("preprocessing")
    images = [key for key in data if key.startswith("image_")]
    assert images
    for key in images:
        expected = data[f"resize{resize}_uint8_{key.removeprefix('image_')}"]
        assert np.array_equal(resize_and_crop(data[key], PreprocessingConfig(resize=resize)), expected), key


@pytest.mark.parametrize("resize", [224, 240, 255, 256, 300, 512])
@pytest.mark.parametrize("side", [1, 7, 100, 223, 224, 255, 256, 257, 333, 448, 505, 506, 512, 1013, 1024, 2000])
def test_reading_only_the_window_changes_no_byte(side, resize):
    image = np.random.default_rng(side * 1000 + resize).integers(0, 256, (side, side, 4), dtype=np.uint8)
    config = PreprocessingConfig(resize=resize)
    window = read_window(side, config)
    end = window.offset + window.size
    assert 0 <= window.offset < end <= side
    expected = obvious(image, resize)
    part = image[window.offset : end, window.offset : end, :3]
    assert np.array_equal(window.finish(part), expected)
    assert np.array_equal(resize_and_crop(image, config), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([224, 250, 256]), st.integers(0, 2**31))
def test_any_shape_equals_the_obvious_way(height, width, resize, seed):
    if max(height, width) > 20 * min(height, width):
        height = width  # a sliver would be blown up to a huge picture
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(resize_and_crop(image, PreprocessingConfig(resize=resize)), obvious(image, resize))


def test_window_of_a_256_px_patch_is_the_crop_alone():
    window = read_window(256, PreprocessingConfig())
    assert (window.offset, window.size) == (16, 224)


def test_transparent_pixels_keep_their_colour():
    image = np.full((300, 300, 4), (10, 20, 30, 0), np.uint8)
    assert (resize_and_crop(image, PreprocessingConfig()) == (10, 20, 30)).all()


def test_normalise_is_to_tensor_then_normalize():
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    got = normalise(torch.from_numpy(images), PreprocessingConfig())
    assert got.shape == (3, 3, 224, 224)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    for one, image in zip(got, images, strict=True):
        assert torch.equal(one, (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std)


def test_config_survives_json():
    config = PreprocessingConfig(resize=224, mean=(0.5, 0.5, 0.5))
    assert PreprocessingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PreprocessingConfig.from_dict({}) == PreprocessingConfig()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"resize": 0}, "resize"),
        ({"resize": -256}, "resize"),
        ({"resize": 256.5}, "resize"),
        ({"crop": 0}, "crop"),
        ({"resize": 200}, "black frame"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_impossible_settings_are_named(values, says):
    with pytest.raises(SettingsError, match=says):
        PreprocessingConfig(**values)


def test_unknown_setting_is_named():
    with pytest.raises(SettingsError, match="resise"):
        PreprocessingConfig.from_dict({"resise": 256})


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 1), (0, 10, 3)])
def test_not_an_image(shape):
    with pytest.raises(SettingsError, match="uint8"):
        resize_and_crop(np.zeros(shape, np.uint8), PreprocessingConfig())
