"""The plan of inference memory against what is really alive, tracked tensor by tensor."""

import numpy as np
import pytest
import torch
from torch import Tensor

from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel
from exaonepath.encoders import block, inference, memory_plan, slide_transformer
from exaonepath.encoders.memory_plan import parse_memory, plan_memory
from exaonepath.encoders.slide_transformer import TokenOrder
from exaonepath.errors import MemoryLimitError, SettingsError
from exaonepath.ops.attention import cpu_kernel
from exaonepath.ops.attention.layout import FragmentLayout, Segments
from exaonepath.ops.attention.rotary import Rotation
from exaonepath.ops.attention.tiles import TileSchedules

META = torch.device("meta")


@pytest.fixture
def published():
    """The published configuration, without memory."""
    with META:
        return ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig()).eval()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("11.5 GiB", 11.5 * 2**30),
        ("800mb", 8 * 10**8),
        ("1000", 1000),
        (5, 5),
        ("2T", 2 * 10**12),
    ],
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "12XB", "GB", "-1GB", "0", 0, -5, True, 1.5, "1e9", "12 GB free"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(SettingsError, match="amount of memory"):
        parse_memory(text)


def meta_layout(tokens: int, n: int, fragments: int) -> tuple[FragmentLayout, Rotation]:
    lengths = [8, *[n // fragments] * (fragments - 1)]
    lengths.append(tokens - sum(lengths))

    def segments(lengths: list[int]) -> Segments:
        return Segments(torch.empty(len(lengths) + 1, dtype=torch.int64, device=META), tuple(lengths))

    source = torch.arange(tokens)  # the tokens are sorted on the device of the features, the host
    positions = torch.empty(tokens, 2, dtype=torch.float64, device=META)
    rotation = Rotation(positions, torch.empty(16, dtype=torch.float64, device=META))
    return FragmentLayout(source, segments([tokens]), segments(lengths), 1, 8, n), rotation


@pytest.mark.parametrize(
    ("n", "backend", "half"),
    [
        *((n, "triton", True) for n in (5_000, 100_000, 250_000, 1_000_000)),
        (100_000, "triton", False),
        (100_000, "sdpa", True),
        (100_000, "sdpa", False),
    ],
)
def test_published_encoder_stays_within_its_plan(published, live_memory, monkeypatch, n, backend, half):
    """The real inference code on tensors without storage, at the size of real slides, features on the host."""
    dtype = torch.bfloat16 if half else torch.float32
    for module in (block, inference, slide_transformer):
        monkeypatch.setattr(module, "compute_dtype", lambda _: dtype)  # as autocast on a GPU would have it
    # A flash kernel, which there is none of without a device, makes its result and nothing else of that size.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, scale: torch.empty_like(q))
    plan = published.plan_memory(n, device="cuda", dtype=dtype, backend=backend)

    weights = [*published.parameters(), *published.buffers()]
    # Each kind of block once: the peak is one block's, whatever the depth, and all weights are counted.
    published.transformer.blocks = published.transformer.blocks[:2]

    class HostFeatures:
        def take(self, index: Tensor) -> Tensor:
            return torch.empty((index.numel(), 768), device=META)

    live = live_memory("meta", *weights)
    with torch.no_grad(), live:
        layout, rotation = meta_layout(n + 8, n, 8)
        order = TokenOrder.of(layout)
        x = published.transformer.encode(
            HostFeatures(), layout, order, rotation, backend, plan.rows, plan.attention_rows
        )
        del rotation
        for _ in published.transformer.leave(x, order, (1, n), plan.rows):
            pass
    assert live.peak <= plan.tensors
    assert plan.tensors <= 1.3 * live.peak
    assert plan.total <= 1.3 * live.peak + memory_plan._OVERHEAD_BYTES


@pytest.mark.parametrize(("n", "target"), [(100_000, 1.0e9), (250_000, 2.2e9), (1_000_000, 8.5e9)])
def test_published_encoder_is_planned_within_the_targets(published, n, target):
    """Those of test_slide_encoder_gpu.py, which compares them with a card. They include weights, and the memory of the
    allocator and of the libraries; chunks have their default size."""
    plan = published.plan_memory(n, device="cuda", dtype=torch.bfloat16, backend="triton")
    assert plan.rows == memory_plan.default_rows(n, "cuda")
    assert plan.total <= target


def test_workspaces_of_cublas_are_in_the_plan(published):
    """cuBLAS and cuBLASLt have up to 32 MiB each, and blocks of the allocator are rounded up."""
    plan = published.plan_memory(1000, device="cuda", dtype=torch.bfloat16)
    assert plan.overhead >= 2 * (32 << 20) + plan.tensors // 32
    assert published.plan_memory(1000, device="cpu").overhead == 0


@pytest.mark.parametrize("length", [1, 100, 100_000])
def test_work_lists_of_the_kernels_are_within_the_plan(live_memory, length):
    """For both kinds of blocks: the lists that stay, and what their computation needs in addition."""
    n = 100_000
    live = live_memory("meta")
    with live:
        lists = [TileSchedules(np.full(n // length, length), META) for _ in range(2)]
        for schedule in lists:
            for first in range(0, n, 8192):
                schedule.tiles(128, first, min(8192, n - first))
    positions, offsets = 16 * n, 8 * (n // length + 1)
    assert live.now + positions + offsets <= memory_plan._INDEX_BYTES_STREAMED * n
    assert live.peak <= (memory_plan._INDEX_BYTES_STREAMED + memory_plan._LISTS_BYTES) * n


@pytest.mark.parametrize("fragments", [4, 300])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(
    ("dtype", "longest"),
    [(torch.float32, 8192), (torch.float32, 2000), (torch.float32, 0), (torch.bfloat16, 0)],
    ids=["the kernel", "the kernel for the fragments only", "torch", "torch in bfloat16"],
)
def test_a_real_slide_on_the_cpu_stays_within_its_plan(live_memory, monkeypatch, dtype, longest, positions, fragments):
    """On real memory, features and embeddings included. Where no product is cut off, dimensions are small but odd."""
    if not cpu_kernel.max_length() and longest:
        pytest.skip("no extension, or a CPU without AVX2")
    monkeypatch.setattr(cpu_kernel, "max_length", lambda: longest)
    if longest:
        # The workspaces of the C++ kernel are not torch's, which counts here.
        assert cpu_kernel.workspace_bytes(dtype, 48, 3001) > torch.get_num_threads() << 19
        monkeypatch.setattr(cpu_kernel, "workspace_bytes", lambda *_: 1)
    monkeypatch.setattr(memory_plan, "_ROWS_CPU", 64)
    cfg = {"input_dim": 40, "embed_dim": 96, "depth": 2, "num_heads": 2, "ffn_layer": "swiglu32"}
    model = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=cfg)).eval()
    n = 3000
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, n, 40, generator=generator)
    coords = torch.randint(0, 50_000, (1, n, 2), generator=generator) if positions else None
    contour = torch.randint(0, fragments, (1, n), generator=generator)
    seen = []
    real = plan_memory

    def spy(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("exaonepath.encoders.slide_encoder.plan_memory", spy)
    live = live_memory("cpu", *model.parameters(), *model.buffers(), features)
    with live, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model.encode_streamed(features, None, coords, contour)
    (plan,) = seen
    assert live.peak <= plan.tensors
    # The tiled CPU kernel's blocks of scores have a fixed bound of 20 MiB, which a slide this small does not reach.
    # With fewer tokens in the kernel than in the slide, the plan is that of the tiled kernel, which needs more.
    assert plan.tensors - (0 if longest > n else 20 << 20) <= (1.3 if longest != 2000 else 2) * live.peak


def test_a_tight_limit_is_met_by_smaller_chunks(published):
    plans = [
        published.plan_memory(100_000, device="cuda", dtype=torch.bfloat16, max_memory=m) for m in ("2GB", "0.97GB")
    ]
    assert plans[0].rows > plans[1].rows
    assert plans[1].total <= 970_000_000
    assert plans[0].total > 970_000_000


def test_what_cannot_fit_is_refused_with_the_figure(published):
    with pytest.raises(MemoryLimitError) as error:
        published.plan_memory(1_000_000, device="cuda", max_memory="8GB")
    message = str(error.value)
    for part in ("1000000 patches", "10.", "8.00 GB", "keys and values 6.15 GB", "bfloat16", "more memory", "CPU"):
        assert part in message
    # And with the figure it names it does fit.
    needed = message.split("need ")[1].split(" GB")[0]
    published.plan_memory(1_000_000, device="cuda", max_memory=f"{needed}GB")
    half = message.split("bfloat16 (")[1].split(" GB")[0]
    published.plan_memory(1_000_000, device="cuda", dtype=torch.bfloat16, max_memory=f"{half}GB")


def test_forward_needs_more_than_streaming(published):
    plans = [published.plan_memory(100_000, device="cuda", streamed=s) for s in (True, False)]
    assert plans[1].total > plans[0].total
    with pytest.raises(MemoryLimitError, match="encode_streamed"):
        published.plan_memory(100_000, device="cuda", streamed=False, max_memory="1GB")


def test_nothing_is_allocated_for_a_slide_that_is_refused(make_slide_encoder, make_slide, live_memory):
    model = make_slide_encoder()
    features, _, coords, contour = make_slide(batch=1, n=20_000, masked=False)
    live = live_memory("cpu")
    with live, pytest.raises(MemoryLimitError, match="20000 patches"):
        model.encode_streamed(features, None, coords, contour, max_memory="20MB")
    # Indices and coordinates while they are sorted; the stream of tokens alone would be 256 more, embeddings 448.
    assert live.peak <= 20_003 * memory_plan._SORT_BYTES
