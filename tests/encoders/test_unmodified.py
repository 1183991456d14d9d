"""A parameter is read where its owner computes: hooks, replaced calls, offloaded and quantised weights act, once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from exaonepath import (
    ExaonePathPatchEncoderConfig,
    ExaonePathPatchEncoderModel,
    ExaonePathSlideEncoderConfig,
    ExaonePathSlideEncoderModel,
)
from exaonepath.encoders.block import Linear
from exaonepath.encoders.unmodified import is_unmodified
from exaonepath.errors import SettingsError
from exaonepath.ops.linear import onednn_available

# Every submodule of the slide encoder that computes; the rest are containers.
PARTS = [
    "slide_encoder",
    "slide_encoder.wsi_encoder",
    "slide_encoder.wsi_encoder.transformer",
    *(
        f"slide_encoder.wsi_encoder.transformer.{name}"
        for name in (
            "patch_embed", "patch_embed.proj", "patch_embed.norm", "rope_embed", "norm",
            *(f"blocks.1{part}" for part in (
                "", ".norm1", ".norm2", ".attn", ".attn.qkv", ".attn.proj", ".attn.proj_drop", ".mlp", ".mlp.w1",
                ".mlp.w2", ".mlp.w3", ".mlp.drop",
            )),
        )
    ),
]  # fmt: skip


@pytest.fixture
def model(make_slide_encoder):
    return make_slide_encoder()


@pytest.fixture
def run(make_slide):
    """`run(model)`: the slide embedding of one batch, without gradients, as `forward` and as `encode_streamed`."""
    inputs = make_slide()

    def run(model, streamed=False):
        with torch.no_grad():
            return (model.encode_streamed if streamed else model)(*inputs).slide_embedding

    run.inputs = inputs
    return run


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-11 * b.abs().max())


def test_a_new_model_is_unmodified(model):
    assert is_unmodified(model.slide_encoder)
    assert is_unmodified(ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig()).slide_encoder)


@pytest.mark.parametrize("grad", [True, False])
def test_the_plain_path_is_the_lean_path(model, run, grad):
    lean = run(model)
    handle = model.transformer.blocks[0].register_forward_hook(lambda *_: None)
    assert not is_unmodified(model.slide_encoder)
    with torch.set_grad_enabled(grad):
        plain = model(*run.inputs).slide_embedding.detach()
    handle.remove()
    assert is_unmodified(model.slide_encoder)
    assert close(plain, lean)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_a_forward_replaced_on_an_instance_acts(model, run, name, streamed):
    plain, part = run(model), model.get_submodule(name)
    old = part.forward
    part.forward = lambda *args, **kwargs: 0.5 * old(*args, **kwargs)
    changed = run(model, streamed)
    if not name.endswith(("proj_drop", "mlp.drop")):
        with torch.enable_grad():
            assert close(changed, model(*run.inputs).slide_embedding.detach())
    assert not torch.allclose(changed, plain, rtol=0, atol=1e-6)
    del part.forward
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("grad", [False, True])
def test_hooks_of_every_kind_are_called_once(model, run, grad):
    calls = {}

    def count(kind, name):
        def hook(*_):
            calls[kind, name] = calls.get((kind, name), 0) + 1

        return hook

    handles = []
    for name in PARTS:
        part = model.get_submodule(name)
        handles += [
            part.register_forward_hook(count("forward", name)),
            part.register_forward_pre_hook(count("pre", name)),
        ]
        if grad and not name.endswith("rope_embed"):  # which has no gradient
            handles += [
                part.register_full_backward_hook(count("backward", name)),
                part.register_full_backward_pre_hook(count("backward pre", name)),
            ]
    with torch.set_grad_enabled(grad):
        features = run.inputs[0].clone().requires_grad_(grad)
        out = model(features, *run.inputs[1:]).slide_embedding
        if grad:
            out.sum().backward()
    kinds = ["forward", "pre", *(["backward", "backward pre"] if grad else [])]
    wanted = {(kind, name) for kind in kinds for name in PARTS if not (name.endswith("rope_embed") and "back" in kind)}
    assert calls == dict.fromkeys(wanted, 1)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_all_modules_of_the_process_are_called(model, run, register):
    seen = []
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert {model.get_submodule(name) for name in PARTS} <= set(seen)


def test_replaced_modules_act_and_may_lack_a_weight(model, run):
    plain = run(model)

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return 2 * self.inner(*args)

    for owner, name in ((model.transformer.blocks[1].mlp, "w3"), (model.transformer.blocks[0], "norm2")):
        inner = getattr(owner, name)
        setattr(owner, name, Doubled(inner))
        assert not torch.allclose(run(model, True), plain, rtol=0, atol=1e-6)
        setattr(owner, name, inner)
    assert torch.equal(run(model), plain)


def test_parametrised_weights_act(model, run):
    plain = run(model)

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    qkv = model.transformer.blocks[1].attn.qkv
    nn.utils.parametrize.register_parametrization(qkv, "weight", Half())
    assert not torch.allclose(run(model), plain, rtol=0, atol=1e-6)
    nn.utils.parametrize.remove_parametrizations(qkv, "weight", leave_parametrized=False)
    assert close(run(model), plain)


def test_what_cannot_be_planned_is_said(model, run):
    model.transformer.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(SettingsError, match="max_memory cannot be planned"):
        model.encode_streamed(*run.inputs, max_memory="1GB")


def test_function_transforms(model, run):
    """functional_call, jvp, vmap and grad of torch.func, against finite differences and plain calls."""
    features, mask, coords, contour = run.inputs
    model.config._attn_implementation = "eager"  # torch's flash kernel for CPUs has no forward-mode derivative

    def call(features):
        return model(features, mask, coords, contour).slide_embedding

    weights = {name: 0.9 * p.detach() for name, p in model.named_parameters()}
    changed = copy.deepcopy(model)
    changed.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert close(torch.func.functional_call(model, weights, run.inputs).slide_embedding, run(changed))

    direction = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-6
    with torch.no_grad():
        wanted = (call(features + step * direction) - call(features - step * direction)) / (2 * step)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(call(forward_ad.make_dual(features, direction))).tangent
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max())

    gradient = torch.func.grad(lambda x: call(x).sum())(features)
    leaf = features.clone().requires_grad_()
    call(leaf).sum().backward()
    assert close(gradient, leaf.grad)


def test_the_patch_encoder_through_transforms_and_hooks():
    torch.manual_seed(0)
    model = ExaonePathPatchEncoderModel(ExaonePathPatchEncoderConfig(img_size=28)).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        plain = model(images)
        model.config._attn_implementation = "eager"  # see above
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(images, torch.ones_like(images))
            tangent = forward_ad.unpack_dual(model(dual)).tangent
        wanted = (model(images + 1e-2) - model(images - 1e-2)) / 2e-2
        together = torch.func.vmap(lambda image: model(image[None])[0])(images)
    assert (tangent - wanted).norm() < 0.02 * wanted.norm()
    assert torch.allclose(together, plain, rtol=0, atol=1e-5)
    model.config._attn_implementation = "auto"
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        # Without hooks the last block computes its products for one token only, so the last bits may differ.
        assert torch.allclose(model(images), plain, rtol=0, atol=1e-5)
    uncalled = (nn.ModuleList,)
    names = {id(m) for m in calls}
    missed = [n for n, m in model.named_modules() if id(m) not in names and not isinstance(m, uncalled)]
    assert missed == ["patch_encoder"]
    assert len(calls) == len(names)


@pytest.fixture
def saved(tmp_path, model):
    """A small float32 slide encoder on disk."""
    model.float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("where", ["disk", "cpu"])
@pytest.mark.parametrize(
    "part",
    ["", "slide_encoder.wsi_encoder.transformer", "slide_encoder.wsi_encoder.transformer.blocks.1",
     "slide_encoder.wsi_encoder.transformer.patch_embed", "slide_encoder.wsi_encoder.transformer.blocks.1.attn.qkv",
     "slide_encoder.wsi_encoder.transformer.norm"],
)  # fmt: skip
def test_offloaded_weights_are_fetched(saved, tmp_path, run, where, part):
    """Weights that accelerate keeps on disk or on the host stand on "meta" until their module is called."""
    accelerate = pytest.importorskip("accelerate")
    model = ExaonePathSlideEncoderModel.from_pretrained(saved)
    inputs = (run.inputs[0].float(), *run.inputs[1:])
    with torch.no_grad():
        plain = model(*inputs).slide_embedding
    offload = {name: where if name == part or not part else "cpu" for name in modules_to_place(model, part)}
    if where == "disk":
        model = (
            accelerate.disk_offload(model, tmp_path / "offload")
            if not part
            else accelerate.dispatch_model(
                model, {**offload}, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True
            )
        )
    else:
        model = accelerate.cpu_offload(model)
    assert any(p.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(model(*inputs).slide_embedding, plain, rtol=0, atol=1e-5 * plain.abs().max())
        streamed = model.encode_streamed(*inputs).slide_embedding
    assert torch.allclose(streamed, plain, rtol=0, atol=1e-5 * plain.abs().max())


def modules_to_place(model, part):
    """A device map that places `part` by itself, and the rest of the model around it."""
    if not part:
        return [""]
    names, around = [part], part.split(".")
    for depth in range(len(around)):
        parent = ".".join(around[:depth])
        for name, _ in model.get_submodule(parent).named_children():
            full = f"{parent}.{name}" if parent else name
            if not part.startswith(full):
                names.append(full)
        module = model.get_submodule(parent)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        names += [f"{parent}.{name}" if parent else name for name, _ in own]
    return names


def test_from_pretrained_with_a_block_on_disk(saved, tmp_path, run):
    """The case of the report: an embedding made of uninitialised memory."""
    pytest.importorskip("accelerate")
    plain = ExaonePathSlideEncoderModel.from_pretrained(saved)
    transformer = "slide_encoder.wsi_encoder.transformer"
    names = modules_to_place(plain, f"{transformer}.blocks.1")
    device_map = {name: "disk" if name.endswith("blocks.1") else "cpu" for name in names}
    model = ExaonePathSlideEncoderModel.from_pretrained(
        saved, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(p.device.type == "meta" for p in model.transformer.blocks[1].parameters())
    inputs = (run.inputs[0].float(), *run.inputs[1:])
    with torch.no_grad():
        wanted = plain(*inputs).slide_embedding
        for found in (model(*inputs), model.encode_streamed(*inputs)):
            assert torch.allclose(found.slide_embedding, wanted, rtol=0, atol=1e-5 * wanted.abs().max())


class Scaled(torch.Tensor):
    """A weight that stands for twice its stored values, as quantised tensors stand for others than theirs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            with torch._C.DisableTorchFunctionSubclass():
                return nn.functional.linear(x, 2 * weight, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_compute_in_their_own_way(model, run):
    plain = run(model)
    layer = model.transformer.blocks[1].attn.qkv
    kept = layer.weight
    layer.weight = nn.Parameter(kept.detach().clone().as_subclass(Scaled), requires_grad=False)
    scaled = run(model)
    layer.weight = nn.Parameter(2 * kept.detach())
    assert not torch.allclose(scaled, plain, rtol=0, atol=1e-6)
    assert close(scaled, run(model))


def test_torchao_int8_weights(run):
    quantization = pytest.importorskip("torchao.quantization")
    config = ExaonePathSlideEncoderConfig(wsi_cfg={"input_dim": 24, "embed_dim": 64, "depth": 2, "num_heads": 2})
    torch.manual_seed(0)
    model = ExaonePathSlideEncoderModel(config).eval()
    inputs = (run.inputs[0].float(), *run.inputs[1:])
    with torch.no_grad():
        plain = model(*inputs).slide_embedding
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        found = model(*inputs).slide_embedding
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()


def test_peft_adapters(run):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg={"input_dim": 24, "embed_dim": 32,
        "depth": 2, "num_heads": 2})).eval()  # fmt: skip
    inputs = (run.inputs[0].float(), *run.inputs[1:])
    with torch.no_grad():
        plain = model(*inputs).slide_embedding
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "w3"], init_lora_weights=False)).eval()
    with torch.no_grad():
        adapted = tuned(*inputs).slide_embedding
    with torch.enable_grad():
        assert torch.allclose(tuned(*inputs).slide_embedding, adapted, rtol=0, atol=1e-5 * adapted.abs().max())
    assert not torch.allclose(adapted, plain, rtol=0, atol=1e-4)
    with torch.no_grad():
        merged = tuned.merge_and_unload()(*inputs).slide_embedding
    assert torch.allclose(merged, adapted, rtol=0, atol=1e-4 * adapted.abs().max())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_linear_layer_is_traced():
    layer, x = Linear(8, 5), torch.randn(3, 8)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,))
        assert torch.allclose(traced(x[:2]), layer(x[:2]), rtol=0, atol=1e-6)


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN linear")
def test_the_onednn_operator_sees_only_plain_tensors(monkeypatch):
    from exaonepath.ops import linear as module

    seen, linear = [], module.linear
    operator = module._onednn_linear
    monkeypatch.setattr(module, "_onednn_linear", lambda *args: seen.append(args) or operator(*args))
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    with torch.no_grad():
        linear(x, weight, bias)
        assert len(seen) == 1
        linear(x, weight.as_subclass(Scaled), bias)
        linear(x.as_subclass(Scaled), weight, bias)
        linear(x.to("meta"), weight.to("meta"), bias.to("meta"))
        torch.func.vmap(lambda row: linear(row[None], weight, bias))(x)
        with forward_ad.dual_level():
            linear(forward_ad.make_dual(x, x), weight, bias)
        torch.jit.trace(lambda x: linear(x, weight, bias), (x,), check_trace=False)
        bias.requires_grad_()
        with torch.enable_grad():
            assert linear(x, weight, bias).requires_grad
    assert len(seen) == 1
