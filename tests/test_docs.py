"""The README's snippets run as they stand: ```python blocks in one process each, ```sh blocks in one shell, in order.

A process for a python block or for an `exaonepath` command is forked from one that has imported the package and has
run nothing else: importing torch takes longer than what most commands do.

They run in an empty folder that holds `slide.svs`, a small synthetic slide, and a repository of random weights in a
folder named like the Hub repository, which transformers prefers to the Hub. ```console blocks are set-up, not run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from exaonepath import ExaonePathConfig, ExaonePathModel
from exaonepath.encoders.loading import randomize
from exaonepath.encoders.published import DEFAULT_WEIGHTS
from exaonepath.synthetic import make_slide

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document):
    return BLOCK.findall(document.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    make_slide(folder / "slide.svs", 1100, 900, fragments=1, holes=False)  # nine patches, and smaller ones have none
    model = ExaonePathModel(ExaonePathConfig())
    randomize(model, 0)
    model.save_pretrained(folder / DEFAULT_WEIGHTS)
    return folder


def test_the_readme_has_snippets_of_both_kinds():
    assert {kind for kind, _ in blocks(DOCUMENTS[0])} == {"python", "sh"}


@pytest.fixture(scope="module")
def commands(warm_package, tmp_path_factory):
    """A folder for PATH with an `exaonepath` that starts fast."""
    folder = tmp_path_factory.mktemp("bin")
    code = "import sys; from exaonepath.cli.app import main; sys.argv[0] = 'exaonepath'; main()"
    warm_package.program(folder / "exaonepath", code)
    return folder


@pytest.fixture(scope="module")
def run_python(warm_package, workplace, tmp_path_factory):
    """Run a snippet in a process of its own; returns its exit status and its output."""
    folder = tmp_path_factory.mktemp("snippets")

    def run(text):
        path = folder / f"snippet_{len(list(folder.iterdir()))}.py"
        path.write_text(text, encoding="utf-8")
        code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        done = warm_package.run(code, path, cwd=workplace)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_snippet_that_fails_is_noticed(run_python):
    assert run_python("print('as it should')") == (0, "as it should\n")
    status, output = run_python("import exaonepath\nexaonepath.no_such_name")
    assert status == 1
    assert "no_such_name" in output
    assert run_python("import sys; sys.exit(3)")[0] != 0
    assert run_python("import os; os.kill(os.getpid(), 9)")[0] != 0


def test_the_installed_command_starts():
    """The one that the blocks find is not that of the installation, and does the same."""
    command = [Path(sys.executable).parent / "exaonepath", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"encode", "status", "train"} <= set(done.stdout.split())


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.name)
def test_snippets_run(document, workplace, run_python, commands):
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    for kind, text in blocks(document):
        if kind == "python":
            status, output = run_python(text)
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
            status, output = done.returncode, done.stdout + done.stderr
        assert status == 0, f"{document.name}:\n{text}\n{output}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_no_placeholder_is_left(document):
    assert not re.search(r"\b[A-Z]+_TABLE\b|\bTODO\b|\bTBD\b", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_and_pictures_are_there(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} points to {target}"


@pytest.mark.parametrize("name", ["architecture.md", "glossary.md"])
def test_modules_that_are_named_exist(name):
    """`slides/image.py` is a module of the package, `tests/conftest.py` a file of the repository."""
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", (ROOT / "docs" / name).read_text(encoding="utf-8")))
    assert named
    missing = {path for path in named if not (ROOT / "exaonepath" / path).exists() and not (ROOT / path).exists()}
    assert not missing, f"{name} names {sorted(missing)}"
