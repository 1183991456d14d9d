"""Fast tests on every Python at hand, with the oldest and the newest dependencies: `make test-matrix`. Not part of CI.

An environment is a Python and a set of dependencies:

    oldest      every lower bound of pyproject.toml taken at its word: the oldest release that the bound, this Python
                and the other bounds allow
    newest-4    the newest of everything, with the newest transformers 4
    newest-5    the newest of everything, with the newest transformers 5

torchao, which some tests need, is added to the last environment of the newest versions.

Each lives in `.matrix/<python>-<set>/`: `requirements.txt` (the versions, resolved once), `venv/`, and the logs. What
exists is used again, so an interrupted matrix continues; delete a folder to resolve and install it again. torch comes
from the package index, on Linux with CUDA (several GB, downloaded once); `UV_TORCH_BACKEND=cpu` takes torch's own index
of CPU builds instead.

    make test-matrix PYTHONS="3.10 3.13" SETS=oldest
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".matrix"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SETS = {
    "oldest": ("lowest-direct", []),
    "newest-4": ("highest", ["transformers<5"]),
    "newest-5": ("highest", ["transformers>=5,<6"]),
}
# Seconds, not minutes, and every dependency that has changed its interface between versions is used by one of them.
TESTS = (
    "tests/test_packaging.py",
    "tests/test_front_door.py",
    "tests/encoders/test_auto.py",
    "tests/files",
    "tests/ops/attention/test_fragment_attention.py",
    "tests/cli",
)
TORCHAO_TESTS = ("tests/encoders/test_unmodified.py", "-k", "torchao")
SHOWN = ("torch", "transformers", "numpy")
# What an editable installation has to be made again for.
INSTALLED_FROM = ("pyproject.toml", "setup.py", "CMakeLists.txt", "exaonepath/version.py", "csrc/*")


class Failed(Exception):
    """A step before the tests failed; the message is its last lines."""


@dataclass
class Outcome:
    """One row of the table."""

    python: str
    dependencies: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def good(self) -> bool:
        return not self.problem and not self.failed and self.passed > 0


def find_python(version: str) -> str | None:
    """An interpreter of this version that starts: on PATH, or among those that pyenv has built (its shims may not)."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))]
    for candidate in filter(None, candidates):
        code = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what would let another installation of Python show through."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS")
    return {name: value for name, value in os.environ.items() if name not in hidden} | more


def call(log: Path, *command: str | Path, **environment: str) -> None:
    """Run a command with its output in `log`; raise `Failed` with the end of it."""
    with log.open("a", encoding="utf-8") as out:
        print("$", *command, file=out, flush=True)
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=clean_environment(**environment), stdout=out, stderr=out, check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise Failed(" ".join(line.strip() for line in tail))


def get_uv(folder: Path) -> Path:
    """uv, in an environment of its own: it resolves to the lowest versions, which pip does not."""
    uv = folder / "tools" / "bin" / "uv"
    if not uv.exists():
        call(folder / "tools.log", sys.executable, "-m", "venv", folder / "tools")
        call(folder / "tools.log", folder / "tools" / "bin" / "python", "-m", "pip", "install", "--quiet", "uv>=0.5")
    return uv


def install(uv: Path, folder: Path, interpreter: str, dependencies: str) -> Path:
    """Resolve, create and fill one environment, as far as that is not done; returns its Python."""
    resolution, bounds = SETS[dependencies]
    log, requirements, python = folder / "install.log", folder / "requirements.txt", folder / "venv" / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "installed"
    state = hashlib.sha256()
    for path in sorted(path for pattern in INSTALLED_FROM for path in ROOT.glob(pattern) if path.is_file()):
        state.update(path.read_bytes())
    state = state.hexdigest()
    if stamp.exists() and stamp.read_text() == state:
        return python
    log.unlink(missing_ok=True)
    (folder / "bounds.txt").write_text("".join(f"{bound}\n" for bound in bounds))
    # Wheels only: an old release without a wheel for this Python is not a version that anybody can install in practice.
    call(
        log, uv, "pip", "compile", "--quiet", "--python", interpreter, "--resolution", resolution,
        "--only-binary", ":all:", "--extra", "dev", "--constraint", folder / "bounds.txt", "--upgrade",
        "--output-file", requirements, "pyproject.toml",
    )  # fmt: skip
    if not python.exists():
        call(log, uv, "venv", "--quiet", "--python", interpreter, folder / "venv")
    call(
        log, uv, "pip", "install", "--exact", "--python", python, "--constraint", requirements, "--editable", ".[dev]",
        EXAONEPATH_REQUIRE_EXTENSION="1",
    )  # fmt: skip
    stamp.write_text(state)
    return python


