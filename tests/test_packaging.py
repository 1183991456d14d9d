"""What gets installed, and what must not be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import exaonepath

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_are_inside_the_package_only(tmp_path):
    """`kernels` at top level belongs to another distribution on the package index."""
    code = "import exaonepath.kernels, importlib.util; print(importlib.util.find_spec('kernels') is None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "True"


def test_the_extension_belongs_to_this_version():
    from exaonepath import _C

    assert _C.build_info()["version"] == exaonepath.__version__
    assert isinstance(_C.cuda_devices(), list)


# From below. A room imports itself and what comes before it; rooms of one line do not import each other.
LAYERS = [
    ("errors", "version", "text", "memory", "processors", "log_once", "random_state"),
    ("files", "reference", "kernels", "plotting"),
    ("ops", "device", "exchange"),
    ("encoders",),
    ("synthetic", "slides"),
    ("viz", "alignment"),  # with `slides`: the two wings, which meet in files only
    ("registration", "demo", "doctor", "viewer", "adapters"),
    ("cli",),
    ("patches", "feature_extraction", "models"),  # import paths of EXAONE Path and of 0.1, nothing else
]
# What the layers would allow: the wings do not import each other, and the reference checks the others from outside.
FORBIDDEN = {"alignment": {"slides"}, "*": {"reference"}}


def imported_rooms(file):
    """Rooms of the package that a file imports, wherever in it; "exaonepath" itself where it asks the top level."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module] if node.module != "exaonepath" else [f"exaonepath.{a.name}" for a in node.names]
        for name in names:
            if name.split(".")[0] == "exaonepath":
                yield name.split(".")[1] if "." in name else "exaonepath"


def files_of(room):
    base = ROOT / ("kernels" if room == "kernels" else f"exaonepath/{room}")
    files = list(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    assert files, room
    return files


@pytest.mark.parametrize("rank", range(len(LAYERS)))
def test_layers_point_one_way(rank):
    """A room imports itself and what is below, never the front door, which leads to all of them."""
    for room in LAYERS[rank]:
        below = {name for rooms in LAYERS[:rank] for name in rooms}
        allowed = {room, *below} - FORBIDDEN.get(room, set()) - (FORBIDDEN["*"] - {room})
        for file in files_of(room):
            wrong = set(imported_rooms(file)) - allowed
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_every_room_has_its_place():
    rooms = {p.stem for p in (ROOT / "exaonepath").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= {name for names in LAYERS for name in names}


def test_contributing_describes_the_layers():
    """The table of CONTRIBUTING.md lists the rooms in the order that is enforced here."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [tuple(name.strip(" `") for name in row.split(",")) for row in rows] == LAYERS


def test_changelog_knows_this_version():
    assert f"## {exaonepath.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_one_version_is_stated_everywhere():
    """What a release has to change by hand, and what a new pin of ruff has to."""
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == exaonepath.__version__
    pinned = re.search(r"^ruff==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n\s+rev: v([\d.]+)", hooks)[1] == pinned
