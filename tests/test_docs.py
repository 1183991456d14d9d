"""The README's snippets run as they stand: ```python blocks in one process each, ```sh blocks in one shell, in order.

A process for a python block, or for an `exaonepath` command of a document other than the README, is forked from one
that has imported the package and has run nothing else: importing torch takes longer than what most commands do.

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


# Reads a file name a line, runs the file in a fork, and answers with the exit status.
FORKS = """
import os, runpy, sys, traceback
import torch, transformers, exaonepath.slides.encode, exaonepath.alignment.training.run
for line in sys.stdin:
    path = line.rstrip()
    child = os.fork()
    if not child:
        status = 1
        try:
            with open(path + ".log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            runpy.run_path(path, run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# Waits for commands on a socket, and runs each in a fork, with the caller's arguments, folder, variables, and streams.
COMMANDS = """
import json, os, socket, sys
import torch, transformers, exaonepath.slides.encode, exaonepath.alignment.training.run
from exaonepath.cli.app import main
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("ready", flush=True)
while True:
    caller, _ = server.accept()
    request, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    request = json.loads(request)
    child = os.fork()
    if not child:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["variables"])
        sys.argv = ["exaonepath", *request["arguments"]]
        status = 0
        try:
            main()
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for stream in streams:
        os.close(stream)
    caller.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    caller.close()
"""

# The `exaonepath` that snippets find: it starts without the package, and lets the process above do the work.
CALLER = """#!{python} -IS
import json, os, socket, sys
caller = socket.socket(socket.AF_UNIX)
caller.connect({address!r})
request = {{"folder": os.getcwd(), "variables": dict(os.environ), "arguments": sys.argv[1:]}}
socket.send_fds(caller, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(caller.recv(16) or 1) & 255)
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A folder for PATH with an `exaonepath` that starts fast."""
    folder = tmp_path_factory.mktemp("bin")
    address = str(folder / "s")
    with subprocess.Popen([sys.executable, "-c", COMMANDS, address], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        (folder / "exaonepath").write_text(CALLER.format(python=sys.executable, address=address))
        (folder / "exaonepath").chmod(0o755)
        yield folder
        server.kill()


@pytest.fixture(scope="module")
def run_python(workplace, tmp_path_factory):
    """Run a snippet in a process of its own; returns its exit status and its output."""
    folder = tmp_path_factory.mktemp("snippets")
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, cwd=workplace, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(text):
            path = folder / f"snippet_{len(list(folder.iterdir()))}.py"
            path.write_text(text, encoding="utf-8")
            server.stdin.write(f"{path}\n")
            server.stdin.flush()
            status = server.stdout.readline()
            assert status, "the process that runs the snippets has ended"
            return int(status), Path(f"{path}.log").read_text(encoding="utf-8")

        yield run


def test_a_snippet_that_fails_is_noticed(run_python):
    assert run_python("print('as it should')") == (0, "as it should\n")
    status, output = run_python("import exaonepath\nexaonepath.no_such_name")
    assert status == 1
    assert "no_such_name" in output
    assert run_python("import sys; sys.exit(3)")[0] != 0
    assert run_python("import os; os.kill(os.getpid(), 9)")[0] != 0


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.name)
def test_snippets_run(document, workplace, run_python, commands):
    first = Path(sys.executable).parent if document.name == "README.md" else commands
    path = os.pathsep.join([str(first), str(Path(sys.executable).parent), os.environ["PATH"]])
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
