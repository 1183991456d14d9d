"""Small slides, encoders that cost nothing, and processes that work on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

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


@pytest.fixture
def start(tmp_path):
    """`start(out, slides, **environment)`: a process of a cohort run with the stand-ins."""
    running: list[subprocess.Popen] = []

    def start(out: Path, paths, **environment) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "cohort_stand_ins.py"), str(out), *map(str, paths)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}},
            cwd=tmp_path,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def copies(slide_files, tmp_path):
    """`copies(n)`: so many slides of different names, and the content of the first slide."""

    def copies(n: int) -> list[Path]:
        folder = tmp_path / "copies"
        folder.mkdir(exist_ok=True)
        return [Path(shutil.copy2(slide_files[0], folder / f"s{i:03}.svs")) for i in range(n)]

    return copies
