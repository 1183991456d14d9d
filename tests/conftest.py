"""Fixtures every test may use. What needs ../shared/data skips, visibly, where that folder is absent."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from warm_process import PACKAGE, TORCH_ONLY, WarmProcess

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EXAONEPATH_TEST_DATA", ROOT.parent / "shared" / "data"))

# Triton decides at import how it runs; without a GPU its interpreter proves the kernels' numerics.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts what runs in the background with interrupts ignored, and programs inherit that: those that tests
# interrupt would run on.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test may reach for a network, also by accident.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config):
    """Let parallel workers have a thread each, and the processes that tests start: they share the cores.

    With a thread for every core in each of them, threads that wait for each other take most of the processor time:
    numpy's singular values, for one, took ten times as much. Libraries read the variable when they are imported, numpy
    even before this file in a worker; so it is set before workers are started. Tests of parallel code set the number
    of threads themselves.
    """
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape bytes of names that are not UTF-8 in what was captured: a parallel worker could not send them on."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Each device in turn; the GPU case skips where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def abandoned():
    """`abandoned("a.h5")`: the temporary name that a process which was killed while it wrote a.h5 leaves behind."""
    from exaonepath.files.atomic import _process_space

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return lambda name: f".{name}.{_process_space()}-{gone.pid}-0123abcd.tmp"


@pytest.fixture(scope="session")
def drop_checksums():
    """`drop_checksums(file)`: make an HDF5 file of ours one that another program could have written."""

    def drop(file) -> None:
        for name in [name for name in file.attrs if name.startswith("crc32")]:
            del file.attrs[name]

    return drop


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of slides and golden files; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"golden data not found at {DATA} (set EXAONEPATH_TEST_DATA)")
    return DATA


@pytest.fixture(scope="session")
def golden(data_dir: Path):
    """Load a golden file by its stem: `golden("slide_encoder_tiny")`."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(data_dir / "golden" / f"{name}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(scope="session")
def fill_weights(data_dir: Path):
    """`fill(shapes, seed)`: the deterministic weights the goldens were made with."""
    spec = importlib.util.spec_from_file_location("golden_weights", data_dir / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that are alive on one type of device, and their peak, while the mode is on.

    On the device "meta" nothing is computed: shapes of any size cost nothing, and every allocation is seen.
    """

    def __init__(self, device: str, *held: torch.Tensor) -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._alive: dict[int, int] = {}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == self.device and key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@pytest.fixture
def live_memory() -> type[LiveMemory]:
    return LiveMemory


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """No test writes to the user's cache, or finds what another run of the tests left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXAONEPATH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def warm_package():
    """Processes in which the package is imported already: `warm_package.run(code)`."""
    process = WarmProcess(PACKAGE)
    yield process
    process.close()


@pytest.fixture(scope="session")
def warm_torch():
    """Processes in which torch is imported, and neither transformers nor the package."""
    process = WarmProcess(TORCH_ONLY)
    yield process
    process.close()
