"""The kernels compiled ahead of time for GPUs that are not present, and compared with the table of this triton.

By default the launches of a RoPE block of the published encoder (head dimension 64, bfloat16), in processes of their
own; EXAONEPATH_COMPILE=full compiles every row of the table. The tables of the other versions are only read: they are
written by `compile_ahead.py --write --triton`.
"""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compile_ahead
import machine_code
import pytest

pytest.importorskip("triton")

SCRIPT = Path(compile_ahead.__file__)
# Those that users get with torch 2.11, and with 2.12.1 and 2.13; and the one of CI.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")

# Limits of a multiprocessor (CUDA programming guide, technical specifications): shared memory of one program and of
# all, threads. There are 65,536 registers on each.
SHARED_OF_ONE = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_OF_ALL = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
THREADS = {80: 2048, 86: 1536, 90: 2048, 100: 2048, 120: 1536}


def table(version):
    return json.loads(compile_ahead.table_path(version).read_text())


def kernel_of(row):
    return dict(zip(compile_ahead.KERNEL, row[0], strict=True))


def loops_of(row):
    return [dict(zip(compile_ahead.LOOP, loop, strict=True)) for loop in row[1:]]


def programs(key, row):
    """How many programs of this launch fit a multiprocessor; registers are given to a warp in units of 256."""
    architecture, (launch, _), seen = compile_ahead.parse(key)[0], compile_ahead.settings(key), kernel_of(row)
    registers = -(-seen["registers"] // 8) * 8 * 32 * launch.num_warps
    shared = seen["shared"] + 1024  # the system's share of each program
    return min(
        65_536 // registers, SHARED_OF_ALL[architecture] // shared, THREADS[architecture] // 32 // launch.num_warps
    )


def hold_to_the_card(key, row, version):
    """What must be so under this version of triton. The loops are: without masks, with masks, careful."""
    architecture, dtype, dim, launch = compile_ahead.parse(key)
    seen, loops = kernel_of(row), loops_of(row)
    assert seen["shared"] <= SHARED_OF_ONE[architecture], key
    assert seen["registers"] <= 255, key
    # A few addresses that wait on the stack for the end of the kernel cost nothing.
    assert seen["stack"] <= 128, f"{key} spills {seen['stack']} bytes a thread"
    if launch == "rotate":
        assert not loops
        return
    assert len(loops) == 3, key
    warpgroup = architecture in (90, 100) and dtype != "fp32"
    for loop in loops:
        assert loop["warp_mma"] + loop["warpgroup_mma"] > 0, key
        # float32 on sm_90 runs on two warps, which was faster on a GPU in spite of a few spills (docs/triton.md).
        spills = loop["instructions"] // 100 if dtype == "fp32" and architecture == 90 else 0
        assert loop["local"] <= spills, f"{key} spills inside a loop"
        assert loop["small_copies"] <= 2, f"{key} copies lse and delta by four bytes"
        if warpgroup:
            assert loop["warp_mma"] == 0, f"{key} runs on the matrix instructions of older GPUs"
        # What other instructions wrote to shared memory is fenced before matrix units read it on their own. Triton
        # before 3.7.1 does so for stores, but not for copies.
        copies = loop["copies"] > loop["small_copies"] and version >= (3, 7, 1)
        if loop["warpgroup_mma"] and (copies or (loop["stores"] and not loop["copies"])):
            assert loop["fences"] > 0, f"{key} lacks a fence"
    assert (loops[0]["tma"] > 0) == compile_ahead.settings(key)[0].descriptors, key
    if launch == "forward turning":
        # The rotated query tile is stored, a barrier follows, and then the whole tile is loaded.
        row_of = compile_ahead.settings(key)[0]
        tile = row_of.block_m * dim * (4 if dtype == "fp32" else 2)
        assert seen["reloads"] * 16 * 32 * row_of.num_warps >= tile, f"{key} does not reload its queries"
    if architecture == 90 and dtype != "fp32" and dim == 64 and launch.startswith("forward"):
        assert programs(key, row) >= 2, f"{key}: one program leaves the exponential unit idle during its products"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of this triton by key, and its versions; two processes at a time."""
    full = os.environ.get("EXAONEPATH_COMPILE") == "full"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    patterns = {architecture: [f"sm_{architecture} bf16 64 *turning"] for architecture in SHARED_OF_ONE}
    patterns[90] += ["sm_90 bf16 64 *training", "sm_90 bf16 64 rotate"]
    if full:
        patterns = {architecture: [f"sm_{architecture} *"] for architecture in SHARED_OF_ONE}

    def run(architecture):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *patterns[architecture]],
            capture_output=True,
            text=True,
            cwd=tmp_path_factory.mktemp("compile"),
            env=environment,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(run, patterns))
    for done in runs:
        assert done.returncode == 0, done.stderr
    found = [json.loads(done.stdout) for done in runs]
    return found[0]["versions"], {key: row for part in found for key, row in part["rows"].items()}


def test_kernels_fit_the_card_and_have_not_grown(measured):
    versions, rows = measured
    if versions["triton"] not in VERSIONS:
        pytest.skip(f"no table for triton {versions['triton']}; {SCRIPT.name} --write makes one, if users get it")
    committed = table(versions["triton"])
    assert rows
    for key, row in rows.items():
        hold_to_the_card(key, row, _numbers(versions["triton"]))
        if versions == committed["versions"]:
            assert row == committed["rows"][key], (
                f"{key} compiles differently; if that is meant, write its row for every version:\n"
                f"  pip install --no-deps --target /tmp/triton-3.6.0 triton==3.6.0; ...\n"
                f"  python {SCRIPT.name} --write {key!r}\n"
                f"  python {SCRIPT.name} --write {key!r} --triton /tmp/triton-3.6.0"
            )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_holds_every_launch_on_every_card_and_all_are_sound(version):
    committed = table(version)
    assert committed["versions"]["triton"] == version
    assert (committed["kernel"], committed["loop"]) == (list(compile_ahead.KERNEL), list(compile_ahead.LOOP))
    assert list(committed["rows"]) == compile_ahead.keys()
    for key, row in committed["rows"].items():
        hold_to_the_card(key, row, _numbers(version))


def test_every_kernel_is_compiled_ahead():
    folder = Path(__file__).parents[3] / "kernels"
    written = {
        (file.stem, node.name)
        for file in folder.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written == {launch[:2] for launch in compile_ahead.LAUNCHES.values()}


def test_only_what_was_loaded_is_transposed():
    """The transpose of a product, stored to shared memory, is wrong on Hopper with triton 3.4 to 3.7.0."""
    folder = Path(__file__).parents[3] / "kernels"
    loaded, transposed = set(), set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("load_"):
                loaded |= {ast.unparse(target) for target in node.targets}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.trans":
                transposed.add(ast.unparse(node.args[0]))
    assert transposed
    assert transposed <= loaded


def test_loops_are_found_by_their_jumps_and_not_by_their_addresses():
    """The second loop waits in a small loop behind the end of the kernel, and comes back from there."""
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0030*/                   LDGSTS.E [R2], [R4.64] ;
        /*0040*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0060*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0080*/                   NOP ;
        /*0090*/              @P1  BRA `(.L_x_1) ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00d0*/              @!P0 BRA `(.L_x_4) ;
        /*00e0*/                   BRA `(.L_x_2) ;
"""
    first, second = machine_code.matrix_loops(machine_code.instructions(text))
    assert [i.operation for i in first] == ["HMMA", "LDGSTS", "LDGSTS", "BRA"]
    assert (machine_code.count(first, "LDGSTS"), machine_code.small_copies(first)) == (2, 1)
    assert [i.operation for i in second] == ["SYNCS", "BRA", "HGMMA", "BRA", "SYNCS", "BRA", "BRA"]


def _numbers(version):
    return tuple(int(number) for number in version.split("."))
