"""One attention problem, computed by ours and by every peer: checked, then timed in turns, one row each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peers import PEERS, Peer
from peers.rotation import separate_rotation
from torch import Tensor

from exaonepath.ops.attention.fragment_attention import fragment_attention

from .clock import Timed, host_clock, rounds_for, synchronize, time_once
from .exact import TOLERANCE, Sample, exact_sample
from .memory import peak_mb
from .problems import Problem
from .session import FAILURES, Session, check_device, reason
from .table import rounded

OURS = "exaonepath"
AUTO = "exaonepath_auto"  # what runs by default: for one long segment that can be another library's kernel
# Who may win on a GPU, and needs no compilation.
STRONGEST = ("varlen_attn", "sdpa_cudnn", "sdpa_flash", "flash3")
# Whatever takes longer is not repeated for side figures (peak memory of its own, building the schedule).
_SLOW_SECONDS = 2.0

Call = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class Candidate:
    """A way to compute the problem: `build` is paid once a batch, the call it returns once a layer."""

    impl: str
    rotation: str  # "none", "own" (inside the operation) or "separate" (a pass before it)
    packed: bool
    build: Callable[[], Call]
    why_not: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    timed: Timed | None = None


class Inputs:
    """A few sets of inputs, packed for ours and separate for the peers, so that no candidate needs a copy."""

    def __init__(self, problem: Problem, sets: int, backward: bool) -> None:
        made = [problem.inputs(i) for i in range(sets)]
        self.packed = [[qkv.requires_grad_(backward)] for qkv, _ in made]
        self.apart = [[x.contiguous().requires_grad_(backward) for x in qkv.detach().unbind(1)] for qkv, _ in made]
        self.dout = [dout for _, dout in made]


def candidates(problem: Problem, backward: bool, session: Session, only: Sequence[str] = ()) -> list[Candidate]:
    """Ours without and with rotation, then the peers, each without and with a separate rotation.

    `only` names the candidates if a problem is too large for all of them.
    """
    kernels = "triton" if problem.device == "cuda" else "sdpa"
    found = [
        Candidate(OURS, "none", True, lambda: _ours(problem, rotated=False, backend=kernels)),
        Candidate(OURS, "own", True, lambda: _ours(problem, rotated=True, backend=kernels)),
    ]
    if problem.device == "cuda" and problem.fragments == 1:
        found.append(Candidate(AUTO, "none", True, lambda: _ours(problem, rotated=False, backend="auto")))
    for peer in PEERS:
        if only and peer.name not in only:
            continue
        left_out = "left out by EXAONEPATH_BENCH_WITHOUT" if peer.name in session.without else None
        if peer.name.startswith("flex") and problem.device == "cpu" and not session.full:
            left_out = "compiles for long: EXAONEPATH_BENCH=full runs it"
        if session.short and peer.name not in STRONGEST:
            left_out = "left out by EXAONEPATH_BENCH=short"
        why_not = left_out or peer.why_not(problem, backward)
        rotations = ("none",) if only or why_not or session.short else ("none", "separate")
        for rotation in rotations:
            build = partial(_theirs, peer, problem, rotation == "separate")
            found.append(Candidate(peer.name, rotation, False, build, why_not))
    return found


def hold(
    problem: Problem, backward: bool, session: Session, benchmark: Any, *, only: Sequence[str] = (), budget: float
) -> None:
    """Measure all candidates, record one row each, and fail if ours could not run or was wrong.

    Args:
        benchmark: pytest-benchmark's fixture; what it times is ours with rotation, the peers run between its rounds.
        budget: seconds for the repetitions of all candidates together.
    """
    direction = "forward+backward" if backward else "forward"
    known = problem.describe()
    session.skip_if_done(
        "attention", direction=direction, **{k: known[k] for k in ("device", "dtype", "n", "fragments", "spread")}
    )
    session.need_time()
    inputs = Inputs(problem, 2 if problem.n > 200_000 else 3, backward)
    exact = {
        rotated: exact_sample(
            problem, inputs.packed[0][0].detach(), inputs.dout[0] if backward else None, rotated=rotated
        )
        for rotated in (False, True)
    }
    field_ = candidates(problem, backward, session, only)
    alive = [one for one in field_ if _prepare(one, problem, inputs, exact, backward)]
    estimate = sum(one.row["estimate"] for one in alive)
    rounds = rounds_for(estimate, budget / 4 if session.short else budget)
    _time_in_turns(alive, problem.device, rounds, len(inputs.dout), benchmark)
    run = session.new_run()
    for one in field_:
        for row in _rows(one, problem, direction, rounds):
            session.record("attention", {"run": run, **known, **row})
    ours = [one for one in field_ if one.impl == OURS and one.row["status"] != "ok"]
    assert not ours, "; ".join(f"{one.impl}, rotation {one.rotation}: {one.row['reason']}" for one in ours)


def _ours(problem: Problem, rotated: bool, backend: str) -> Call:
    segments, rotation = problem.segments(), problem.rotation if rotated else None
    return lambda leaves: fragment_attention(leaves[0], segments, rotation, backend=backend)


def _theirs(peer: Peer, problem: Problem, rotated: bool) -> Call:
    attend = peer.build(problem)
    if not rotated:
        return lambda leaves: attend(*leaves)
    rotate = separate_rotation(problem)
    return lambda leaves: attend(*rotate(leaves[0], leaves[1]), leaves[2])


def _steps(call: Call, one: Candidate, inputs: Inputs, backward: bool) -> list[Callable[..., object]]:
    leaves = inputs.packed if one.packed else inputs.apart

    def forward(index: int, _: object) -> Tensor:
        with torch.set_grad_enabled(backward):
            return call(leaves[index])

    def gradients(index: int, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves[index], inputs.dout[index])

    return [forward, gradients] if backward else [forward]


def _prepare(one: Candidate, problem: Problem, inputs: Inputs, exact: dict[bool, Sample], backward: bool) -> bool:
    """First call, check, peak memory, building time; whether the candidate may be timed."""
    one.row = {"status": "ok", "reason": None, "estimate": 0.0}
    if one.why_not:
        one.row.update(status="not available", reason=one.why_not)
        return False
    device = problem.device
    try:
        start = time.perf_counter()
        steps = _steps(one.build(), one, inputs, backward)
        results: list[list[Any]] = []
        peak = peak_mb(lambda: results.append(_run(steps, 0)), device, tidy=False)
        synchronize(device)
        one.row["first_call_s"] = rounded(time.perf_counter() - start)
        error_norm, error_max = exact[one.rotation != "none"].errors(_named(one, results.pop()))
        one.row.update(error_norm=rounded(error_norm, 2), error_max=rounded(error_max, 2))
        tolerance = TOLERANCE[problem.dtype]
        if not error_norm <= tolerance:
            why = f"off by {error_norm:.2g} of the exact result's norm, more than {tolerance:.2g}"
            one.row.update(status="wrong", reason=why)
            return False
        one.timed = Timed(f"{one.impl} {one.rotation}", steps)
        one.row["estimate"] = time_once(one.timed, 0, device)
        one.timed.seconds.clear()
        if one.row["estimate"] < _SLOW_SECONDS:
            peak = peak_mb(lambda: _run(steps, 0), device)
            with suppress(torch.OutOfMemoryError):  # a second mask may not fit into memory: then there is no figure
                one.row["build_ms"] = _build_ms(one, inputs, backward, device)
        one.row["peak_mb"] = peak
    except FAILURES as exc:
        one.timed = None
        one.row.update(status="failed", reason=reason(exc))
        exc.__traceback__ = None  # frames hold the tensors of what failed
        check_device(one.impl)
        return False
    return True


def _run(steps: Sequence[Callable[..., object]], index: int) -> list[object]:
    results: list[object] = []
    for step in steps:
        results.append(step(index, results[-1] if results else None))
    return results


def _named(one: Candidate, results: list[Any]) -> dict[str, Tensor]:
    tensors = {"out": results[0].detach()}
    if len(results) == 2:
        gradients = results[1][0].unbind(1) if one.packed else results[1]
        tensors.update(zip(("dq", "dk", "dv"), gradients, strict=True))
    return tensors


def _build_ms(one: Candidate, inputs: Inputs, backward: bool, device: str) -> float | None:
    """What a new batch pays before its first layer: build and first call, less a later call; all is compiled by now."""

    now = host_clock(device)

    def seconds(steps: Sequence[Callable[..., object]] | None) -> float:
        synchronize(device)
        start = now()
        _run(steps or _steps(one.build(), one, inputs, backward), 0)
        synchronize(device)
        return now() - start

    assert one.timed is not None
    seconds(None)
    extra = min(seconds(None) - seconds(one.timed.steps) for _ in range(2))
    return rounded(max(0.0, extra) * 1e3, 3)


def _time_in_turns(alive: list[Candidate], device: str, rounds: int, sets: int, benchmark: Any) -> None:
    main = next((one for one in alive if one.impl == OURS and one.rotation == "own"), None)
    others = [one for one in alive if one is not main]
    repetition = 0

    def time_one(one: Candidate) -> None:
        if one.row["status"] != "ok":
            return
        try:
            time_once(one.timed, repetition % sets, device)
        except FAILURES as exc:
            one.row.update(status="failed", reason=reason(exc))
            exc.__traceback__ = None
            check_device(one.impl)

    def time_others() -> None:
        nonlocal repetition
        repetition += 1
        for offset in range(len(others)):
            time_one(others[(repetition + offset) % len(others)])

    benchmark.pedantic(lambda: None if main is None else time_one(main), setup=time_others, rounds=rounds)


def _rows(one: Candidate, problem: Problem, direction: str, rounds: int) -> list[dict[str, Any]]:
    columns = ("first_call_s", "peak_mb", "build_ms", "error_norm", "error_max")
    shared = {"impl": one.impl, "rotation": one.rotation, **{name: one.row.get(name) for name in columns}}
    shared.update(status=one.row["status"], reason=one.row["reason"])
    if shared["status"] != "ok" or one.timed is None:
        empty = dict.fromkeys(("rounds", "ms", "ms_p20", "ms_p80", "tflops"))
        return [{**shared, **empty, "direction": direction}]
    forward, backward = problem.operations(False), problem.operations(True)
    kinds: list[tuple[str, int | None, int]] = [(direction, None, forward)]
    if direction != "forward":
        kinds = [(direction, None, forward + backward), ("backward", 1, backward)]
    rows = []
    for kind, step, operations in kinds:
        low, middle, high = (rounded(1e3 * t) for t in one.timed.quantiles(step))
        figures = {"ms": middle, "ms_p20": low, "ms_p80": high, "tflops": rounded(operations / middle / 1e9)}
        rows.append({**shared, **figures, "rounds": rounds, "direction": kind})
    return rows
