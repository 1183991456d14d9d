"""What each CUDA kernel of csrc/ takes of each card, held against a table: registers, spilled bytes, shared memory.

The assembler tells without a card. After a change that is meant, `python tests/csrc/test_cuda_resources.py` writes the
table again; look at the difference before committing it.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("cuda_resources.txt")
SOURCE = ROOT / "csrc" / "sigmoid_loss_cuda.cu"
# 65,536 registers for the four blocks of 256 threads that __launch_bounds__ asks for, on every architecture listed.
MOST_REGISTERS = 64
KERNELS = {
    "sigmoid_pass_kernelIfLb1E": "sigmoid_pass float32",
    "sigmoid_pass_kernelI6__halfLb1E": "sigmoid_pass float16",
    "sigmoid_pass_kernelI13__nv_bfloat16Lb1E": "sigmoid_pass bfloat16",
    "sigmoid_pass_kernelIfLb0E": "sigmoid_pass float32, not aligned",
    "sigmoid_pass_kernelI6__halfLb0E": "sigmoid_pass float16, not aligned",
    "sigmoid_pass_kernelI13__nv_bfloat16Lb0E": "sigmoid_pass bfloat16, not aligned",
    "sigmoid_sums_kernel": "sigmoid_sums",
}


def architectures():
    """The cards that CMakeLists.txt builds for."""
    found = re.search(r"foreach\(architecture IN ITEMS ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    return [int(number) for number in found[1].split()]


def measure(nvcc):
    """(release of nvcc, {(kernel, architecture): (registers, spilled bytes, shared bytes)}) of this source."""
    release = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures()]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-DEXAONEPATH_WITH_CUDA", "-Xptxas", "-v", *codes, "-c", str(SOURCE)]
        done = subprocess.run([*command, "-o", f"{folder}/x.o"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = {}
    for part in re.split(r"Compiling entry function '", done.stderr)[1:]:
        kernel = next(name for key, name in KERNELS.items() if key in part.split("'")[0])
        architecture = int(re.search(r"for 'sm_(\d+)'", part)[1])
        stores, loads = (re.search(rf"(\d+) bytes spill {kind}", part)[1] for kind in ("stores", "loads"))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        used[kernel, architecture] = (registers, int(stores) + int(loads), int(shared[1]) if shared else 0)
    return release, used


def read():
    release, used = "", {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("nvcc "):
            release = line.split()[1]
        elif "|" in line and "registers" not in line:
            kernel, *numbers = (cell.strip() for cell in line.split("|"))
            used[kernel, int(numbers[0])] = tuple(int(n) for n in numbers[1:])
    return release, used


def write(release, used):
    rows = [f"nvcc {release}", f"{'kernel':36}| sm | registers | spilled | shared"]
    order = list(KERNELS.values())
    for (kernel, architecture), numbers in sorted(used.items(), key=lambda row: (order.index(row[0][0]), row[0][1])):
        rows.append(f"{kernel:36}|{architecture:4}|{numbers[0]:11}|{numbers[1]:9}|{numbers[2]:7}")
    TABLE.write_text("\n".join(rows) + "\n")


def fits(used):
    assert set(used) == {(kernel, a) for kernel in KERNELS.values() for a in architectures()}
    for row, (registers, spilled, _) in used.items():
        assert registers <= MOST_REGISTERS, f"{row}: {registers} registers, {MOST_REGISTERS} are to be had"
        assert spilled == 0, f"{row}: {spilled} bytes spilled"


def test_the_table_is_whole_and_fits():
    fits(read()[1])


def test_kernels_take_what_the_table_says():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    release, used = measure(nvcc)
    fits(used)
    wanted_release, wanted = read()
    if release != wanted_release:
        pytest.skip(f"fits; the table's exact figures are those of nvcc {wanted_release}, here is {release}")
    assert used == wanted, "regenerate the table if the change is meant: python tests/csrc/test_cuda_resources.py"


if __name__ == "__main__":
    write(*measure(shutil.which("nvcc")))
