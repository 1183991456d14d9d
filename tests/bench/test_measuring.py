"""What the benchmarks rest on: problems from a seed, exact samples, and a contest where nobody fails in silence."""

import math
import time

import pytest
import torch
from harness import contest
from harness.clock import Timed, clock_name, rounds_for, time_once
from harness.exact import TOLERANCE, exact_sample
from harness.problems import SPREADS, Problem, fragment_lengths
from harness.session import Session
from peers import PEERS, Peer, flex, sdpa_loop
from peers.base import offsets

from exaonepath.ops.attention.fragment_attention import fragment_attention
from exaonepath.ops.attention.rotary import apply_rotation
from exaonepath.reference.fragment_attention import dense_fragment_attention


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("n", "fragments"), [(1, 1), (7, 7), (1000, 1), (1000, 37), (100_000, 5000)])
def test_fragment_lengths_add_up(n, fragments, spread):
    lengths = fragment_lengths(n, fragments, spread, seed=3)
    assert len(lengths) == fragments
    assert sum(lengths) == n
    assert min(lengths) >= 1
    assert lengths == fragment_lengths(n, fragments, spread, seed=3)


def test_spreads_are_as_skewed_as_they_say():
    longest = {spread: max(fragment_lengths(100_000, 1000, spread, seed=0)) for spread in SPREADS}
    assert longest["equal"] == 100
    assert longest["equal"] < longest["lognormal"] < longest["zipf"]
    # Zipf over 1,000 ranks: the first has 1 / H(1000) of the tokens.
    assert longest["zipf"] == pytest.approx(100_000 / sum(1 / i for i in range(1, 1001)), rel=0.02)


@pytest.mark.parametrize(("n", "fragments"), [(3, 4), (3, 0)])
def test_fragments_that_do_not_fit(n, fragments):
    with pytest.raises(ValueError, match="do not fit"):
        fragment_lengths(n, fragments, "equal", seed=0)


def test_inputs_follow_from_seed_and_number(problem):
    one, two = problem.inputs(0), problem.inputs(0)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], problem.inputs(1)[0])


def dense(problem, qkv, dout, rotated):
    """out, dq, dk, dv of the whole problem in float64, by autograd through the dense mask."""
    q, k, v = (x.double().requires_grad_() for x in qkv.unbind(1))
    a, b = q, k
    if rotated:
        a, b = (apply_rotation(x, *problem.rotation.cos_sin(torch.float64)) for x in (q, k))
    out = dense_fragment_attention(a, b, v, problem.segments().ids(), problem.head_dim**-0.5)
    gradients = torch.autograd.grad(out, (q, k, v), dout.double())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize("rotated", [False, True])
def test_exact_rows_are_those_of_the_dense_mask(problem, rotated, monkeypatch):
    monkeypatch.setattr("harness.exact._SCORES", 60)  # dk and dv from several pieces
    qkv, dout = problem.inputs(0)
    full = dense(problem, qkv, dout, rotated)
    sample = exact_sample(problem, qkv, dout, rotated=rotated)
    assert {length for length, _, _ in sample.fragments} == {27, 1, 12}
    # float64 against float64: a few roundings of 1e-16.
    assert max(sample.errors(full)) < 1e-13
    assert set(exact_sample(problem, qkv, None, rotated=rotated).fragments[0][2]) == {"out"}


def test_one_wrong_row_of_the_longest_fragment_shows(problem):
    qkv, dout = problem.inputs(0)
    sample = exact_sample(problem, qkv, dout, rotated=False)
    full = dense(problem, qkv, dout, False)
    _, rows, _ = next(part for part in sample.fragments if part[0] == 27)
    for name in full:
        wrong = {key: value.clone() for key, value in full.items()}
        wrong[name][rows[-1], sample.head] *= 2
        assert sample.errors(wrong)[0] > TOLERANCE[torch.bfloat16]
        wrong[name][rows[-1], sample.head] = math.nan
        assert sample.errors(wrong) == (math.inf, math.inf)


def test_ours_and_the_peers_of_this_machine_are_exact(problem):
    qkv, dout = problem.inputs(0)
    exact = exact_sample(problem, qkv, dout, rotated=False)
    served = []
    for peer in PEERS:
        if peer.name.startswith("flex") or peer.why_not(problem, True):
            continue
        leaves = [x.contiguous().requires_grad_() for x in qkv.unbind(1)]
        out = peer.build(problem)(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout)
        tensors = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))
        assert exact.errors(tensors)[0] <= TOLERANCE[torch.float32], peer.name
        served.append(peer.name)
    assert {"sdpa_loop", "dense_mask"} <= set(served)


def test_equal_fragments_go_as_one_batch():
    problem = Problem(24, 4, "equal", torch.float32, "cpu", heads=2, head_dim=8)
    qkv, _ = problem.inputs(0)
    out = sdpa_loop.PEERS[0].build(problem)(*(x.contiguous() for x in qkv.unbind(1)))
    assert exact_sample(problem, qkv, None, rotated=False).errors({"out": out})[0] <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("lengths", [[300], [128, 128], [1] * 40 + [500, 3, 129], [256, 1, 255, 128]])
