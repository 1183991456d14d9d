"""The whole slide encoder on synthetic slides: ours, ours compiled, and the same arithmetic with a dense mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peers.dense_mask import wraps_around
from torch import Tensor

from exaonepath.encoders.loading import load_slide_encoder
from exaonepath.reference.slide_encoder import sdpa_dense_mask
from exaonepath.reference.slide_encoder import slide_encoder as reference

from .clock import Timed, rounds_for, synchronize, time_once
from .memory import free_bytes, peak_mb
from .problems import PATCH, Problem
from .session import FAILURES, Session, check_device, reason
from .shares import time_shares
from .table import rounded

OURS, STREAMED = "exaonepath", "exaonepath_streamed"
CARD_GB = 12.0
_PREFIX = "slide_encoder.wsi_encoder.transformer."
# Slide embeddings of ours and of the dense mask in the same dtype differ by the roundings of six blocks: on the golden
# files either is 2e-2 (bf16) or 3e-6 (float32) of the norm away from float64.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}
_CPU_BYTES = 3 << 30
_SLOW_SECONDS = 10.0


@dataclass
class Slide:
    """A synthetic slide and the encoder that reads it, on one device."""

    problem: Problem
    training: bool
    compiled: bool = False
    checkpointing: bool = False

    def load(self) -> torch.nn.Module:
        """The published architecture with random weights."""
        backend = "triton" if self.problem.device == "cuda" else "sdpa"
        return load_slide_encoder("random:0", device=self.problem.device, attn_implementation=backend).model

    @cached_property
    def model(self) -> torch.nn.Module:
        model = self.load()
        if self.compiled:
            for block in model.transformer.blocks:
                block.compile()
        if self.checkpointing:
            model.gradient_checkpointing_enable()
            model.train()  # without it nothing is checkpointed
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        return model

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """`host_inputs` on the device."""
        return tuple(tensor.to(self.problem.device) for tensor in self.host_inputs)

    @cached_property
    def host_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features [1, N, 768], mask, coords, contour index, fragment after fragment as a file of patches has them."""
        n = self.problem.n
        generator = torch.Generator().manual_seed(self.problem.seed)
        features = torch.randn((1, n, 768), generator=generator)
        coords = torch.randint(0, 400, (1, n, 2), generator=generator) * PATCH
        contour = self.problem.segments().ids()[None].cpu()
        return features, torch.ones((1, n), dtype=torch.bool), coords, contour

    def ours(self) -> Tensor:
        return self._pass(lambda: self.model(*self.inputs)["slide_embedding"])

    def streamed(self) -> Tensor:
        """Features and embeddings stay in the host's memory."""
        limit = f"{CARD_GB:g}GB"
        return self._pass(lambda: self.model.encode_streamed(*self.host_inputs, max_memory=limit)["slide_embedding"])

    def dense(self) -> Tensor:
        """The published arithmetic on the same parameters; gradients go to them as well."""
        model = self.model
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in model.named_parameters()}
        config = {**model.config.wsi, "norm_eps": 1e-5, "periods": model.transformer.rope_embed()}
        config["periods"] = config["periods"].to(self.problem.device)
        return self._pass(
            lambda: reference(state, config, *self.inputs, dtype=torch.float32, attention=sdpa_dense_mask)[1]
        )

    def _pass(self, forward: Callable[[], Tensor]) -> Tensor:
        """One forward pass, or one training step (no dropout): forward, backward, AdamW."""
        half = self.problem.dtype == torch.bfloat16
        with (
            torch.set_grad_enabled(self.training),
            torch.autocast(self.problem.device, torch.bfloat16, enabled=half),
        ):
            out = forward()
        if self.training:
            out.square().mean().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return out.detach()

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        # A step of size 0 costs what a step costs, and leaves the weights comparable from one round to the next.
        return torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)


@dataclass
class _Variant:
    impl: str
    slide: Slide
    work: Callable[[], Tensor]
    inputs: str = "inputs"  # which of the slide's it reads
    limit: float | None = None
    checkpointing: bool = False
    why_not: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    timed: Timed | None = None


def hold(
    problem: Problem,
    training: bool,
    session: Session,
    benchmark: Any,
    *,
    compiled: bool = False,
    checkpointing: bool = False,
    budget: float,
) -> None:
    """Measure ours and the dense mask, one row each, and fail if ours could not run or was wrong.

    On a GPU ours runs inside 12 GB, also with features streamed from the host; the dense mask does too, and where that
    is too little for it, once more without a limit.
    """
    direction = "training step" if training else "forward"
    known = problem.describe()
    columns = {name: known[name] for name in ("device", "dtype", "n", "fragments", "spread")}
    session.skip_if_done("encoder", direction=direction, checkpointing=checkpointing, **columns)
    session.need_time()
    slide = Slide(problem, training, checkpointing=checkpointing)
    limit = CARD_GB if problem.device == "cuda" else None
    why_not = "left out by EXAONEPATH_BENCH_WITHOUT" if "dense_mask" in session.without else _too_large(problem)
    field_ = [
        _Variant(OURS, slide, slide.ours, limit=limit, checkpointing=checkpointing),
        _Variant("dense_mask", slide, slide.dense, limit=limit, why_not=why_not),
    ]
    if limit is not None:
        field_.append(_Variant("dense_mask", slide, slide.dense, why_not=why_not))
        if not training:
            # First, while the card holds no inputs yet.
            field_.insert(0, _Variant(STREAMED, slide, slide.streamed, inputs="host_inputs", limit=limit))
    if compiled:
        other = Slide(problem, training, compiled=True)
        field_.append(_Variant(OURS, other, other.ours, limit=limit))
    results: dict[int, Tensor] = {}
    for i, one in enumerate(field_):
        # Without the limit the dense mask repeats nothing that ran within it.
        before = field_[i - 1]
        if i and one.impl == before.impl == "dense_mask" and before.row["status"] == "ok":
            one.why_not = "fits the limit: measured with it"
        _prepare(one, results, i)
    _check(field_, results, problem)
    alive = [one for one in field_ if one.timed is not None]
    rounds = rounds_for(sum(one.row["estimate"] for one in alive), budget, most=10, least=2)
    _time_in_turns(alive, rounds, benchmark)
    run = session.new_run()
    kept = {name: value for name, value in known.items() if name not in ("heads", "head_dim")}
    for one in field_:
        session.record("encoder", {"run": run, "direction": direction, **kept, **_row(one, rounds)})
    ours = [one for one in field_ if one.impl != "dense_mask" and not one.slide.compiled]
    reasons = "; ".join(f"{one.impl}: {one.row['reason']}" for one in ours)
    # What the caller holds on the card may leave too little of 12 GB: then streaming has to do.
    assert any(one.row["status"] == "ok" for one in ours), reasons
    assert all(one.row["status"] != "wrong" for one in ours), reasons


