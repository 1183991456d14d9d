"""The page of verdicts: what is met, what is not, and what nobody measured."""

import json

import pytest
import targets


@pytest.mark.parametrize(
    ("limit", "at_least", "measured", "verdict"),
    [(420, True, 420.0, "green"), (420, True, 419.9, "RED"), (1.0, False, 1.0, "green"), (1.0, False, 1.1, "RED")],
)
def test_a_limit_holds_in_its_direction(limit, at_least, measured, verdict):
    assert targets.Target("t", limit, at_least, "", measured).verdict == verdict
    assert targets.Target("t", limit, at_least, "", None).verdict == "unmeasured"


def attention(measured, **changes):
    return measured(device="cuda", dtype="bfloat16", gpu="a card", heads=12, head_dim=64, **changes)


def by_name(found):
    return {target.name: target for target in found}


def test_ours_is_compared_with_a_peer_of_the_same_run(measured):
    problem = {"n": 100_000, "fragments": 1_000, "spread": "lognormal", "direction": "forward"}
    ours = attention(measured, impl="exaonepath", rotation="none", run="a", ms=2.0, ms_p20=2.0, ms_p80=2.0, **problem)
    peer = {"impl": "varlen_attn", "rotation": "none", **problem}
    slow = attention(measured, run="a", ms=5.0, ms_p20=5.0, ms_p80=5.0, **peer)
    other_run = attention(measured, run="b", ms=1.0, ms_p20=1.0, ms_p80=1.0, **peer)
    found = by_name(targets.attention_targets([ours, slow, other_run]))
    target = found["speed over varlen_attn, forward, 1,000 skewed fragments"]
    assert (target.measured, target.verdict) == (2.5, "green")
    assert found["backward, 16k, one segment, deterministic"].verdict == "unmeasured"


def test_fragments_on_the_cpu_are_compared_with_a_rotated_peer_of_the_same_run(measured):
    problem = {"n": 4_000, "fragments": 64, "spread": "lognormal", "direction": "forward"}
    rows = [
        measured(
            device="cpu", dtype="float32", impl=impl, rotation=rotation, run=run, ms=ms, ms_p20=ms, ms_p80=ms, **problem
        )
        for impl, rotation, run, ms in (
            ("exaonepath", "own", "a", 9.0),
            ("exaonepath", "own", "b", 2.0),
            ("sdpa_loop", "separate", "a", 1.0),
            ("sdpa_loop", "none", "b", 1.0),
            ("sdpa_loop", "separate", "b", 3.0),
        )
    ]
    found = by_name(targets.attention_targets(rows))
    name = "on the CPU, 64 lognormal fragments, speed over SDPA, both with rotation, forward"
    assert (found[name].measured, found[name].verdict) == (1.5, "green")
    assert found[name.replace("lognormal", "equal")].verdict == "unmeasured"


def test_rows_of_a_cpu_and_failed_rows_answer_nothing(measured):
    problem = {"n": 16_384, "fragments": 1, "spread": "equal", "direction": "backward", "impl": "exaonepath"}
    rows = [
        measured(device="cpu", dtype="bfloat16", rotation="none", tflops=900.0, **problem),
        attention(measured, rotation="none", status="failed", reason="why", ms=None, tflops=900.0, **problem),
    ]
    found = by_name(targets.attention_targets(rows))
    assert found["backward, 16k, one segment, deterministic"].verdict == "unmeasured"


def test_the_newest_measurement_of_reading_counts():
    rows = [{"group": "reader JPEG 256 px", "ratio": ratio, "of_raw": 1.5} for ratio in (1.0, 3.0)]
    rows.append({"group": "reader JPEG 256 px, 2 threads against 1", "ratio": 1.5})
    found = by_name(targets.reader_targets(rows))
    assert found["reading 256 px, one thread, speed over OpenSlide"].verdict == "green"
    assert found["reading 256 px, time over decoding each tile once"].verdict == "green"
    assert found["reading 256 px, 2 threads over 1"].verdict == "RED"
    assert found["reading 506 px, one thread, speed over OpenSlide"].verdict == "unmeasured"


def test_the_last_outcome_of_a_test_counts(tmp_path):
    rows = [{"test": "a", "outcome": "failed"}, {"test": "b", "outcome": "passed"}, {"test": "a", "outcome": "passed"}]
    (tmp_path / "tests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (target,) = targets.correctness([tmp_path])
    assert (target.name, target.measured) == ("tests that fail, of 2", 0.0)


def test_a_page_without_measurements_says_so(tmp_path):
    lines = list(targets.page([tmp_path]))
    assert lines[0].startswith("# Targets: 0 green, 0 RED, ")
    assert not any("green" in line or "RED" in line for line in lines[1:])
