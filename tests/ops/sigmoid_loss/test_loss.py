"""The pairwise sigmoid loss: goldens, every backend against float64, derivatives, and what it refuses."""

from __future__ import annotations

import logging
import math
import sys
from contextlib import nullcontext
from itertools import combinations, permutations

import pytest
import torch

from exaonepath import log_once
from exaonepath.errors import BackendError, SettingsError
from exaonepath.ops import extension
from exaonepath.ops.sigmoid_loss import engine as sigmoid_loss_engine
from exaonepath.ops.sigmoid_loss import pairs as sigmoid_loss_pairs
from exaonepath.ops.sigmoid_loss import sweep as sigmoid_loss_sweep
from exaonepath.ops.sigmoid_loss.loss import sigmoid_loss
from exaonepath.ops.sigmoid_loss.sweep import Tile
from exaonepath.reference.sigmoid_loss import dense_sigmoid_loss

MODES = {"none": None, "three": 3.0, "balanced": "balanced"}
# Of float32 inputs, relative to float64: the issue's own figures.
LOSS_ERROR, GRADIENT_ERROR = 1e-6, 5e-6
LOG_10 = math.log(10)


GPU = pytest.mark.gpu
BACKENDS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=GPU),
    pytest.param(("cuda", "cuda"), id="cuda", marks=GPU),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """(name, device) of each backend; skips, visibly, what is not here."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name != "torch":
        reason = sigmoid_loss_engine.why_not(name, torch.device(device), torch.float32)
        if reason:
            pytest.skip(reason)
    return name, torch.device(device)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that even a small batch fills several of, with ragged edges."""
    for name in ("CPU_TILE", "CUDA_TILE", "_CUDA_TORCH_TILE"):
        monkeypatch.setattr(sigmoid_loss_engine, name, Tile(16, 24))


