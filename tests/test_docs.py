"""The README's snippets run as they stand: ```python blocks in one process each, ```sh blocks in one shell, in order.

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
    make_slide(folder / "slide.svs", 1400, 1000, fragments=1, holes=False)
    model = ExaonePathModel(ExaonePathConfig())
    randomize(model, 0)
    model.save_pretrained(folder / DEFAULT_WEIGHTS)
    return folder


def test_the_readme_has_snippets_of_both_kinds():
    assert {kind for kind, _ in blocks(DOCUMENTS[0])} == {"python", "sh"}


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.name)
def test_snippets_run(document, workplace):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for kind, text in blocks(document):
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{document.name}:\n{text}\n{done.stdout}\n{done.stderr}"


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
