"""Small slides, encoders that cost nothing, and processes that work on them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import cv2
import pytest
import torch

from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.synthetic import make_slide

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # worker processes import the stand-ins by name

import cohort_stand_ins  # noqa: E402


@pytest.fixture(autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """Whatever a test does, the threads of the engine must be gone afterwards."""
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("exaonepath-")]


@pytest.fixture(scope="session")
def slide_files(tmp_path_factory) -> list[Path]:
    """Four slides; the third one has no tissue."""
    folder = tmp_path_factory.mktemp("cohort")
    return [
        make_slide(folder / f"{name}.svs", 1200, 1000, fragments=fragments, holes=False, seed=seed)
        for seed, (name, fragments) in enumerate({"a": 1, "b": 2, "c": 0, "d": 1}.items())
    ]


@pytest.fixture
def slides(slide_files) -> list[CohortSlide]:
    return [CohortSlide(path, path.stem) for path in slide_files]


@pytest.fixture(scope="session")
def reference(slide_files, tmp_path_factory) -> dict[str, bytes]:
    """The files that `encode_slide` writes, one slide after another: by their paths in the output folder."""
    from exaonepath.slides.encode import encode_slide

    out = tmp_path_factory.mktemp("reference")
    pair = cohort_stand_ins.load("stand-in", torch.device("cpu"))
    for path in slide_files:
        encode_slide(path, out, *pair, **cohort_stand_ins.SETTINGS)
    return cohort_stand_ins.results(out)


@pytest.fixture
def stand_ins():
    return cohort_stand_ins


class Forked:
    """A process of a cohort run, forked from the test's: it need not import torch again, which takes seconds."""

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self._streams = [folder / f"{name}.{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                for number, path in enumerate(self._streams, 1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                os.environ.update(environment)
                status = cohort_stand_ins.main(arguments)
            except BaseException:  # noqa: BLE001  in the forked process, everything ends here
                traceback.print_exc(file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, [path.read_text() for path in self._streams if path.exists()]
            time.sleep(0.01)
        return tuple(path.read_text() if path.exists() else "" for path in self._streams)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@pytest.fixture
def forkable():
    """The test may fork: OpenCV's threads, for which a forked process would wait, are ended."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(threads)


@pytest.fixture
def start(tmp_path, forkable):
    """`start(out, slides, **environment)`: a process of a cohort run with the stand-ins."""
    running: list[Forked] = []

    def start(out: Path, paths, **environment) -> Forked:
        values = {name: str(value) for name, value in environment.items()}
        running.append(Forked(tmp_path, [str(out), *map(str, paths)], values))
        return running[-1]

    yield start
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture
def copies(slide_files, tmp_path):
    """`copies(n)`: so many slides of different names, and the content of the first slide."""

    def copies(n: int) -> list[Path]:
        folder = tmp_path / "copies"
        folder.mkdir(exist_ok=True)
        return [Path(shutil.copy2(slide_files[0], folder / f"s{i:03}.svs")) for i in range(n)]

    return copies
