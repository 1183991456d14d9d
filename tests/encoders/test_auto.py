"""What users of the published model type: AutoModel, AutoConfig, subfolder=, component=, strict safetensors."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import exaonepath
from exaonepath.encoders.loading import load_patch_encoder, load_slide_encoder, weights_fingerprint
from exaonepath.errors import ConfigError, SettingsError, WeightsError


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository as published: root config, both encoders, and an auto_map that must lose to our classes."""
    folder = tmp_path_factory.mktemp("repository")
    slide = exaonepath.ExaonePathSlideEncoderConfig(
        wsi_cfg={"depth": 2, "embed_dim": 32, "num_heads": 2, "ffn_layer": "swiglu"}
    )
    model = exaonepath.ExaonePathModel(exaonepath.ExaonePathConfig(slide_encoder_config=slide.to_diff_dict()))
    model.save_pretrained(folder)
    for path, name in (
        (folder, ""),
        (folder / "patch-encoder", "PatchEncoder"),
        (folder / "slide-encoder", "SlideEncoder"),
    ):
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": f"remote.ExaonePath{name}Config",
            "AutoModel": f"remote.ExaonePath{name}Model",
        }
        (path / "config.json").write_text(json.dumps(config))
        (path / "remote.py").write_text("raise SystemExit('remote code must not run')\n")
    return folder


@pytest.fixture
def broken(repository, tmp_path):
    """Write a copy of the slide encoder with changed weights; returns its folder."""

    def make(change):
        source = repository / "slide-encoder"
        state = load_file(source / "model.safetensors")
        change(state)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        return tmp_path

    return make


@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize(
    ("kwargs", "cls"),
    [
        ({"component": "patch"}, exaonepath.ExaonePathPatchEncoderModel),
        ({"component": "slide"}, exaonepath.ExaonePathSlideEncoderModel),
        ({"encoder_type": "wsi"}, exaonepath.ExaonePathSlideEncoderModel),
        ({"component": "slide_encoder"}, exaonepath.ExaonePathSlideEncoderModel),
        ({"component": "slide", "component_subfolder": "slide-encoder"}, exaonepath.ExaonePathSlideEncoderModel),
        ({"subfolder": "patch-encoder"}, exaonepath.ExaonePathPatchEncoderModel),
        ({"subfolder": "slide-encoder"}, exaonepath.ExaonePathSlideEncoderModel),
        ({"subfolder": "slide-encoder", "component": "wsi"}, exaonepath.ExaonePathSlideEncoderModel),
        ({}, exaonepath.ExaonePathModel),
    ],
)
def test_both_forms_build_our_classes(repository, kwargs, cls, trust):
    model = AutoModel.from_pretrained(str(repository), trust_remote_code=trust, **kwargs)
    assert type(model) is cls
    assert not model.training


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("kwargs", [{"component": "slide"}, {"subfolder": "slide-encoder"}])
def test_dtype_and_attention_reach_the_encoder(repository, name, kwargs):
    options = {name: torch.bfloat16, "attn_implementation": "eager"}
    model = AutoModel.from_pretrained(str(repository), **kwargs, **options)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.transformer.rope_embed.periods.dtype == torch.float32


def test_round_trip_keeps_every_bit(repository, tmp_path):
    model = AutoModel.from_pretrained(str(repository), component="slide")
    with torch.no_grad():
        model.transformer.rope_embed.periods.mul_(1.25)  # the buffer decides, also against the config
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path))
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert torch.equal(again.transformer.rope_embed(), model.transformer.rope_embed())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ExaonePathSlideEncoderModel"]


def test_composite_runs_and_saves(repository, tmp_path):
    model = AutoModel.from_pretrained(str(repository))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(images, torch.tensor([[0, 0], [256, 0]]), torch.tensor([0, 0]))
        features = model.patch_encoder(images)
    assert output.slide_embedding.shape == (1, 768 + 32)
    assert torch.equal(output.patch_embedding[0, :, :768], features)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path))
    assert weights_fingerprint(again) == weights_fingerprint(model)


def test_auto_config(repository):
    assert type(AutoConfig.from_pretrained(str(repository))) is exaonepath.ExaonePathConfig
    config = AutoConfig.from_pretrained(str(repository / "slide-encoder"))
    assert type(config) is exaonepath.ExaonePathSlideEncoderConfig
    assert type(AutoModel.from_config(config)) is exaonepath.ExaonePathSlideEncoderModel


def test_periods_may_be_missing(broken):
    folder = broken(lambda s: s.pop("slide_encoder.wsi_encoder.transformer.rope_embed.periods"))
    model = AutoModel.from_pretrained(str(folder))
    fresh = exaonepath.ExaonePathSlideEncoderModel(model.config)
    assert torch.equal(model.transformer.rope_embed(), fresh.transformer.rope_embed())