class Case:
    """Inputs in float64, and the loss and gradients of any function of them."""

    def __init__(self, n_rows, widths=(7, 5, 9), dim=11, *, seed=0, t=LOG_10, b=-10.0, patients=None, missing=0.3):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        n_pairs = math.comb(len(widths), 2)
        self.embeddings = [draw(n_rows, width) for width in widths]
        self.projections = {(i, j): draw(widths[i], dim) for i, j in permutations(range(len(widths)), 2)}
        self.log_t = t + 0.1 * draw(n_pairs)
        self.bias = b + 0.1 * draw(n_pairs)
        self.patient = torch.randint(0, patients or max(1, 2 * n_rows // 3), (n_rows,), generator=generator)
        self.availability = torch.rand(len(widths), n_rows, generator=generator) >= missing

    def run(self, function, dtype=torch.float64, device="cpu", **options):
        """(result, gradients of embeddings, projections, log_t, bias)."""
        leaf = lambda x: x.to(device=device, dtype=dtype).clone().requires_grad_()  # noqa: E731
        h, w = [leaf(x) for x in self.embeddings], {key: leaf(x) for key, x in self.projections.items()}
        t, b = leaf(self.log_t), leaf(self.bias)
        available = None if self.availability is None else self.availability.to(device)
        result = function(h, w, t, b, self.patient.to(device), available, **options)
        result[0].backward()
        return result, [x.grad.double().cpu() for x in (*h, *w.values(), t, b)]


def assert_close(case, backend, dtype=torch.float32, slack=1.0, **options):
    """A logit is off by exp(t) times the rounding of a dot product, and every slope by as much relatively: the issue's
    figures hold at t = log 10, and `slack` is exp(t) / 10 above that."""
    name, device = backend
    truth, true_gradients = case.run(dense_sigmoid_loss, **options)
    ours, gradients = case.run(sigmoid_loss, dtype, device, backend=name, **options)
    assert ours.n_positive.tolist() == truth[2].tolist()
    assert abs(ours.loss.item() - truth[0].item()) <= slack * LOSS_ERROR * abs(truth[0].item()) + 1e-300
    assert (ours.pair_losses.cpu().double() - truth[1]).abs().max() <= slack * LOSS_ERROR * max(1, truth[1].max())
    # A gradient that cancels out has no relative error of its own: it is held against the largest of its kind.
    n_modalities = len(case.embeddings)
    kinds = [n_modalities, len(case.projections), 1, 1]
    for found, exact in zip(_split(gradients, kinds), _split(true_gradients, kinds), strict=True):
        scale = max((x.norm().item() for x in exact), default=0.0)
        for x, y in zip(found, exact, strict=True):
            assert (x - y).norm().item() <= slack * GRADIENT_ERROR * scale + 1e-300


def _split(items, sizes):
    iterator = iter(items)
    return [[next(iterator) for _ in range(size)] for size in sizes]


@pytest.mark.golden
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sigmoid_loss", "sigmoid_loss_sparse"])
def test_golden(golden, name, mode, backend):
    arrays = {key: torch.from_numpy(value) for key, value in golden(name).items()}
    case = Case(1)
    case.embeddings = [arrays[f"h_{m}"] for m in range(5)]
    case.projections = {(i, j): arrays[f"W_{i}_{j}"] for i, j in permutations(range(5), 2)}
    case.log_t, case.bias = arrays["log_t"], arrays["bias"]
    case.patient, case.availability = arrays["patient"], arrays["availability"]
    exact = [arrays[f"{mode}/grad_h_{m}"] for m in range(5)]
    exact += [arrays[f"{mode}/grad_W_{i}_{j}"] for i, j in permutations(range(5), 2)]
    exact += [arrays[f"{mode}/grad_log_t"], arrays[f"{mode}/grad_bias"]]
    # float64: rounding of sums of a few hundred terms. The reference itself must be there too.
    for function, dtype, bound, options in (
        (dense_sigmoid_loss, torch.float64, 1e-13, {}),
        (sigmoid_loss, torch.float64, 1e-13, {"backend": "torch"}),
        (sigmoid_loss, torch.float32, GRADIENT_ERROR, {"backend": backend[0]}),
    ):
        device = "cpu" if function is dense_sigmoid_loss else backend[1]
        result, gradients = case.run(function, dtype, device, pos_weight=MODES[mode], **options)
        torch.testing.assert_close(result[0].detach().cpu().double(), arrays[f"{mode}/loss"], rtol=bound / 5, atol=0)
        pair_losses = result[1].detach().cpu().double()
        torch.testing.assert_close(pair_losses, arrays[f"{mode}/pair_loss"], rtol=bound / 5, atol=0)
        assert result[2].tolist() == arrays[f"{mode}/n_positive"].tolist()
        for found, truth in zip(gradients, exact, strict=True):
            # Some of grad_bias are sums that cancel to 4e-4 of their terms.
            assert (found - truth).norm() <= bound * max(truth.norm(), exact[-1].norm())


GRID = {
    "empty": {"n_rows": 0},
    "one": {"n_rows": 1, "missing": 0.0},
    "odd": {"n_rows": 67},
    # In one dimension every unit vector is +-1 and all gradients of h and W vanish: nothing to be relative to.
    "dim 2": {"n_rows": 21, "dim": 2},
    "dim 37": {"n_rows": 33, "dim": 37},
    "two modalities": {"n_rows": 50, "widths": (3, 4)},
    "mostly missing": {"n_rows": 40, "missing": 0.9},
    "all missing": {"n_rows": 12, "missing": 1.1},
    "nothing missing": {"n_rows": 50, "missing": 0.0},
    "one patient": {"n_rows": 29, "patients": 1},
    "few patients": {"n_rows": 70, "patients": 3},
    "flat": {"n_rows": 30, "t": -8.0, "b": 0.0},
    "bias +50": {"n_rows": 30, "b": 50.0},
    "bias -50": {"n_rows": 30, "b": -50.0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GRID)
def test_equals_float64(name, mode, backend, small_tiles):
    case = Case(**GRID[name], seed=3)
    if name == "one patient" and mode == "balanced":
        result, gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0], pos_weight="balanced")
        # No negative at all: the balanced weight is 0, and so is the loss.
        assert result.loss == 0
        assert not any(g.any() for g in gradients)
        return
    assert_close(case, backend, pos_weight=MODES[mode])


@pytest.mark.parametrize("t", [3.5, 6.0, 9.0])
def test_steep_logits(t, backend, small_tiles):
    assert_close(Case(40, t=t, seed=4), backend, slack=math.exp(t + 0.3) / 10)


def test_default_tiles(backend):
    assert_close(Case(600, widths=(24, 40), dim=64, patients=550), backend)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5], [0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
def test_pair_weights(weights, backend):
    case = Case(31, seed=5)
    truth, true_gradients = case.run(dense_sigmoid_loss, pair_weights=torch.tensor(weights))
    ours, gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0], pair_weights=weights)
    assert ours.loss.item() == pytest.approx(truth[0].item(), rel=LOSS_ERROR)
    for x, y in zip(gradients, true_gradients, strict=True):
        assert (x - y).norm() <= GRADIENT_ERROR * max(y.norm(), 1e-300)
    # What is not computed is not known.
    assert ours.pair_losses.isnan().tolist() == [weight == 0 for weight in weights]