def test_the_hand_built_block_mask_is_the_dense_one(lengths):
    problem = Problem(sum(lengths), len(lengths), "equal", torch.float32, "cpu")
    problem.__dict__["lengths"] = lengths
    mask = flex.block_mask(problem)
    ids = problem.segments().ids()
    pairs = ids[:, None] == ids
    blocks = -(-problem.n // flex.BLOCK)
    for row in range(blocks):
        rows = slice(row * flex.BLOCK, (row + 1) * flex.BLOCK)
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        some = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        assert len(set(full + some)) == len(full + some)
        for column in range(blocks):
            part = pairs[rows, column * flex.BLOCK : (column + 1) * flex.BLOCK]
            if column in full:
                assert part.all()
                assert part.numel() == flex.BLOCK**2
            elif column not in some:
                assert not part.any()


def test_every_peer_says_why_it_cannot(problem):
    reasons = {peer.name: peer.why_not(problem, True) for peer in PEERS}
    assert reasons["varlen_attn"] == reasons["cudnn_varlen"] == "CUDA only"
    assert "no backward" in reasons["flex"]
    assert reasons["dense_mask"] is None
    huge = Problem(1_000_000, 1, "equal", torch.float32, "cpu")
    assert "GB" in next(peer for peer in PEERS if peer.name == "dense_mask").why_not(huge, False)
    assert "index" in flex.PEER.why_not(Problem(10_000_000, 1, "equal", torch.float32, "cuda"), False)


def test_offsets_are_cumulative(problem):
    assert offsets(problem).tolist() == [0, 27, 28, 40]


def test_clock_keeps_steps_apart():
    timed = Timed("x", [lambda i, _: i + 1, lambda i, out: out + i])
    for i in range(3):
        time_once(timed, i, "cpu")
    timed.seconds[:] = [[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]]
    assert timed.quantiles(0)[1] == 2.0
    assert timed.quantiles()[1] == 22.0
    assert [rounds_for(s, 4.0) for s in (0.0, 0.5, 100.0)] == [20, 8, 3]


def test_processor_time_is_for_one_thread(monkeypatch):
    monkeypatch.setenv("EXAONEPATH_BENCH_CLOCK", "cpu")
    assert clock_name("cuda") == "events"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="OMP_NUM_THREADS=1"):
            clock_name("cpu")
        torch.set_num_threads(1)
        timed = Timed("sleeps", [lambda i, _: time.sleep(0.2)])
        # A sleep takes no processor time; how long the wall clock says it took does not enter.
        assert time_once(timed, 0, "cpu") < 0.1
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("EXAONEPATH_BENCH_CLOCK", "sun")
    with pytest.raises(ValueError, match="wall or cpu"):
        clock_name("cpu")


def broken(q, k, v):
    raise RuntimeError("unsupported here\nand a long story")


def peer(name, attend):
    return Peer(name, lambda problem, backward: None, lambda problem: attend)


@pytest.mark.parametrize("backward", [False, True])
def test_nobody_fails_in_silence(problem, session, monkeypatch, backward, fake_benchmark):
    monkeypatch.setattr(contest, "separate_rotation", lambda problem: lambda q, k: (q * 1, k * 1))
    monkeypatch.setattr(contest, "PEERS", (peer("fails", broken), peer("lies", lambda q, k, v: q + k + v), *PEERS))
    session.without = {"sdpa_loop"}
    contest.hold(problem, backward, session, fake_benchmark, budget=0.01)
    rows = [row for _, row in session.rows]
    by = {(row["impl"], row["rotation"], row["direction"]): row for row in rows}
    whole = "forward+backward" if backward else "forward"
    assert by["fails", "none", whole]["reason"] == "RuntimeError: unsupported here"
    assert by["lies", "none", whole]["status"] == "wrong"
    assert by["lies", "none", whole]["ms"] is None
    assert by["lies", "none", whole]["error_norm"] > 0.1
    # A rotation that does not rotate is found out.
    assert by["dense_mask", "separate", whole]["status"] == "wrong"
    assert "WITHOUT" in by["sdpa_loop", "none", whole]["reason"]
    assert by["varlen_attn", "none", whole]["status"] == "not available"
    for rotation in ("none", "own"):
        assert by["exaonepath", rotation, whole]["status"] == "ok"
        assert ("exaonepath", rotation, "backward") in by or not backward
    assert len({row["run"] for row in rows}) == 1


def test_ours_being_wrong_fails_and_prints_no_speed(problem, session, monkeypatch, fake_benchmark):
    monkeypatch.setattr(contest, "PEERS", ())
    monkeypatch.setattr(contest, "fragment_attention", lambda *a, **k: fragment_attention(*a, **k) * 1.01)
    with pytest.raises(AssertionError, match="exact result's norm"):
        contest.hold(problem, False, session, fake_benchmark, budget=0.01)
    assert [row["ms"] for _, row in session.rows] == [None, None]


def test_a_session_resumes_and_ends(problem, session, monkeypatch, tmp_path, fake_benchmark):
    monkeypatch.setattr(contest, "PEERS", ())
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("EXAONEPATH_BENCH_SAVE", "1")
    monkeypatch.setenv("EXAONEPATH_BENCH_RESUME", "1")
    contest.hold(problem, False, Session(), fake_benchmark, budget=0.01)
    with pytest.raises(pytest.skip.Exception, match="already measured"):
        contest.hold(problem, False, Session(), fake_benchmark, budget=0.01)
    monkeypatch.setenv("EXAONEPATH_BENCH_SECONDS", "-1")
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        contest.hold(problem, True, Session(), fake_benchmark, budget=0.01)