def versions(uv: Path, python: Path) -> dict[str, str]:
    """Installed versions by name."""
    done = subprocess.run(
        [uv, "pip", "list", "--quiet", "--python", python, "--format", "json"],
        capture_output=True, text=True, check=True, env=clean_environment(),
    )  # fmt: skip
    return {entry["name"]: entry["version"] for entry in json.loads(done.stdout)}


def run_tests(
    outcome: Outcome, python: Path, folder: Path, name: str, tests: tuple[str, ...], **environment: str
) -> None:
    """Run pytest in an environment, and count."""
    report, log = folder / f"{name}.xml", folder / f"{name}.log"
    for stale in (report, log):
        stale.unlink(missing_ok=True)
    start = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    try:
        # As `make test`: two at a time, a file's tests together. Commands of this environment come first on PATH.
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        call(log, *command, "-n", "2", "--dist", "loadfile", PATH=path, **environment)
    except Failed as exc:
        outcome.problem = str(exc) if not report.exists() else ""
    outcome.seconds = time.monotonic() - start
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
            outcome.failed += count["failures"] + count["errors"]
            outcome.skipped += count["skipped"]
            outcome.passed += count["tests"] - count["failures"] - count["errors"] - count["skipped"]


def run_torchao(uv: Path, python: Path, folder: Path, outcome: Outcome) -> Outcome:
    """The tests of torchao's quantized layers. It lies in a folder of its own, so that the environment stays as it is:
    transformers imports torchao wherever it is installed, and a torchao that this torch is too old for breaks both."""
    outcome = Outcome(outcome.python, f"{outcome.dependencies} + torchao", outcome.versions)
    target = folder / "torchao"
    try:
        if not target.exists():
            options = ("--quiet", "--python", python, "--target", target, "--no-deps")
            call(folder / "torchao.log", uv, "pip", "install", *options, "torchao")
        run_tests(outcome, python, folder, "torchao-tests", TORCHAO_TESTS, PYTHONPATH=str(target))
    except Failed as exc:
        outcome.problem = str(exc)
    return outcome


def run_matrix(pythons: list[str], sets: list[str], folder: Path) -> Iterator[Outcome]:
    """Every environment, one after the other; and torchao in the last one of the newest versions."""
    folder.mkdir(exist_ok=True)
    uv = get_uv(folder)
    last: tuple[Path, Path, Outcome] | None = None
    for version in pythons:
        interpreter = find_python(version)
        for dependencies in sets:
            outcome = Outcome(version, dependencies)
            if interpreter is None:
                outcome.problem = "no such Python on this machine"
                yield outcome
                continue
            environment = folder / f"{version}-{dependencies}"
            print(f"{version} {dependencies}: {environment.relative_to(ROOT)}", file=sys.stderr, flush=True)
            try:
                python = install(uv, environment, interpreter, dependencies)
                outcome.versions = versions(uv, python)
                run_tests(outcome, python, environment, "tests", TESTS)
                # torchao follows torch's releases and does not say which ones it needs: only the newest fit.
                last = (python, environment, outcome) if dependencies != "oldest" else last
            except Failed as exc:
                outcome.problem = str(exc)
            yield outcome
    if last is not None:
        yield run_torchao(uv, *last)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    rows = [("Python", "set", *SHOWN, "passed", "failed", "skipped", "seconds", "")]
    for o in outcomes:
        counts = (o.passed, o.failed, o.skipped, f"{o.seconds:.0f}") if not o.problem else ("", "", "", "")
        shown = (o.versions.get(name, "") for name in SHOWN)
        note = o.problem.replace("|", "/") or ("good" if o.good else "failed" if o.failed else "no test ran")
        rows.append((o.python, o.dependencies, *shown, *map(str, counts), note))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words = {"nargs": "*", "metavar": "NAME"}
    parser.add_argument("--pythons", default=os.environ.get("PYTHONS", "").split() or list(PYTHONS), **words)
    parser.add_argument("--sets", default=os.environ.get("SETS", "").split() or list(SETS), **words)
    arguments = parser.parse_args()
    unknown = set(arguments.sets) - set(SETS)
    if unknown:
        parser.error(f"no such set: {', '.join(sorted(unknown))}; known: {', '.join(SETS)}")
    outcomes = list(run_matrix(arguments.pythons, arguments.sets, FOLDER))
    text = table(outcomes)
    (FOLDER / "table.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
