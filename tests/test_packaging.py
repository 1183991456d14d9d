"""What gets installed, and what must not be."""

import ast
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


ORDER = [
    ("errors", "version", "memory", "text"),
    ("files",),
    ("reference",),
    ("kernels",),
    ("ops",),
    ("patches", "models"),  # neighbours that know nothing of each other
    ("feature_extraction",),
    ("synthetic", "cohort"),  # neither imports the other: a made-up cohort is read like anybody's
    ("slide_embedding",),
    ("pipeline",),
    ("viz",),
    ("evaluation",),
    ("training",),
    ("experiments",),
    ("demo",),
    ("doctor",),
    ("cli", "early_checks"),
]


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


@pytest.mark.parametrize("rank", range(len(ORDER)))
def test_layers_point_one_way(rank):
    """DESIGN's order: a room imports itself and what stands before it, never the top level, which imports them all."""
    for room in ORDER[rank]:
        base = ROOT / ("kernels" if room == "kernels" else f"exaonepath/{room}")
        allowed = {room, *(name for rooms in ORDER[:rank] for name in rooms)}
        files = list(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        assert files
        for file in files:
            wrong = set(imported_rooms(file)) - allowed
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_every_room_has_its_place():
    rooms = {p.stem for p in (ROOT / "exaonepath").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= {name for names in ORDER for name in names}


def test_changelog_knows_this_version():
    assert f"## {exaonepath.__version__}" in (ROOT / "CHANGELOG.md").read_text()
