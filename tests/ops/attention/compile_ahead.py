"""Compiles every kernel launch for cards that are not here, and tells what the assembler made of it.

    python tests/ops/attention/compile_ahead.py --write              all launches, into kernel_resources.json
    python tests/ops/attention/compile_ahead.py "sm_90 bf16 64 *"    those whose key matches, as JSON on stdout

Not a test: `test_triton_compile.py` runs it in a process of its own, since the tests' own runs Triton as an
interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

TABLE = Path(__file__).with_name("kernel_resources.json")
COLUMNS = ("shared", "registers", "stack", "spills_in_loops", "instructions", "warp_mma", "warpgroup_mma")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (32, 64, 128)
DTYPES = ("bf16", "fp16", "fp32")
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
_WARPGROUP_MMA = ("HGMMA", "UTCHMMA")  # the matrix instructions of sm_90 and sm_100 that reach their full rate


def keys() -> list[str]:
    """The name of every row of the table: architecture, dtype, head dimension, launch."""
    return [
        f"sm_{architecture} {dtype} {dim} {launch}"
        for architecture in ARCHITECTURES
        for dtype in DTYPES
        for dim in HEAD_DIMS
        for launch in LAUNCHES
    ]


def versions() -> dict[str, str]:
    """Of triton and of the two assemblers it brings: what the figures depend on."""
    import triton

    found = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell"):
        if (_tools() / tool).exists():
            report = subprocess.run([_tools() / tool, "--version"], capture_output=True, text=True, check=True).stdout
            found[tool] = re.search(r"V([\d.]+)", report)[1]
    return found


def measure(key: str) -> list[int]:
    """Compile the launch of this name and read COLUMNS from its machine code. Stack is where spilled registers go."""
    import triton
    from exaonepath.kernels.launch_config import ROTATE, attention_config
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    architecture, dtype, dim, launch = key.split(" ", 3)
    architecture, dim = int(architecture.removeprefix("sm_")), int(dim)
    module, name, settings, flags = LAUNCHES[launch]
    kernel = getattr(importlib.import_module(f"exaonepath.kernels.{module}"), name)
    constants = {"D": dim, **flags}
    if settings is None:
        constants |= {"BLOCK": ROTATE.tokens(dim), "HEADS": ROTATE.heads}
        options = {"num_warps": ROTATE.num_warps}
    else:
        config = attention_config(divmod(architecture, 10), 4 if dtype == "fp32" else 2, dim)
        row = getattr(config, settings)
        constants |= {"BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "STAGES": row.num_stages}
        constants |= {"PRECISION": config.precision, "DESCRIPTORS": row.descriptors}
        if settings == "forward":
            constants["SUMS"] = row.sums
        options = {"num_warps": row.num_warps}
        turning = flags.get("ROTATE_Q", False) or flags.get("ROTATE_BACK", False)
        absent = ["p_cos", "p_sin"] * (not turning) + ["p_lse"] * (flags.get("STORE_LSE") is False)
        if not row.descriptors:
            absent += [argument for argument in kernel.arg_names if argument.startswith("d_")]
        constants |= dict.fromkeys(absent)
        block = row.block_m if settings == "key_gradient" else row.block_n  # of the tokens that the loop visits

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
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={**options, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_tools() / tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout
            for tool, arguments in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE)
    counts = [len(operations) - operations.count("NOP"), operations.count("HMMA")]
    warpgroup = sum(operation in _WARPGROUP_MMA for operation in operations)
    return [compiled.metadata.shared, int(registers), int(stack), _spills_in_loops(code), *counts, warpgroup]


def _spills_in_loops(code: str) -> int:
    """Instructions that move spilled registers inside a loop; outside one they run once and do not matter."""
    lines = code.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L_\w+):", line))}
    loops = [
        (labels[match[1]], i)
        for i, line in enumerate(lines)
        if (match := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and labels[match[1]] < i
    ]
    moved = [i for i, line in enumerate(lines) if re.search(r"\b(STL|LDL)\b", line)]
    return sum(any(begin < i < end for begin, end in loops) for i in moved)


def write() -> None:
    """Measure everything, two at a time, and write the table: one row a line, so that a change can be read."""
    names = keys()
    with ProcessPoolExecutor(2) as pool:
        rows = dict(zip(names, pool.map(measure, names), strict=True))
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    head = f'  "versions": {json.dumps(versions())},\n  "columns": {json.dumps(COLUMNS)},\n'
    TABLE.write_text(f'{{\n{head}  "rows": {{\n{lines}\n  }}\n}}\n')


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="measure the launches whose key matches one of these")
    parser.add_argument("--write", action="store_true", help="measure everything and write kernel_resources.json")
    chosen = parser.parse_args()
    if chosen.write:
        write()
    else:
        wanted = [name for name in keys() if any(fnmatch(name, pattern) for pattern in chosen.patterns)]
        json.dump({"versions": versions(), "rows": {name: measure(name) for name in wanted}}, sys.stdout)
