"""The preloaded shim and the server that runs commands under it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        if os.environ.get("EXAONEPATH_REQUIRE_EXTENSION") == "1":
            pytest.fail("file operations cannot be failed without a C compiler on Linux")
        pytest.skip("needs a C compiler on Linux")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return library


class Server:
    """Runs one command after another, each in a forked child."""

    def __init__(self, shim: Path, folder: Path) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        self._streams = {name: str(folder / name) for name in ("stdout", "stderr")}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )
        assert json.loads(self._process.stdout.readline())["ready"]

    def __call__(self, arguments, prefix, **plan):
        """Run `exaonepath ARGUMENTS`; `plan` disturbs operations on paths that begin with `prefix`."""
        request = {"arguments": [str(a) for a in arguments], "prefix": str(prefix), **self._streams, **plan}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def server(shim, tmp_path_factory):
    one = Server(shim, tmp_path_factory.mktemp("server"))
    yield one
    one.close()


@pytest.fixture
def table(record_property):
    """`table(name, tried, survived, lost)` adds a row to what is printed after all tests."""
    return lambda *row: record_property("fault", row)


def pytest_terminal_summary(terminalreporter):
    """Rows of the same name, of tests in several processes, are added up."""
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for report in (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])):
        for name, value in report.user_properties:
            if name == "fault":
                fault, tried, survived, lost = value
                before = rows.get((fault, lost), (0, 0))
                rows[fault, lost] = before[0] + tried, before[1] + survived
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':48} {'tried':>6} {'survived':>8}  lost")
    for (fault, lost), (tried, survived) in sorted(rows.items()):
        terminalreporter.write_line(f"{fault:48} {tried:6} {survived:8}  {lost}")
