"""The slide encoder: goldens, the straight-line reference, padding, precision, training."""

import json

import numpy as np
import pytest
import torch

from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel
from exaonepath.encoders.slide_encoder import SlideEncoderOutput, ffn_hidden
from exaonepath.errors import SettingsError
from exaonepath.reference.slide_encoder import sdpa_dense_mask
from exaonepath.reference.slide_encoder import slide_encoder as reference

PREFIX = "slide_encoder.wsi_encoder.transformer."
GOLDENS = [
    "slide_encoder_full",
    "slide_encoder_tiny",
    "slide_encoder_tiny_contour_minus_one",
    "slide_encoder_tiny_no_contour",
    "slide_encoder_tiny_no_coords",
    "slide_encoder_tiny_periods",
    "slide_encoder_tiny_rmsnorm_interval3",
]


def reference_of(model):
    """(state, config) of a model, for the reference implementation."""
    state = {name.removeprefix(PREFIX): tensor.detach() for name, tensor in model.state_dict().items()}
    config = {**model.config.wsi, "norm_eps": 1e-5, "periods": model.transformer.rope_embed()}
    return state, config


def relative(ours, truth):
    ours, truth = (np.asarray(torch.as_tensor(t).cpu(), dtype=np.float64) for t in (ours, truth))
    return np.linalg.norm(ours - truth) / np.linalg.norm(truth)


def load_golden(golden, fill_weights, name):
    data = golden(name)
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=json.loads(str(data["config"])))).eval()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    weights = fill_weights(shapes, int(data["weight_seed"]))
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert all(key.endswith("rope_embed.periods") for key in missing)
    inputs = [torch.from_numpy(data["patch_features"]), torch.from_numpy(data["patch_mask"])]
    inputs += [torch.from_numpy(data[k]) if k in data else None for k in ("patch_coords", "patch_contour_index")]
    return data, model, inputs


def golden_errors(data, output, embed_dim):
    mask = data["patch_mask"][..., None]
    tail = output["patch_embedding"].detach().double().cpu().numpy()[..., -embed_dim:] * mask
    return (
        relative(tail, data["patch_embedding_tail"]),
        relative(output["slide_embedding"].detach().double(), data["slide_embedding"]),
    )


@pytest.mark.golden
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager", "triton"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_float32(golden, fill_weights, name, backend, device):
    if backend == "triton" and device.type == "cpu" and name.endswith("full"):
        pytest.skip("passes under Triton's interpreter, but takes a minute; runs on a GPU")
    data, model, inputs = load_golden(golden, fill_weights, name)
    model.set_attn_implementation(backend)
    with torch.no_grad():
        output = model.to(device)(*(None if t is None else t.to(device) for t in inputs))
    padded = ~torch.from_numpy(data["patch_mask"])
    assert (output.patch_embedding[padded][:, model.config.wsi["input_dim"] :] == 0).all()
    # The issue's own limits for float32.
    limit = 2e-5 if name.endswith("full") else 5e-6
    assert max(golden_errors(data, output, model.config.wsi["embed_dim"])) <= limit


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_float64_is_the_definition(golden, fill_weights, name):
    data, model, inputs = load_golden(golden, fill_weights, name)
    inputs[0] = inputs[0].double()
    with torch.no_grad():
        output = model.double()(*inputs)
    assert max(golden_errors(data, output, model.config.wsi["embed_dim"])) <= 1e-11


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("slide_encoder_tiny", "sdpa"),
        ("slide_encoder_full", "sdpa"),
        ("slide_encoder_tiny_contour_minus_one", "triton"),
    ],
)
def test_golden_under_autograd(golden, fill_weights, name, backend):
    """The training path is other code than the inference path: it has to give the same numbers."""
    data, model, inputs = load_golden(golden, fill_weights, name)
    model.set_attn_implementation(backend)
    limit = 2e-5 if name.endswith("full") else 5e-6
    assert max(golden_errors(data, model(*inputs), model.config.wsi["embed_dim"])) <= limit


