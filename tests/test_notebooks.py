"""The notebooks of the documentation run as they stand (by `make docs`), and hold the results of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exaonepath.demo import FetchError, fetch_slide

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs/notebooks").glob("*.ipynb"))
SLIDE = "first-slide/CMU-1-Small-Region.svs"


def code_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.skipif(
    os.environ.get("EXAONEPATH_NOTEBOOKS") != "run", reason="`make docs` runs the notebooks (EXAONEPATH_NOTEBOOKS=run)"
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in code_of(path))
    if SLIDE.partition("/")[0] in code:
        (tmp_path / SLIDE).parent.mkdir()
        try:
            fetch_slide(tmp_path / SLIDE)
        except FetchError as exc:
            pytest.skip(f"needs a slide from a package index: {exc}")
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_was_executed_in_order_and_without_an_error(path):
    cells = code_of(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = path.read_text(encoding="utf-8")
    assert "/tmp/" not in text
    assert "/home/" not in text
