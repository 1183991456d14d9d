"""Builds a wheel for each Python at hand and checks it in a new environment: `make wheels`. Not part of CI.

What is checked needs no torch, so it is quick: the wheel installs, the package and its compiled extension import from
outside the repository and have the same version, no top-level package called `kernels` appears, and the files that are
no Python (type stubs, the viewer's page) are there. Wheels for publication are built by cibuildwheel, in the containers
that old Linux distributions need; its settings are in pyproject.toml, and `.github/workflows/wheels.yml` runs it.

    make wheels PYTHONS="3.10 3.13"
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CHECK = """
import importlib.metadata, sys
from pathlib import Path
import exaonepath, exaonepath._C as extension
here = Path(sys.prefix).resolve()
assert here in Path(exaonepath.__file__).resolve().parents, exaonepath.__file__
version = importlib.metadata.version("exaonepath")
assert version == exaonepath.__version__ == extension.build_info()["version"], version
folder = Path(exaonepath.__file__).parent
assert (folder / "py.typed").is_file() and (folder / "__init__.pyi").is_file() and (folder / "kernels").is_dir()
assert not (folder.parent / "kernels").exists(), "a top-level package called kernels"
info = extension.build_info()
print(f"{version} on Python {sys.version.split()[0]}: CPU {extension.cpu_isa()}, CUDA {info['cuda'] or 'none'}")
"""


def find_python(version: str) -> str | None:
    """The interpreter of a version: on the PATH, or installed by pyenv."""
    found = shutil.which(f"python{version}")
    candidates = [Path(found)] if found else []
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in candidates:
        done = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True, check=False)
        if done.returncode == 0:
            return str(candidate)
    return None


def build_and_check(python: str, out: Path, work: Path) -> str:
    """Build the wheel for one Python and check it; returns what the check printed."""
    build, clean = work / "build", work / "clean"
    environment = {**os.environ, "EXAONEPATH_REQUIRE_EXTENSION": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, check=True, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.stdout

    for venv in (build, clean):
        run(python, "-m", "venv", venv)
    pip = (build / "bin/python", "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", work / "wheel", ROOT)
    (wheel,) = (work / "wheel").glob("*.whl")
    run(
        clean / "bin/python", "-m", "pip", "--quiet", "install", "--no-deps", wheel, "lazy_loader", "wrapt", "packaging"
    )
    said = run(clean / "bin/python", "-I", "-c", CHECK)
    shutil.copy2(wheel, out)
    return f"{wheel.name}: {said.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    failed = 0
    for version in os.environ.get("PYTHONS", " ".join(PYTHONS)).split():
        python = find_python(version)
        if python is None:
            print(f"Python {version}: not at hand, skipped")
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                print(build_and_check(python, out, Path(work)), flush=True)
            except subprocess.CalledProcessError as exc:
                print(f"Python {version}: failed\n{exc.stdout}", flush=True)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
