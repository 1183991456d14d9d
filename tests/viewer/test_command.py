"""`exaonepath view`: one line of output, a clean end, errors in one line; and what the page is made of."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exaonepath.cli.app import app
from exaonepath.demo import DemoResult
from exaonepath.errors import SettingsError
from exaonepath.slides.outputs import choose_layout
from exaonepath.viewer import serve as serve_module
from exaonepath.viz.values.library import Library, key_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "exaonepath" / "viewer" / "page"


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "exaonepath", "view", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment
    )


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_address_serves_and_ends(made, ending):
    program = start(made, "--no-browser")
    try:
        url = program.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32,}/", url)
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"<title>exaonepath</title>" in answer.read()
        with urllib.request.urlopen(f"{url}api/slides", timeout=20) as answer:
            assert b"CMU-1-Small-Region" in answer.read()
        program.send_signal(ending)
        out, err = program.communicate(timeout=20)
    finally:
        program.kill()
    assert program.returncode == 0
    assert out == ""  # the address was the only line
    assert "Traceback" not in err


def test_the_address_can_be_opened_as_soon_as_it_is_printed(made, monkeypatch):
    """The browser is opened before the server runs: its connection has to wait, not to fail."""
    opened = []

    class Server:
        def run(self, sockets):
            with socket.create_connection(sockets[0].getsockname(), 5):
                opened.append("connected")

    monkeypatch.setattr(serve_module, "make_server", lambda service, token: Server())
    monkeypatch.setattr(serve_module.webbrowser, "open", opened.append)
    result = CliRunner().invoke(app, ["view", str(made)])
    assert result.exit_code == 0, result.output
    while len(opened) < 2:
        time.sleep(0.01)
    assert sorted(opened) == ["connected", result.stdout.strip()]
    assert CliRunner().invoke(app, ["view", str(made), "--no-browser"]).exit_code == 0
    assert opened[2:] == ["connected"]


def test_mistakes_are_one_line(made, tmp_path, monkeypatch):
    with serve_module.listen(0) as taken:
        port = taken.getsockname()[1]
        for arguments, what in [
            ([tmp_path / "none"], "is not a folder"),
            ([tmp_path], "holds no results"),
            ([made, "--port", port], "cannot be used"),
            ([made, "--table", tmp_path / "none.csv"], "cannot be read"),
        ]:
            result = CliRunner().invoke(app, ["view", "--no-browser", *map(str, arguments)])
            assert result.exit_code == 1, arguments
            assert what in result.stderr
            assert result.stderr.startswith("error: ")
            assert result.stdout == ""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "exaonepath.viewer.serve")
    result = CliRunner().invoke(app, ["view", "--no-browser", str(made)])
    assert result.exit_code == 1
    assert 'pip install "exaonepath[viewer]"' in result.stderr


def test_the_demo_ends_with_the_command_that_shows_its_result(tmp_path, monkeypatch):
    result = DemoResult(tmp_path / "a.png", [(tmp_path / "a.png", "the picture")], 1.0, tmp_path / "a.svs", True, 1)
    monkeypatch.setattr("exaonepath.demo.run_demo", lambda *_, **__: result)
    out = tmp_path / "my demo"
    done = CliRunner().invoke(app, ["demo", "--out", str(out)])
    assert done.exit_code == 0
    assert done.stderr.rstrip().endswith(f"look at it in the browser:\n  exaonepath view '{out}'")
    assert "browser" not in CliRunner().invoke(app, ["demo", "--out", str(out), "--quiet"]).stderr


def test_it_listens_on_the_loopback_address_only():
    with serve_module.listen(0) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_slides_without_results_and_hashed_folders(made, tmp_path):
    from exaonepath.slides.cohort.inputs import cohort_inputs
    from exaonepath.slides.outputs import output_paths

    choose_layout(tmp_path, 1, "hashed")
    target = output_paths(tmp_path, "second").embedding
    target.parent.mkdir(parents=True)
    target.write_bytes((made / "embeddings" / "second.h5").read_bytes())
    library = Library(tmp_path, cohort_inputs([made / "slides"]).slides)
    assert [(e.id, e.state) for e in library.entries()] == [("CMU-1-Small-Region", "slide"), ("second", "embedded")]
    assert library.get(key_of("second")).slide_file() == made / "slides" / "second.svs"
    assert library.get("second") is None
    with pytest.raises(SettingsError):
        Library(tmp_path / "layout.json")


def test_names_of_any_bytes_have_plain_keys(tmp_path, made):
    name = os.fsdecode(b"caf\xe9 \x1b[31m <b>")
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / f"{name}.h5").write_bytes((made / "embeddings" / "second.h5").read_bytes())
    entry = Library(tmp_path).entries()[0]
    assert entry.id == name
    assert re.fullmatch("[0-9a-f]{16}", entry.key)


def test_the_page_loads_nothing_from_elsewhere():
    for file in PAGE.iterdir():
        if file.suffix in (".js", ".css", ".html", ".svg"):
            text = file.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text.replace("// ", "")), file.name
            assert "innerHTML" not in text
            assert " style=" not in text  # the policy forbids inline styles


def test_what_is_vendored_brings_its_licence_and_everything_is_packaged():
    vendored = {path.name for path in (PAGE / "vendor").iterdir()}
    assert vendored == {"openseadragon.min.js", "openseadragon.LICENSE.txt", "inter-latin.woff2", "inter.LICENSE.txt"}
    assert "OpenSeadragon contributors" in (PAGE / "vendor" / "openseadragon.LICENSE.txt").read_text()
    assert "SIL Open Font License" in (PAGE / "vendor" / "inter.LICENSE.txt").read_text()
    assert '"exaonepath.viewer": ["page/*", "page/vendor/*"]' in (ROOT / "setup.py").read_text()