def test_statistics(backend):
    case = Case(43, seed=6)
    result, _ = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    for index, (i, j) in enumerate(combinations(range(3), 2)):
        unit = [
            torch.nn.functional.normalize(case.embeddings[a] @ case.projections[a, b], dim=1)[case.availability[a]]
            for a, b in ((i, j), (j, i))
        ]
        logits = case.log_t[index].exp() * unit[0] @ unit[1].T + case.bias[index]
        ids = [case.patient[case.availability[m]] for m in (i, j)]
        same = ids[0][:, None] == ids[1]
        assert result.n_positive[index] == same.sum()
        assert result.n_valid[index] == same.numel()
        assert result.missing[index].item() == pytest.approx(1 - same.numel() / 43**2, rel=1e-6)
        # Means of float32 logits near -10.
        assert result.positive_logit[index].item() == pytest.approx(logits[same].mean().item(), rel=1e-6)
        assert result.negative_logit[index].item() == pytest.approx(logits[~same].mean().item(), rel=1e-6)


def test_repeats_bit_for_bit(backend):
    case = Case(700, widths=(24, 40, 16), dim=48, seed=7)
    first, first_gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    second, second_gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    assert torch.equal(first.loss, second.loss)
    for x, y in zip(first_gradients, second_gradients, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_torchs_defaults_do_not_matter(default, backend):
    """Raw memory is computed: a tensor in the default dtype, or on the default device, would be read as another one."""
    case = Case(50, seed=7)
    first, first_gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    before = torch.get_default_dtype()
    try:
        if default != "meta":
            torch.set_default_dtype(default)
        with torch.device(default) if default == "meta" else nullcontext():
            second, second_gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(x, y) for x, y in zip(first_gradients, second_gradients, strict=True))


def half_case(dtype):
    """Inputs that `dtype` holds exactly: ours and the reference see the same."""
    case = Case(60, seed=8)
    rounded = lambda x: x.to(dtype).double()  # noqa: E731
    case.projections = {key: rounded(x) for key, x in case.projections.items()}
    case.embeddings = [rounded(x) for x in case.embeddings]
    case.log_t, case.bias = rounded(case.log_t), rounded(case.bias)
    return case


