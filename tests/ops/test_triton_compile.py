"""The kernels compiled ahead of time for cards that are not here: shared memory within bounds, no spilled register.

In a process of its own, since the tests' own process runs Triton as an interpreter. By default the settings the
published encoder uses (head dimension 64, bfloat16) on all six architectures; EXAONEPATH_COMPILE=full compiles all.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
KERNELS = {
    "forward_kernel": "forward",
    "query_gradient_kernel": "query_gradient",
    "key_gradient_kernel": "key_gradient",
}
POINTERS = {
    "p_lse": "*fp32",
    "p_delta": "*fp32",
    "p_cos": "*fp32",
    "p_sin": "*fp32",
    "p_bounds": "*i32",
    "p_tiles": "*i32",
}


def compile_kernel(name: str, architecture: int, dtype: str, head_dim: int) -> tuple[int, int, int]:
    """(shared memory in bytes, registers, bytes of spill stores) of one kernel with its own launch settings."""
    import triton
    from exaonepath.kernels import fragment_attention, fragment_attention_backward
    from exaonepath.kernels.launch_config import attention_config
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = attention_config(divmod(architecture, 10), 4 if dtype == "fp32" else 2, head_dim)
    launch = getattr(config, KERNELS[name])
    forward = name == "forward_kernel"
    kernel = getattr(fragment_attention if forward else fragment_attention_backward, name)
    constants = {"D": head_dim, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "PRECISION": config.precision}
    flags = {"TURN_Q": True, "TURN_K": False, "STORE_LSE": True} if forward else {"TURN_BACK": True}
    constants |= {"STAGES": launch.num_stages, **flags}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.startswith("scale"):
            return "fp32"
        return POINTERS.get(argument, f"*{dtype}") if argument.startswith("p_") else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = [i for i, a in enumerate(kernel.arg_names) if a.startswith(("p_", "s_"))]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Triton brings two assemblers; the newer one reads the newer PTX that recent architectures get.
    for tool in ("ptxas-blackwell", "ptxas"):
        if not (tools / tool).exists():
            continue
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            target = re.search(r"\.target (sm_\w+)", ptx)[1]
            command = [str(tools / tool), "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
            report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        registers, spills = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
        if registers and spills:
            return compiled.metadata.shared, int(registers[1]), int(spills[1])
    raise RuntimeError(f"no assembler of this triton takes the kernel: {report}")


@pytest.mark.parametrize("architecture", SHARED_KB)
def test_kernels_fit_the_card_and_do_not_spill(architecture, tmp_path):
    full = os.environ.get("EXAONEPATH_COMPILE") == "full"
    cases = (
        [("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp32", 32), ("fp32", 64), ("fp32", 128)]
        if full
        else [("bf16", 64)]
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [str(architecture), *(f"{dtype}:{dim}" for dtype, dim in cases)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(cases) * len(KERNELS)
    for name, case, shared, registers, spills in rows:
        assert int(shared) <= SHARED_KB[architecture] * 1024, (name, case)
        assert int(registers) <= 255
        assert int(spills) == 0, f"{name} {case} spills {spills} bytes on sm_{architecture}"


if __name__ == "__main__":
    for case in sys.argv[2:]:
        for kernel_name in KERNELS:
            figures = compile_kernel(kernel_name, int(sys.argv[1]), case.split(":")[0], int(case.split(":")[1]))
            print(kernel_name, case, *figures)
