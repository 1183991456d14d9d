"""Configurations: published fields, defaults, and errors that name the key."""

import pytest

from exaonepath import (
    ExaonePathConfig,
    ExaonePathPatchEncoderConfig,
    ExaonePathSlideEncoderConfig,
    ExaonePathSlideEncoderModel,
)
from exaonepath.errors import ConfigError, SettingsError


def test_published_slide_config_is_taken_with_its_keys_without_effect():
    published = {
        "input_dim": 768, "embed_dim": 768, "depth": 6, "num_heads": 12, "ffn_ratio": 4.0, "ffn_layer": "swiglu128",
        "qkv_bias": True, "ffn_bias": True, "n_storage_tokens": 7, "nope_interval": 2, "embed_use_norm": True,
        "attn_drop": 0.2, "ffn_drop": 0.2, "aggregate": "mean", "attn_type": "linear", "out_l2_norm": True,
    }  # fmt: skip
    config = ExaonePathSlideEncoderConfig(wsi_cfg=published)
    assert config.wsi_cfg == published
    assert config.wsi["norm_layer"] == "layernorm"
    assert config.wsi["patch_size"] == 256
    assert config.wsi["pos_embed_rope_base"] == 10_000
    assert "aggregate" not in config.wsi
    assert config.hidden_size == 1536


def test_periods_stated_as_a_range_need_no_word_about_the_base():
    """A TOML file cannot say null; a base that is stated contradicts a range all the same."""
    periods = {"pos_embed_rope_min_period": 2, "pos_embed_rope_max_period": 20}
    config = ExaonePathSlideEncoderConfig(wsi_cfg=periods)
    assert config.wsi["pos_embed_rope_base"] is None
    assert config.wsi_cfg == periods
    small = {"input_dim": 8, "embed_dim": 16, "num_heads": 1, "depth": 1}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg={**small, **periods}))
    assert model.transformer.rope_embed.periods[[0, -1]].tolist() == pytest.approx([2, 20])
    for wrong in ({**periods, "pos_embed_rope_base": 100}, {"pos_embed_rope_min_period": 2}):
        with pytest.raises(SettingsError, match="either pos_embed_rope_base or both"):
            ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg={**small, **wrong}))


@pytest.mark.parametrize(
    ("wsi_cfg", "message"),
    [
        ({"depht": 6}, "unknown key 'depht'.*did you mean 'depth'"),
        ({"foo": 6}, "unknown key 'foo'"),
        ({"depth": 6.5}, "depth"),
        ({"depth": -1}, "depth"),
        ({"nope_interval": 0}, "nope_interval"),
        ({"embed_dim": 100, "num_heads": 12}, "head dimension"),
        ({"embed_dim": 72, "num_heads": 12}, "head dimension"),
        ({"ffn_layer": "mlp"}, "ffn_layer"),
        ({"norm_layer": "batchnorm"}, "norm_layer"),
        ({"attn_drop": 1.0}, "attn_drop"),
        ({"ffn_ratio": 0}, "ffn_ratio"),
        ({"ffn_ratio": "4"}, "ffn_ratio"),
        ({"attn_drop": None}, "attn_drop"),
        ({"qkv_bias": "no"}, "qkv_bias"),
        ({"pos_embed_rope_base": "x"}, "pos_embed_rope_base"),
        (["depth"], "mapping"),
    ],
)
def test_impossible_slide_configs_are_refused_by_name(wsi_cfg, message):
    with pytest.raises(ConfigError, match=message):
        ExaonePathSlideEncoderConfig(wsi_cfg=wsi_cfg)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_encoder": "vitl"},
        {"patch_size": 0},
        {"patch_size": True},
        {"img_size": [224, 225]},
        {"img_size": [224]},
        {"extra_kwargs": {"foo": 1}},
    ],
)
def test_impossible_patch_configs_are_refused(fields):
    with pytest.raises(ConfigError):
        ExaonePathPatchEncoderConfig(**fields)


def test_a_misspelt_field_is_not_lost_among_those_of_transformers():
    with pytest.raises(ConfigError, match="did you mean 'wsi_cfg'"):
        ExaonePathSlideEncoderConfig(wsi_cgf={"depth": 1})
    with pytest.raises(ConfigError, match="did you mean 'patch_encoder_config'"):
        ExaonePathConfig(patch_encoder_confg={})


def test_patch_config_defaults():
    config = ExaonePathPatchEncoderConfig(img_size=448)
    assert config.img_size == [448, 448]
    assert (config.image_encoder, config.patch_size, config.extra_kwargs) == ("vitb", 14, {})


@pytest.mark.parametrize("cls", [ExaonePathConfig, ExaonePathPatchEncoderConfig, ExaonePathSlideEncoderConfig])
def test_configs_survive_a_round_trip(cls, tmp_path):
    config = cls()
    config.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()


def test_root_config_carries_both_encoders():
    config = ExaonePathConfig(slide_encoder_config={"model_type": "exaonepath_slide_encoder", "wsi_cfg": {"depth": 2}})
    assert config.slide_encoder().wsi["depth"] == 2
    assert config.patch_encoder().patch_size == 14
    assert (config.patch_encoder_subfolder, config.slide_encoder_subfolder) == ("patch-encoder", "slide-encoder")
