"""Compiles every kernel launch for GPUs that are not present, and reports what the assembler made of it.

    python tests/ops/attention/compile_ahead.py "sm_90 bf16 64 *"            those whose key matches, as JSON on stdout
    python tests/ops/attention/compile_ahead.py --write                      all, into the table of this triton
    python tests/ops/attention/compile_ahead.py --write "sm_90 bf16 64 *"    only these rows of the table
    python tests/ops/attention/compile_ahead.py --write --triton DIR ...     the tables of other versions, unpacked by
        pip install --no-deps --target DIR triton==3.6.0

There is one table per version of triton, since their machine code differs. Not a test: `test_triton_compile.py` runs it
in a separate process, because the tests' own processes run Triton as an interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import machine_code

TABLES = Path(__file__).with_name("kernel_resources")
# Of a kernel: bytes of shared memory, registers of a thread, bytes of its stack (where spilled registers go),
# instructions, and `loads_after_the_barrier`. Of each of its loops with matrix products: instructions, matrix products
# of a warp and of a warp group, asynchronous copies to shared memory, those of four bytes, other stores to shared
# memory, fences, loads by the copy engine (TMA), and accesses to the stack.
KERNEL = ("shared", "registers", "stack", "instructions", "reloads")
LOOP = ("instructions", "warp_mma", "warpgroup_mma", "copies", "small_copies", "stores", "fences", "tma", "local")
# Triton treats sm_89 as sm_86, and its settings are the same.
ARCHITECTURES = (80, 86, 90, 100, 120)
# fp16 differs from bf16 in the names of its instructions; the head dimension of the published encoder covers it.
TYPES = (("bf16", 64), ("bf16", 32), ("bf16", 128), ("fp16", 64), ("fp32", 64), ("fp32", 32), ("fp32", 128))
# Every way a kernel is launched: module, kernel, its settings' name, and the flags that differ between launches.
LAUNCHES = {
    "forward": ("fragment_attention", "forward_kernel", "forward", {"ROTATE_Q": False, "STORE_LSE": False}),
    "forward turning": ("fragment_attention", "forward_kernel", "forward", {"ROTATE_Q": True, "STORE_LSE": False}),
    "forward training": ("fragment_attention", "forward_kernel", "forward", {"ROTATE_Q": False, "STORE_LSE": True}),
    "queries' gradient": (
        "fragment_attention_backward", "query_gradient_kernel", "query_gradient", {"ROTATE_BACK": False}
    ),
    "queries' gradient turning": (
        "fragment_attention_backward", "query_gradient_kernel", "query_gradient", {"ROTATE_BACK": True}
    ),
    "keys' gradient": ("fragment_attention_backward", "key_gradient_kernel", "key_gradient", {"ROTATE_BACK": False}),
    "keys' gradient turning": (
        "fragment_attention_backward", "key_gradient_kernel", "key_gradient", {"ROTATE_BACK": True}
    ),
    "rotate": ("rotate", "rotate_kernel", None, {}),
}  # fmt: skip
_POINTERS = {"p_lse": "*fp32", "p_delta": "*fp32", "p_cos": "*fp32", "p_sin": "*fp32"}
_POINTERS |= {"p_bounds": "*i32", "p_tiles": "*i32"}
Row = list[list[int]]  # KERNEL, then LOOP for each loop


def keys() -> list[str]:
    """The name of every row of a table: architecture, dtype, head dimension, launch.

    All launches for the published encoder's blocks; for others those that rotate or train, which do everything that the
    remaining ones do.
    """
    return [
        f"sm_{architecture} {dtype} {dim} {launch}"
        for architecture in ARCHITECTURES
        for dtype, dim in TYPES
        for launch in LAUNCHES
        if (dtype, dim) == TYPES[0] or launch.endswith(("turning", "training"))
    ]


def parse(key: str) -> tuple[int, str, int, str]:
    """Architecture, dtype, head dimension and launch of a row."""
    architecture, dtype, dim, launch = key.split(" ", 3)
    return int(architecture.removeprefix("sm_")), dtype, int(dim), launch


def settings(key: str) -> tuple[Any, str]:
    """The launch settings of a row, or None for the rotation; and the precision of float32 products."""
    from exaonepath.kernels.launch_config import attention_config

    architecture, dtype, dim, launch = parse(key)
    config = attention_config(divmod(architecture, 10), 4 if dtype == "fp32" else 2, dim)
    row = getattr(config, LAUNCHES[launch][2]) if LAUNCHES[launch][2] else None
    return row, config.precision


def versions() -> dict[str, str]:
    """Of triton and of the two assemblers it brings: what the figures depend on."""
    import triton

    found = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell"):
        if (_tools() / tool).exists():
            report = subprocess.run([_tools() / tool, "--version"], capture_output=True, text=True, check=True).stdout
            found[tool] = re.search(r"V([\d.]+)", report)[1]
    return found


def table_path(triton_version: str) -> Path:
    return TABLES / f"triton-{triton_version}.json"


def measure(key: str) -> Row:
    """Compile the launch of this name and read KERNEL and LOOP from its machine code."""
    compiled = _compile(key)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([_tools() / tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout
            for tool, arguments in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = machine_code.instructions(text)
    count = machine_code.count
    loops = [
        [
            len(loop),
            count(loop, *machine_code.WARP_MMA),
            count(loop, *machine_code.WARPGROUP_MMA),
            count(loop, "LDGSTS"),
            machine_code.small_copies(loop),
            count(loop, "STS", "STSM"),
            count(loop, "FENCE"),
            count(loop, "UTMALDG"),
            count(loop, "LDL", "STL"),
        ]
        for loop in machine_code.matrix_loops(code)
    ]
    reloads = machine_code.loads_after_the_barrier(code) if "forward turning" in key else 0
    return [[compiled.metadata.shared, registers, stack, len(code), reloads], *loops]


def _compile(key: str) -> Any:
    """The kernel of this row as triton compiles it at its launch."""
    import triton
    from exaonepath.kernels.launch_config import ROTATE
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    architecture, dtype, dim, launch = parse(key)
    module, name, kind_of_settings, flags = LAUNCHES[launch]
    kernel = getattr(importlib.import_module(f"exaonepath.kernels.{module}"), name)
    constants = {"D": dim, **flags}
    row, precision = settings(key)
    block = 0
    if row is None:
        constants |= {"BLOCK": ROTATE.tokens(dim), "HEADS": ROTATE.heads}
        warps = ROTATE.num_warps
    else:
        warps = row.num_warps
        constants |= {"BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "STAGES": row.num_stages}
        constants |= {"PRECISION": precision, "DESCRIPTORS": row.descriptors}
        block = row.block_n  # of the tokens that the loop visits
        if kind_of_settings == "forward":
            constants["SUMS"] = row.sums
        if kind_of_settings == "key_gradient":
            block = row.block_m
            numbers = tuple(int(number) for number in triton.__version__.split(".")[:2])
            constants["COLUMNS_BELOW"] = row.columns_below(numbers)
        constants["BLOCK_MASKED"] = row.masked or block
        turning = flags.get("ROTATE_Q", False) or flags.get("ROTATE_BACK", False)
        absent = ["p_cos", "p_sin"] * (not turning) + ["p_lse"] * (flags.get("STORE_LSE") is False)
        if not row.descriptors:
            absent += [argument for argument in kernel.arg_names if argument.startswith("d_")]
        constants |= dict.fromkeys(absent)

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.startswith("scale"):
            return "fp32"
        if argument.startswith("d_"):
            return f"tensordesc<{dtype}[{block}, 1, {dim}]>"
        return _POINTERS.get(argument, f"*{dtype}") if argument.startswith("p_") else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # As a launch specialises them: what torch allocates is aligned, and strides are multiples of the head dimension.
    aligned = [
        i
        for i, argument in enumerate(kernel.arg_names)
        if argument.startswith(("p_", "s_")) and signature[argument] != "constexpr"
    ]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def write(names: list[str]) -> None:
    """Measure these rows, two at a time, and write them into the table, a row a line: so changes can be read."""
    found = versions()
    path = table_path(found["triton"])
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.exists() else {}
    if rows and len(names) < len(rows) and json.loads(path.read_text())["versions"] != found:
        raise SystemExit("the assemblers differ from those of the table; write all rows")
    with ProcessPoolExecutor(2) as pool:
        rows |= dict(zip(names, pool.map(measure, names), strict=True))
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(rows[name])}" for name in keys() if name in rows)
    head = f'  "versions": {json.dumps(found)},\n  "kernel": {json.dumps(KERNEL)},\n  "loop": {json.dumps(LOOP)},\n'
    TABLES.mkdir(exist_ok=True)
    path.write_text(f'{{\n{head}  "rows": {{\n{lines}\n  }}\n}}\n')


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="measure the launches whose key matches one of these")
    parser.add_argument("--write", action="store_true", help="write the rows into the table of this triton")
    parser.add_argument("--triton", nargs="+", default=[], metavar="DIR", help="use the tritons in these folders")
    chosen = parser.parse_args()
    wanted = [name for name in keys() if any(fnmatch(name, pattern) for pattern in chosen.patterns)]
    for folder in chosen.triton:
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        arguments = [__file__, *chosen.patterns, *["--write"] * chosen.write]
        subprocess.run([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, check=True)
    if chosen.triton:
        return
    if chosen.write:
        write(wanted or keys())
    else:
        json.dump({"versions": versions(), "rows": {name: measure(name) for name in wanted}}, sys.stdout)


if __name__ == "__main__":
    main()
