"""Forks of a warm process do what a new interpreter does, as far as tests rely on it."""

import os
import signal
import subprocess
import sys

import pytest
from warm_process import WarmProcess


@pytest.fixture(scope="module")
def warm():
    process = WarmProcess("import json")
    yield process
    process.close()


CODES = {
    "output": "import sys; print(__name__, sys.argv[1:]); print('e', file=sys.stderr)",
    "an exception": "raise ValueError('x')",
    "a status": "import sys; sys.exit(3)",
    "a status above a byte": "import sys; sys.exit(259)",
    "a message": "import sys; sys.exit('words')",
    "no status": "import sys; sys.exit()",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "the end of standard input": "import sys; print(repr(sys.stdin.read()))",
    "what happens at exit": "import atexit; atexit.register(print, 'bye')",
    "a syntax error": "x ==",
    "variables and folder": "import os; print(os.environ.get('COLOUR'), os.environ.get('HOME'), os.getcwd())",
    "classes of the main module": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)",
}


@pytest.mark.parametrize("code", CODES.values(), ids=list(CODES))
def test_the_same_as_a_new_interpreter(warm, tmp_path, code):
    environment = {"COLOUR": "blue", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code, "a b", "\u00e9"]
    options = {"cwd": tmp_path, "env": environment}
    expected = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)
    found = warm.run(code, "a b", "\u00e9", **options)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_forks_share_nothing(warm):
    warm.run("import json, sys; json.loads = None; sys.path.clear()")
    assert warm.run("import json; print(json.loads('1'))").stdout == "1\n"


def test_several_at_a_time_and_signals(warm):
    sleeper = warm.start("import time; print('now', flush=True); time.sleep(60)")
    assert sleeper.poll() is None
    assert warm.run("print('another')").stdout == "another\n"
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.communicate(timeout=0.01)
    sleeper.send_signal(signal.SIGKILL)
    assert sleeper.wait(60) == -signal.SIGKILL


def test_an_interrupt(warm, tmp_path):
    wait = "import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)"
    caught = f"try:\n exec({wait!r})\nexcept KeyboardInterrupt: raise SystemExit(130)"
    for code, status in ((wait, -signal.SIGINT), (caught, 130)):
        process = warm.start(code, cwd=tmp_path)
        while not (tmp_path / "here").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == status
        (tmp_path / "here").unlink()


def test_a_program_has_the_callers_streams(warm, tmp_path):
    program = warm.program(tmp_path / "p", "import sys; print(sys.stdin.read() + sys.argv[1]); sys.exit(4)")
    done = subprocess.run([program, "b"], input="a", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "ab\n")
    killed = warm.program(tmp_path / "q", "import os; os.kill(os.getpid(), 15)")
    assert subprocess.run(["bash", "-c", str(killed)], check=False).returncode == 128 + signal.SIGTERM