def assert_half_precision(ours, gradients, truth, true_gradients, dtype, *, on_card):
    """The CPU computes in float32, so its gradients are rounded once, to nearest. On CUDA unit vectors are rounded too:
    a logit is off by exp(t) = 10 times half an eps over sqrt(d), and operands of the gradients are bfloat16."""
    assert ours.loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert ours.loss.item() == pytest.approx(truth[0].item(), rel=eps if on_card else LOSS_ERROR)
    bound = 4 * torch.finfo(torch.bfloat16).eps if on_card else eps / 2 + GRADIENT_ERROR
    scale = max(y.norm() for y in true_gradients[-2:])
    for x, y in zip(gradients, true_gradients, strict=True):
        # Below 6e-5 the spacing of float16 is 6e-8.
        assert (x - y).norm() <= bound * max(y.norm(), 1e-3 * scale) + 3e-8 * y.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, backend):
    case = half_case(dtype)
    truth, true_gradients = case.run(dense_sigmoid_loss)
    ours, gradients = case.run(sigmoid_loss, dtype, backend[1], backend=backend[0])
    assert_half_precision(ours, gradients, truth, true_gradients, dtype, on_card=backend[1].type == "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cards_half_precision_arithmetic_on_the_cpu(dtype, monkeypatch, small_tiles):
    """The engine that CUDA gets, its products stood in for by exact ones: operands and slopes rounded, sums not."""
    engine = sigmoid_loss_engine.choose_engine("torch", torch.device("cuda"), dtype)
    assert (engine.operand, engine.gradient_operand, engine.accumulator) == (dtype, torch.bfloat16, torch.float32)
    exact = lambda a, b: a.float() @ b.float().T  # noqa: E731
    for module in (sigmoid_loss_pairs, sigmoid_loss_sweep):
        monkeypatch.setattr(module, "product_nt", exact)
        monkeypatch.setattr(module, "product_tn", lambda a, b: exact(a.T, b.T))
    monkeypatch.setattr(sigmoid_loss_pairs, "product_nn", lambda a, b: exact(a, b.T))
    monkeypatch.setattr(sys.modules[sigmoid_loss.__module__], "choose_engine", lambda *_: engine)
    case = half_case(dtype)
    truth, true_gradients = case.run(dense_sigmoid_loss)
    ours, gradients = case.run(sigmoid_loss, dtype)
    assert ours.loss.dtype == torch.float32
    assert_half_precision(ours, gradients, truth, true_gradients, dtype, on_card=True)


def test_autocast_takes_mixed_dtypes(backend):
    case = Case(40, seed=9)
    name, device = backend
    arguments = [x.float().to(device) for x in (case.log_t, case.bias)]
    arguments += [case.patient.to(device), case.availability.to(device)]
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    embeddings = [x.to(device, d).requires_grad_() for x, d in zip(case.embeddings, dtypes, strict=True)]
    projections = {key: x.float().to(device) for key, x in case.projections.items()}
    with pytest.raises(SettingsError, match="use autocast"):
        sigmoid_loss(embeddings, projections, *arguments, backend=name)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = sigmoid_loss(embeddings, projections, *arguments, backend=name)
    result.loss.backward()
    truth = dense_sigmoid_loss(
        [x.detach().double().cpu() for x in embeddings],
        case.projections,
        case.log_t,
        case.bias,
        case.patient,
        case.availability,
    )
    # The CPU computes in float32 whatever autocast says; CUDA rounds unit vectors to bfloat16.
    bound = LOSS_ERROR if device.type == "cpu" else 10 * torch.finfo(torch.bfloat16).eps
    assert result.loss.item() == pytest.approx(truth[0].item(), rel=bound)
    assert [x.grad.dtype for x in embeddings] == [x.dtype for x in embeddings]


def test_gradcheck():
    case = Case(9, widths=(3, 4, 2), dim=5, t=0.5, b=-1.0, seed=10)
    tensors = [*case.embeddings, *case.projections.values(), case.log_t, case.bias]
    keys = list(case.projections)

    def loss(*flat):
        h, w = flat[:3], dict(zip(keys, flat[3:-2], strict=True))
        return sigmoid_loss(h, w, flat[-2], flat[-1], case.patient, case.availability, pos_weight="balanced").loss

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in tensors])


def _call(case, dtype=torch.float32, **options):
    """Positional arguments with leaves, and options."""
    h = [x.to(dtype).requires_grad_() for x in case.embeddings]
    w = {key: x.to(dtype).requires_grad_() for key, x in case.projections.items()}
    return (h, w, case.log_t.to(dtype), case.bias.to(dtype), case.patient, case.availability), options


def test_second_derivative_is_refused():
    arguments, _ = _call(Case(8))
    loss = sigmoid_loss(*arguments).loss
    (gradient,) = torch.autograd.grad(loss, arguments[0][0], create_graph=True)
    with pytest.raises(BackendError, match="differentiable once"):
        gradient.square().sum().backward()


def test_backward_twice_with_a_retained_graph():
    arguments, _ = _call(Case(8))
    h = arguments[0][0]
    loss = sigmoid_loss(*arguments).loss
    (once,) = torch.autograd.grad(loss, h, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, h)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-6, atol=0)  # one rounding


def test_frozen_inputs_get_nothing_and_no_grad_forms_none():
    arguments, _ = _call(Case(8))
    arguments[0][1].requires_grad_(False)
    loss = sigmoid_loss(*arguments).loss
    loss.backward()
    assert arguments[0][1].grad is None
    assert arguments[0][0].grad.any()
    with torch.no_grad():
        alone = sigmoid_loss(*arguments)
    assert torch.equal(alone.loss, loss.detach())
    assert not alone.loss.requires_grad