def _too_large(problem: Problem) -> str | None:
    if reason := wraps_around(problem.n + 8, problem.device):
        return reason
    # The mask as bool and, since SDPA adds it, as a float; padded tokens and their activations come on top.
    needed = problem.n**2 * (1 + torch.finfo(problem.dtype).bits // 8)
    available = min(free_bytes(problem.device), _CPU_BYTES if problem.device == "cpu" else 1 << 62)
    return f"the mask alone takes {needed / 1e9:.1f} GB" if needed > available else None


@contextmanager
def _memory_limit(gigabytes: float | None) -> Iterator[None]:
    """As if the card were this large: what torch reserves beyond it is out of memory."""
    if gigabytes is None:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _prepare(one: _Variant, results: dict[int, Tensor], index: int) -> None:
    one.row = {"status": "ok", "reason": None, "estimate": 0.0}
    if one.why_not:
        one.row.update(status="not available", reason=one.why_not)
        return
    device = one.slide.problem.device
    try:
        with _memory_limit(one.limit):
            getattr(one.slide, one.inputs)  # made now, not inside the peak
            start = time.perf_counter()
            one.row["peak_mb"] = peak_mb(lambda: results.update({index: one.work()}), device, tidy=False)
            synchronize(device)
            one.row["first_call_s"] = rounded(time.perf_counter() - start)
            timed = Timed(one.impl, [lambda *_: one.work()])
            one.row["estimate"] = time_once(timed, 0, device, flush=False)
            timed.seconds.clear()
            if one.row["estimate"] < _SLOW_SECONDS:
                one.row["peak_mb"] = peak_mb(one.work, device)
            if device == "cuda":
                one.row["reserved_mb"] = round(torch.cuda.max_memory_reserved() / 1e6, 1)
            if one.impl != "dense_mask" and (device == "cuda" or not one.slide.training):
                one.row["shares"] = time_shares(one.work, device)
        one.timed = timed
    except FAILURES as exc:
        one.row.update(status="failed", reason=reason(exc))
        exc.__traceback__ = None
        check_device(one.impl)


def _check(field_: list[_Variant], results: dict[int, Tensor], problem: Problem) -> None:
    """Ours against the dense mask where that fits; against nothing but finiteness where it does not."""
    dense = next((results[i].cpu() for i, one in enumerate(field_) if one.impl == "dense_mask" and i in results), None)
    tolerance = _TOLERANCE[str(problem.dtype).removeprefix("torch.")]
    for i, one in enumerate(field_):
        if one.impl == "dense_mask" or one.row["status"] != "ok":
            continue
        if not bool(results[i].isfinite().all()):
            one.row.update(status="wrong", reason="the embedding is not finite")
            one.timed = None
        elif dense is not None:
            error = float((results[i].cpu() - dense).norm() / dense.norm())
            one.row["error_norm"] = rounded(error, 2)
            if not error <= tolerance:
                why = f"off by {error:.2g} of the dense mask's embedding, more than {tolerance:.2g}"
                one.row.update(status="wrong", reason=why)
                one.timed = None


def _time_in_turns(alive: list[_Variant], rounds: int, benchmark: Any) -> None:
    def time_one(one: _Variant) -> None:
        if one.row["status"] != "ok":
            return
        try:
            with _memory_limit(one.limit):
                time_once(one.timed, 0, one.slide.problem.device, flush=False)
        except FAILURES as exc:
            one.row.update(status="failed", reason=reason(exc))
            exc.__traceback__ = None
            check_device(one.impl)

    main = next((one for one in alive if one.impl == OURS), next(iter(alive), None))
    others = [one for one in alive if one is not main]
    benchmark.pedantic(
        lambda: None if main is None else time_one(main),
        setup=lambda: [time_one(one) for one in others] and None,
        rounds=rounds,
    )


def _row(one: _Variant, rounds: int) -> dict[str, Any]:
    names = ("first_call_s", "peak_mb", "reserved_mb", "error_norm", "shares")
    row = {
        "impl": one.impl,
        "compiled": one.slide.compiled,
        "checkpointing": one.checkpointing,
        "memory_limit_gb": one.limit,
        **{name: one.row.get(name) for name in names},
        "status": one.row["status"],
        "reason": one.row["reason"],
        **dict.fromkeys(("rounds", "ms", "ms_p20", "ms_p80")),
    }
    if row["status"] == "ok" and one.timed is not None:
        low, middle, high = (rounded(1e3 * t) for t in one.timed.quantiles())
        row.update(rounds=rounds, ms=middle, ms_p20=low, ms_p80=high)
    return row
