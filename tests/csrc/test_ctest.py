"""The C++ tests, built as they are released and run by ctest. CI runs them under sanitizers as well (`.ci/run`)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def test_ctest(tmp_path):
    cmake, ctest = shutil.which("cmake"), shutil.which("ctest")
    if not (cmake and ctest and shutil.which(os.environ.get("CXX", "c++"))):
        if os.environ.get("EXAONEPATH_REQUIRE_EXTENSION") == "1":
            pytest.fail("CMake and a C++ compiler are needed here")
        pytest.skip("no CMake or no C++ compiler")
    options = ("-DEXAONEPATH_TESTS=ON", "-DEXAONEPATH_PYTHON=OFF", "-DEXAONEPATH_CUDA=OFF")
    run(cmake, "-S", str(ROOT), "-B", str(tmp_path), *options)
    run(cmake, "--build", str(tmp_path), "--parallel", "2")
    report = run(ctest, "--test-dir", str(tmp_path), "--verbose")
    counts = [int(count) for count in re.findall(r"(\d+) checks, 0 failed", report)]
    # Attention, resizing, threads and the loss on the CPU, and both CUDA sources under an emulation: no test, or few,
    # would be a green that says nothing.
    assert len(counts) == 6, report
    assert min(counts) > 300, report