def test_only_the_loss_is_differentiable():
    arguments, _ = _call(Case(8))
    result = sigmoid_loss(*arguments)
    assert [x.requires_grad for x in result] == [True] + [False] * 6


def test_missing_rows_may_hold_anything(backend):
    case = Case(20, seed=11)
    clean, clean_gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    for m, h in enumerate(case.embeddings):
        h[~case.availability[m]] = math.nan
    dirty, gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0], check_finite=True)
    assert torch.equal(clean.loss, dirty.loss)
    for x, y in zip(clean_gradients, gradients, strict=True):
        assert torch.equal(x, y)


def test_an_embedding_without_direction(backend):
    case = Case(12, missing=0.0, seed=12)
    case.embeddings[0][3] = 0
    result, gradients = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    truth, _ = case.run(dense_sigmoid_loss)
    assert result.loss.item() == pytest.approx(truth[0].item(), rel=LOSS_ERROR)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][3].any()


def test_nan_is_not_hidden(backend):
    case = Case(12, missing=0.0)
    case.embeddings[1][5, 2] = math.nan
    result, _ = case.run(sigmoid_loss, torch.float32, backend[1], backend=backend[0])
    assert result.loss.isnan()


def test_check_finite_names_modality_rows_and_pairs():
    case = Case(12, missing=0.0)
    case.embeddings[1][5, 2] = math.inf
    case.embeddings[1][7, 0] = math.nan
    arguments, _ = _call(case)
    with pytest.raises(SettingsError, match=r"rna .* 2 of 12 rows \(5, 7\).*\(wsi, rna\), \(rna, cnv\)"):
        sigmoid_loss(*arguments, check_finite=True, names=["wsi", "rna", "cnv"])
    case = Case(12)
    case.projections[2, 1][0, 0] = math.nan
    arguments, _ = _call(case)
    with pytest.raises(SettingsError, match=r"W of \(cnv, rna\)"):
        sigmoid_loss(*arguments, check_finite=True, names=["wsi", "rna", "cnv"])


def test_no_valid_pair_is_zero_and_said_once(caplog):
    log_once.forget()
    case = Case(6, missing=1.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result, gradients = case.run(sigmoid_loss, torch.float32)
    assert result.loss == 0
    assert not any(g.any() for g in gradients)
    assert len([r for r in caplog.records if "no valid positive" in r.message]) == 1


def test_without_the_extension_torch_serves_and_says_so_once(monkeypatch, caplog):
    case = Case(20, seed=13)
    reason = "the C++ extension cannot be loaded (made up)"
    monkeypatch.setattr(sigmoid_loss_engine, "load_extension", lambda: (None, reason))
    log_once.forget()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            absent, gradients = case.run(sigmoid_loss, torch.float32, backend="auto")
    assert len([r for r in caplog.records if reason in r.message]) == 1
    plain, plain_gradients = case.run(sigmoid_loss, torch.float32, backend="torch")
    assert torch.equal(absent.loss, plain.loss)
    assert all(torch.equal(x, y) for x, y in zip(gradients, plain_gradients, strict=True))
    with pytest.raises(BackendError, match="made up"):
        case.run(sigmoid_loss, torch.float32, backend="cpu")


@pytest.mark.parametrize(("name", "value", "words"), [("__version__", "0.0.0", "0.0.0"), ("_INTERFACE", -1, "sources")])
def test_an_extension_of_another_version_is_not_used(monkeypatch, name, value, words):
    extension.load_extension.cache_clear()
    monkeypatch.setattr(extension, name, value)
    try:
        module, reason = extension.load_extension()
        assert module is None
        assert words in reason or "cannot be loaded" in reason
        with pytest.raises(BackendError, match="reinstall"):
            extension.require_extension()
    finally:
        extension.load_extension.cache_clear()


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [("cuda", torch.float32, "cannot take tensors on cpu"), ("cpu", torch.float64, "computes in float32")],
)
def test_a_backend_asked_for_by_name_says_why_not(backend, dtype, words):
    arguments, _ = _call(Case(4), dtype)
    with pytest.raises(BackendError, match=words):
        sigmoid_loss(*arguments, backend=backend)


