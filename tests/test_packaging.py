"""What gets installed, and what must not be."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_layers_point_one_way():
    """DESIGN's order; nothing imports what stands to its right."""
    order = [
        "reference",
        "ops",
        "models",
        "patches",
        "feature_extraction",
        "slide_embedding",
        "pipeline",
        "viz",
        "demo",
        "cli",
    ]
    allowed_from = {"patches": {"models", "ops", "reference"}}  # siblings: patching knows nothing of models
    for i, room in enumerate(order):
        base = ROOT / "exaonepath" / room
        files = base.rglob("*.py") if base.is_dir() else [base.with_suffix(".py")]
        for file in files:
            imported = set(re.findall(r"^\s*(?:from|import) exaonepath\.(\w+)", file.read_text(), re.MULTILINE))
            # reference is the truth tests compare with; ops uses it as its `eager` backend.
            forbidden = set(order[i + 1 :]) | allowed_from.get(room, set())
            assert not imported & forbidden, f"{file.relative_to(ROOT)} imports {imported & forbidden}"


def test_changelog_knows_this_version():
    assert f"## {exaonepath.__version__}" in (ROOT / "CHANGELOG.md").read_text()