@pytest.mark.golden
def test_bfloat16_is_no_worse_than_the_originals_autocast(golden, fill_weights):
    """Over all goldens together: single ones differ by the luck of a few roundings."""
    ours, originals = {"autocast": [], "bfloat16": []}, []
    for name in GOLDENS:
        data, model, inputs = load_golden(golden, fill_weights, name)
        dim = model.config.wsi["embed_dim"]
        state, config = reference_of(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            both, slide = reference(state, config, *inputs, dtype=torch.float32, attention=sdpa_dense_mask)
            originals.append(golden_errors(data, {"patch_embedding": both, "slide_embedding": slide}, dim))
            ours["autocast"].append(golden_errors(data, model(*inputs), dim))
        with torch.no_grad():
            ours["bfloat16"].append(golden_errors(data, model.bfloat16()(*inputs), dim))
    originals = np.array(originals)
    autocast = np.array(ours["autocast"]) / originals
    assert np.exp(np.log(autocast).mean()) <= 1.0
    # Weights rounded for good (norms and biases too) are allowed what that rounding costs.
    half = np.array(ours["bfloat16"]) / originals
    assert np.exp(np.log(half).mean()) <= 1.15


@pytest.mark.gpu
@pytest.mark.golden
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_bfloat16_on_a_card_is_no_worse_than_the_dense_mask(golden, fill_weights, backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ours, originals = [], []
    for name in GOLDENS:
        data, model, inputs = load_golden(golden, fill_weights, name)
        model, inputs = model.cuda(), [None if t is None else t.cuda() for t in inputs]
        model.set_attn_implementation(backend)
        dim = model.config.wsi["embed_dim"]
        state, config = reference_of(model)
        config["periods"] = config["periods"].cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            both, slide = reference(state, config, *inputs, dtype=torch.float32, attention=sdpa_dense_mask)
            originals.append(golden_errors(data, {"patch_embedding": both, "slide_embedding": slide}, dim))
            ours.append(golden_errors(data, model(*inputs), dim))
    # The rule for one kernel is twice torch's error; the mean over all goldens is steadier than any of them.
    assert np.exp(np.log(np.array(ours) / np.array(originals)).mean()) <= 1.25


@pytest.mark.parametrize("use_contour", [True, False])
@pytest.mark.parametrize("use_coords", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_storage_tokens": 0, "norm_layer": "rmsnorm", "nope_interval": 3, "embed_use_norm": False}, {"depth": 0}],
)
def test_matches_the_reference(make_slide_encoder, make_slide, changes, use_coords, use_contour):
    model = make_slide_encoder(**changes)
    features, mask, coords, contour = make_slide()
    contour[0, :5] = -1
    inputs = (features, mask, coords if use_coords else None, contour if use_contour else None)
    patches, slide = reference(*reference_of(model), *inputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = model(*inputs)
        assert torch.allclose(output.slide_embedding, slide, rtol=0, atol=1e-10)
        assert torch.allclose(output.patch_embedding[mask], patches[mask], rtol=0, atol=1e-10)
        assert (output.patch_embedding[~mask][:, 24:] == 0).all()
        assert torch.equal(output.patch_embedding[..., :24], features)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("embed_dim", [64, 128])
def test_triton_matches_the_reference(make_slide_encoder, make_slide, device, embed_dim, grad):
    """Padding, prefix tokens in a fragment, two slides; head dimensions 32 (of which there is no golden) and 64."""
    model = make_slide_encoder(embed_dim=embed_dim)
    features, mask, coords, contour = make_slide()
    contour[0, :5] = -1
    _, slide = reference(*reference_of(model), features, mask, coords, contour)
    model = model.float().to(device)
    model.set_attn_implementation("triton")
    with torch.set_grad_enabled(grad):
        output = model(features.float().to(device), *(t.to(device) for t in (mask, coords, contour)))
    # The limit of the tiny goldens in float32, twice: attention is twice as peaked here.
    assert relative(output.slide_embedding.detach(), slide.detach()) <= 1e-5


@pytest.mark.parametrize("n", [0, 1, 2, 257])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_odd_sizes(make_slide_encoder, make_slide, batch, n):
    model = make_slide_encoder()
    features, mask, coords, contour = make_slide(batch, n, masked=False)
    with torch.no_grad():
        output = model(features, mask, coords, contour)
    assert output.patch_embedding.shape == (batch, n, 56)
    assert output.slide_embedding.shape == (batch, 56)
    assert output.slide_embedding.isfinite().all()
    if n == 0:
        assert (output.slide_embedding == 0).all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("storage", [0, 3])
def test_padding_has_no_influence_whatever_it_holds(make_slide_encoder, make_slide, grad, storage):
    model = make_slide_encoder(n_storage_tokens=storage)
    features, mask, coords, contour = make_slide(batch=3)
    mask[1] = False  # a slide without any valid patch
    mask[2] &= contour[2] != 1  # and a fragment
    with torch.set_grad_enabled(grad):
        clean = model(features, mask, coords, contour)
        dirty_features, dirty_coords = features.clone(), coords.double()
        dirty_features[~mask] = torch.tensor([float("nan"), float("inf"), -float("inf")] * 8, dtype=torch.float64)
        dirty_coords[~mask] = float("nan")
        dirty_contour = contour.clone()
        dirty_contour[~mask] = -(2**40)
        dirty = model(dirty_features, mask.float() * 0.5, dirty_coords, dirty_contour)
    assert torch.equal(clean.slide_embedding, dirty.slide_embedding)
    assert torch.equal(clean.patch_embedding[mask], dirty.patch_embedding[mask])
    assert dirty.patch_embedding.isfinite().all()
    assert (dirty.patch_embedding[~mask] == 0)[:, 24:].all()
    assert (clean.slide_embedding[1] == 0).all()


def test_masked_rows_get_no_gradient_and_never_nan(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    features, mask, coords, contour = make_slide()
    mask[1] = False
    features[~mask] = float("nan")
    features.requires_grad_()
    model(features, mask, coords, contour).slide_embedding.square().sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad[~mask] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
@pytest.mark.parametrize("grad", [True, False])
def test_slides_of_a_batch_never_touch(backend, grad, make_slide_encoder, make_slide):
    """NaN in one slide: its own result is NaN, the others' are the same, gradients too."""
    if backend == "triton":
        pytest.importorskip("triton")
    model = make_slide_encoder(embed_dim=64, num_heads=2).float()
    model.set_attn_implementation(backend)
    features, mask, coords, contour = make_slide(batch=3)
    results = []
    for bad in (False, True):
        x = features.float()
        if bad:
            x[1, int(mask[1].nonzero()[0])] = float("nan")
        x.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            out = model(x, mask, coords, contour)
        gradient = torch.autograd.grad(out.slide_embedding.sum(), x)[0] if grad else torch.zeros(3)
        results.append((out.slide_embedding.detach(), out.patch_embedding.detach(), gradient))
    for clean, spoilt in zip(*results, strict=True):
        # Triton works on a tile again that met NaN, in another order of sums.
        tolerance = 1e-5 if backend == "triton" else 0
        torch.testing.assert_close(clean[[0, 2]], spoilt[[0, 2]], rtol=tolerance, atol=tolerance)
    assert results[1][0][1].isnan().all()


def test_a_slide_does_not_depend_on_its_batch(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    features, mask, coords, contour = make_slide(batch=3)
    with torch.no_grad():
        together = model(features, mask, coords, contour)
        for i in range(3):
            keep = mask[i]
            alone = model(features[i : i + 1, keep], None, coords[i : i + 1, keep], contour[i : i + 1, keep])
            assert torch.allclose(alone.slide_embedding[0], together.slide_embedding[i], rtol=0, atol=1e-12)
            assert torch.allclose(alone.patch_embedding[0], together.patch_embedding[i, keep], rtol=0, atol=1e-12)


def test_order_of_patches_does_not_matter(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    features, mask, coords, contour = make_slide(batch=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = model(features, mask, coords, contour)
        shuffled = model(features[:, order], mask[:, order], coords[:, order], contour[:, order])
    assert torch.allclose(plain.slide_embedding, shuffled.slide_embedding, rtol=0, atol=1e-12)
    assert torch.allclose(plain.patch_embedding[:, order], shuffled.patch_embedding, rtol=0, atol=1e-12)


@pytest.mark.parametrize("convert", [lambda m: m.half().float(), lambda m: m.bfloat16().float()])
def test_positions_survive_half_precision(make_slide_encoder, convert):
    """Casting the model to half and back may cost the weights their low bits, but not the periods theirs."""
    model = make_slide_encoder().float()
    with torch.no_grad():
        model.transformer.rope_embed.periods.mul_(1.2345)  # trained elsewhere than the config says
    before = model.transformer.rope_embed()
    after = convert(model).transformer.rope_embed
    assert after.periods.dtype == torch.float32
    assert torch.equal(after(), before)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_periods_stored_in_half_precision_are_recognised(make_slide_encoder, half):
    rope = make_slide_encoder().transformer.rope_embed
    exact = rope()
    with torch.no_grad():
        rope.periods.copy_(rope.periods.to(half))
    assert torch.equal(rope(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_far_from_the_origin(make_slide_encoder, make_slide, dtype):
    """In the original, fp16 coordinates past 65,504 px give NaN and bf16 periods turn by whole radians."""
    model = make_slide_encoder(nope_interval=10)
    features, mask, coords, contour = make_slide(batch=1, dtype=torch.float32)
    truth = model(features.double(), mask, coords + 180_000, contour).slide_embedding
    with torch.no_grad():
        ours = model.to(dtype)(features, mask, coords + 180_000, contour).slide_embedding
    assert ours.dtype == torch.float32
    # Measured 0.5 % in bfloat16; a wrong rotation gives tens of percent.
    assert relative(ours, truth.detach()) < 0.03


def test_float32_error_does_not_grow_with_position(make_slide_encoder, make_slide):
    model = make_slide_encoder(nope_interval=10)
    features, mask, coords, contour = make_slide(batch=1, dtype=torch.float32)
    errors = []
    for shift in (0, 2**24):
        truth = model.double()(features.double(), mask, coords + shift, contour).slide_embedding
        errors.append(
            relative(model.float()(features, mask, coords + shift, contour).slide_embedding.detach(), truth.detach())
        )
    assert errors[1] <= 2 * errors[0] + 1e-7


def test_dropout_only_in_training(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    inputs = make_slide()
    assert torch.equal(model(*inputs).slide_embedding, model(*inputs).slide_embedding)
    model.train()
    assert not torch.equal(model(*inputs).slide_embedding, model(*inputs).slide_embedding)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_it_trains(make_slide_encoder, make_slide, backend):
    model = make_slide_encoder(attn_drop=0.0, ffn_drop=0.0).float()
    model.set_attn_implementation(backend)
    inputs = make_slide(dtype=torch.float32)
    target = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (model(*inputs).slide_embedding[:, 24:] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_gradients_are_those_of_the_reference(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    inputs = make_slide()
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(model(*inputs).slide_embedding.square().sum(), list(model.parameters()))
    state, config = reference_of(model)
    leaves = {
        name.removeprefix(PREFIX): dict(model.named_parameters())[name].detach().requires_grad_() for name in names
    }
    _, slide = reference({**state, **leaves}, config, *inputs)
    truth = torch.autograd.grad(slide.square().sum(), list(leaves.values()))
    for name, a, b in zip(names, ours, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9), name


def test_output_reads_as_mapping_attributes_and_tuple(make_slide_encoder, make_slide):
    model = make_slide_encoder()
    inputs = make_slide()
    output = model(*inputs)
    assert isinstance(output, SlideEncoderOutput)
    assert output["patch_embedding"] is output.patch_embedding is output[0]
    assert set(output.keys()) == {"patch_embedding", "slide_embedding"}
    as_tuple = model(*inputs, return_dict=False)
    assert torch.equal(as_tuple[1], output.slide_embedding)


@pytest.mark.parametrize(
    ("ratio", "layer", "hidden"),
    [
        (4.0, "swiglu128", 2048),
        (4.0, "swiglu", 2048),
        (4.1, "swiglu", 2104),
        (4.1, "swiglu64", 2112),
        (2.0, "swiglu32", 1024),
    ],
)
def test_ffn_width(ratio, layer, hidden):
    assert ffn_hidden(768, ratio, layer) == hidden


def test_parameter_names_and_shapes_are_the_published_ones():
    state = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig()).state_dict()
    assert all(name.startswith(PREFIX) for name in state)
    shapes = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["cls_token"] == (1, 1, 768)
    assert shapes["storage_tokens"] == (1, 7, 768)
    assert shapes["rope_embed.periods"] == (16,)
    assert shapes["patch_embed.norm.bias"] == (768,)
    assert shapes["blocks.5.attn.qkv.weight"] == (2304, 768)
    assert shapes["blocks.5.mlp.w3.weight"] == (768, 2048)
    assert shapes["norm.weight"] == (768,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m, c, i: (f[..., :7], m, c, i), "patch_features must be"),
        (lambda f, m, c, i: (f[0], m, c, i), "patch_features must be"),
        (lambda f, m, c, i: (f.long(), m, c, i), "patch_features must be"),
        (lambda f, m, c, i: (f, m[:, :-1], c, i), "patch_mask must be"),
        (lambda f, m, c, i: (f, m, c[..., :1], i), "patch_coords must be"),
        (lambda f, m, c, i: (f, m, c, i[:1]), "patch_contour_index must be"),
        (lambda f, m, c, i: (f, None, c.double() * float("inf"), i), "non-finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make_slide_encoder, make_slide, change, message):
    with pytest.raises(SettingsError, match=message):
        make_slide_encoder()(*change(*make_slide()))


@pytest.mark.parametrize("norm_layer", ["layernorm", "rmsnorm"])
def test_new_weights_are_random_in_every_matrix_and_one_in_every_norm(norm_layer):
    torch.manual_seed(0)
    cfg = {"input_dim": 48, "embed_dim": 32, "num_heads": 2, "depth": 2, "norm_layer": norm_layer}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=cfg))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            spread = parameter.shape[1] ** -0.5
            assert 0.9 * spread < parameter.std() < 1.1 * spread, name
        elif name.endswith("norm.weight") or ".norm1.weight" in name or ".norm2.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
    features = torch.randn(1, 9, 48)
    with torch.no_grad():
        tokens = model(features).slide_embedding[:, 48:], model(-features).slide_embedding[:, 48:]
    assert (tokens[0] - tokens[1]).norm() > 0.1 * tokens[0].norm()  # they say something of the features