def change(**changes):
    """A bad call: what replaces which argument of a good one."""
    names = ("embeddings", "projections", "log_t", "bias", "patient", "availability")

    def apply(arguments):
        named = dict(zip(names, arguments, strict=True))
        options = {}
        for key, value in changes.items():
            (named if key in named else options)[key] = value(named.get(key)) if callable(value) else value
        return list(named.values()), options

    return apply


BAD = {
    "one modality": (change(embeddings=lambda h: h[:1]), "at least two modalities"),
    "batch": (change(embeddings=lambda h: [h[0], h[1][:5], h[2]]), "has? ?.*5 rows"),
    "not a matrix": (change(embeddings=lambda h: [h[0][0], *h[1:]]), r"\[B, E\]"),
    "integers": (change(embeddings=lambda h: [x.long() for x in h]), "floating point"),
    "dtype": (change(embeddings=lambda h: [h[0].double(), *h[1:]]), "convert them"),
    "device": (change(embeddings=lambda h: [h[0], h[1].to("meta"), h[2]]), "on meta"),
    "width": (change(embeddings=lambda h: [h[0][:, :3], *h[1:]]), "as wide as the embeddings"),
    "projection missing": (change(projections=lambda w: {k: x for k, x in w.items() if k != (2, 0)}), r"\(2, 0\)"),
    "projection dim": (change(projections=lambda w: {**w, (0, 1): w[0, 1][:, :4]}), "gives width 4"),
    "projection dtype": (change(projections=lambda w: {**w, (0, 1): w[0, 1].half()}), "float16"),
    "projection device": (change(projections=lambda w: {**w, (0, 1): w[0, 1].to("meta")}), "on meta"),
    "log_t": (change(log_t=lambda t: t[:2]), r"log_t must be .*\[3\]"),
    "bias device": (change(bias=lambda b: b.to("meta")), "bias is on meta"),
    "patient shape": (change(patient=lambda p: p[:3]), "patient must be"),
    "patient dtype": (change(patient=lambda p: p.float()), "integer ids"),
    "patient device": (change(patient=lambda p: p.to("meta")), "patient is on meta"),
    "availability shape": (change(availability=lambda a: a.T), r"bool \[3, 8\]"),
    "availability dtype": (change(availability=lambda a: a.float()), "bool"),
    "availability device": (change(availability=lambda a: a.to("meta")), "availability is on meta"),
    "weights": (change(pair_weights=[1.0]), "3 finite numbers"),
    "weights sign": (change(pair_weights=[1.0, -1.0, 1.0]), "finite numbers >= 0"),
    "pos_weight": (change(pos_weight="equal"), "balanced"),
    "pos_weight 0": (change(pos_weight=0.0), "> 0"),
    "names": (change(names=["a", "b"]), "3 names"),
    "backend": (change(backend="mps"), "unknown sigmoid loss backend"),
    "t overflows": (change(log_t=lambda t: t + 90, names=["wsi", "rna", "cnv"]), r"exp\(t\) of the pair \(wsi, rna\)"),
    "t is NaN": (change(log_t=lambda t: t * math.nan), r"exp\(t\) of the pair \(0, 1\)"),
    "b is infinite": (change(bias=lambda b: b - math.inf), "bias of the pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    spoil, words = BAD[name]
    arguments, options = spoil(_call(Case(8))[0])
    with pytest.raises(SettingsError, match=words):
        sigmoid_loss(*arguments, **options)


def test_the_operator_keeps_torchs_rules():
    case = Case(10, seed=14)
    arguments, _ = _call(case)
    h, w, *shared = arguments
    options = ([1.0] * 3, None, True, "0\n1\n2", "auto", torch.float32, [True] * 3, False)
    ordered = [w[pair] for i, j in combinations(range(3), 2) for pair in ((i, j), (j, i))]
    torch.library.opcheck(torch.ops.exaonepath.sigmoid_loss.default, (h, ordered, *shared, *options))


def test_compiles_without_a_graph_break():
    arguments, _ = _call(Case(10, seed=15))

    def loss(*tensors):
        return sigmoid_loss(*tensors).loss * 2

    eager = loss(*arguments)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*arguments)
    assert torch.equal(eager, compiled)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, arguments[0]), torch.autograd.grad(eager, arguments[0]), rtol=0, atol=0
    )
