"""The kernels compiled ahead of time for cards that are not here, held against the committed table.

By default the launches of a RoPE block of the published encoder (head dimension 64, bfloat16) on all six
architectures, in processes of their own; EXAONEPATH_COMPILE=full compiles every row of the table.
"""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compile_ahead
import pytest

pytest.importorskip("triton")

SCRIPT = Path(compile_ahead.__file__)

# Largest shared memory of one program (CUDA programming guide, technical specifications).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def figures(row):
    return dict(zip(compile_ahead.COLUMNS, row, strict=True))


def table():
    return json.loads(compile_ahead.TABLE.read_text())


def hold_to_the_card(key, row, *, spills=True):
    """What must be so under any version of triton; spills are up to its assembler and scheduler."""
    architecture, dtype, _, launch = key.split(" ", 3)
    seen = figures(row)
    assert seen["shared"] <= SHARED_BYTES[int(architecture.removeprefix("sm_"))], key
    assert seen["registers"] <= 255, key
    # A few addresses that wait on the stack for the epilogue cost nothing; what a loop moves there costs every turn.
    assert not spills or seen["spills_in_loops"] == 0, f"{key} spills inside a loop"
    assert not spills or seen["stack"] <= 128, f"{key} spills {seen['stack']} bytes a thread"
    if launch == "rotate":
        return
    assert seen["warp_mma"] + seen["warpgroup_mma"] > 0, key
    if architecture in ("sm_90", "sm_100") and dtype != "fp32":
        assert seen["warp_mma"] == 0, f"{key} runs on the matrix instructions of older cards"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of this triton by key, and its versions; two processes at a time."""
    full = os.environ.get("EXAONEPATH_COMPILE") == "full"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(architecture):
        launches = ["*"] if full else [f"bf16 64 {launch}" for launch in ("*turning", "*training", "rotate")]
        return subprocess.run(
            [sys.executable, str(SCRIPT), *(f"sm_{architecture} {launch}" for launch in launches)],
            capture_output=True,
            text=True,
            cwd=tmp_path_factory.mktemp("compile"),
            env=environment,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(SHARED_BYTES, pool.map(run, SHARED_BYTES), strict=True))
    for done in runs.values():
        assert done.returncode == 0, done.stderr
    return {architecture: json.loads(done.stdout) for architecture, done in runs.items()}


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_kernels_fit_the_card_and_have_not_grown(architecture, measured):
    found, committed = measured[architecture], table()
    assert found["rows"]
    for key, row in found["rows"].items():
        same = found["versions"] == committed["versions"]
        hold_to_the_card(key, row, spills=same)
        if same:
            assert figures(row) == figures(committed["rows"][key]), (
                f"{key} compiles differently; if that is meant: python {SCRIPT.name} --write"
            )


def test_the_table_holds_every_launch_on_every_card_and_all_are_sound():
    committed = table()
    assert committed["columns"] == list(compile_ahead.COLUMNS)
    assert list(committed["rows"]) == compile_ahead.keys()
    for key, row in committed["rows"].items():
        hold_to_the_card(key, row)


def test_every_kernel_is_compiled_ahead():
    folder = Path(__file__).parents[3] / "kernels"
    written = {
        (file.stem, node.name)
        for file in folder.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written == {launch[:2] for launch in compile_ahead.LAUNCHES.values()}
