"""The API reference has every public name, each with a docstring that says what goes in and what is raised."""

import importlib
import re
from pathlib import Path

import pytest

import exaonepath

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = {
    name for page in (ROOT / "docs/api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
}
# Whole rooms, of which the public names are listed one by one.
ROOMS = {"adapters", "alignment", "encoders", "errors", "files", "ops", "slides", "synthetic", "viz"}
NAMES = sorted(set(exaonepath.__all__) - ROOMS - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_in_the_reference(name):
    thing = getattr(exaonepath, name)
    assert f"{thing.__module__}.{thing.__qualname__}" in REFERENCE
    assert len(thing.__doc__ or "") > 30


@pytest.mark.parametrize("path", sorted(REFERENCE))
def test_the_reference_names_what_exists(path):
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:  # a whole module
        found = importlib.import_module(path)
    assert found.__doc__


def test_every_page_is_in_the_navigation():
    """`make docs` fails for a page that is not; this tells it without building the site."""
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in text, page