def test_weights_that_do_not_fit_are_refused_with_every_key_named(broken):
    block = "slide_encoder.wsi_encoder.transformer.blocks.1."

    def change(state):
        state["surplus.weight"] = torch.zeros(1)
        del state[block + "norm1.bias"]
        state[block + "mlp.w1.weight"] = torch.zeros(3, 3)

    folder = broken(change)
    with pytest.raises(WeightsError) as raised:
        AutoModel.from_pretrained(str(folder))
    for expected in (block + "norm1.bias", "surplus.weight", block + "mlp.w1.weight", str(folder)):
        assert expected in str(raised.value)
    with pytest.raises(WeightsError, match="surplus"):
        load_slide_encoder(str(folder))


def test_no_pickle_is_read(repository, tmp_path):
    model = AutoModel.from_pretrained(str(repository), component="slide")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="safetensors"):
        AutoModel.from_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match="safetensors only"):
        AutoModel.from_pretrained(str(tmp_path), use_safetensors=False)


def test_truncated_safetensors(repository, tmp_path):
    source = repository / "slide-encoder"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="no usable safetensors"):
        load_slide_encoder(str(tmp_path))


def test_unknown_config_key_is_named(repository, tmp_path):
    config = json.loads((repository / "slide-encoder" / "config.json").read_text())
    config["wsi_cfg"]["deepth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'deepth'"):
        AutoConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"component": "rna"},
        {"component": "patch", "encoder_type": "slide"},
        {"component": "patch", "subfolder": "slide-encoder"},
        {"component_subfolder": "patch-encoder"},
        {"component": "slide", "attn_implementation": "flash_attention_2"},
    ],
)
def test_arguments_that_cannot_be_used(repository, kwargs):
    with pytest.raises(SettingsError):
        AutoModel.from_pretrained(str(repository), **kwargs)


def test_load_by_weights_argument(repository, tmp_path):
    assert load_patch_encoder(str(repository)).model.config.patch_size == 14
    by_root, by_folder = load_slide_encoder(str(repository)), load_slide_encoder(str(repository / "slide-encoder"))
    assert by_root.fingerprint == by_folder.fingerprint
    assert not by_root.is_random
    with pytest.raises(WeightsError, match="not a patch encoder"):
        load_patch_encoder(str(repository / "slide-encoder"))
    for missing in (tmp_path / "nowhere", "nobody/nothing-of-this-name"):
        with pytest.raises(WeightsError, match="neither a directory nor a Hub repository"):
            load_slide_encoder(str(missing))


def test_random_weights_are_the_same_in_every_process(warm_package, tmp_path):
    ours = load_slide_encoder("random:7")
    assert ours.is_random
    assert ours.fingerprint != load_slide_encoder("random:8").fingerprint
    code = (
        "from exaonepath.encoders.loading import load_slide_encoder; print(load_slide_encoder('random:7').fingerprint)"
    )
    other = warm_package.run(code, cwd=tmp_path)
    assert other.stdout.strip() == ours.fingerprint
    with pytest.raises(SettingsError, match="random:SEED"):
        load_slide_encoder("random:")
    with pytest.raises(SettingsError, match="random:SEED"):
        load_slide_encoder("random:\u00b2")


def test_importing_is_enough_and_constructors_need_no_network(warm_torch, tmp_path):
    """A process without transformers and the package, sockets forbidden: import, build by AutoConfig, run."""
    code = """
import socket
def refuse(*a, **k): raise AssertionError("network touched")
socket.socket.connect = refuse
import exaonepath, torch
from transformers import AutoConfig, AutoModel
wsi = {"depth": 1, "embed_dim": 16, "num_heads": 2, "input_dim": 8, "ffn_layer": "swiglu"}
model = AutoModel.from_config(AutoConfig.for_model("exaonepath_slide_encoder", wsi_cfg=wsi))
print(model(torch.zeros(1, 3, 8)).slide_embedding.shape)
"""
    done = warm_torch.run(code, cwd=tmp_path)
    assert "[1, 24]" in done.stdout, done.stderr


def test_from_a_hub_id_out_of_the_cache_with_the_network_off(warm_torch, repository, tmp_path):
    """The Hub's cache layout by hand: what a machine that downloaded the repository once, and is now offline, has."""
    repo = tmp_path / "hub" / "models--LGAI-EXAONE--EXAONE-Path-2.5"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    snapshot = repo / "snapshots" / revision
    snapshot.parent.mkdir()
    snapshot.symlink_to(repository, target_is_directory=True)
    code = """
import exaonepath
from transformers import AutoModel
from exaonepath.encoders.loading import load_slide_encoder, weights_fingerprint
from exaonepath.encoders.published import DEFAULT_WEIGHTS
loaded = load_slide_encoder(DEFAULT_WEIGHTS)
for how in ({"component": "slide"}, {"subfolder": "slide-encoder"}):
    for trust in (True, False):
        model = AutoModel.from_pretrained(DEFAULT_WEIGHTS, trust_remote_code=trust, **how)
        assert type(model) is exaonepath.ExaonePathSlideEncoderModel
        assert weights_fingerprint(model) == loaded.fingerprint
print("loaded")
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = warm_torch.run(code, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == "loaded", done.stderr
