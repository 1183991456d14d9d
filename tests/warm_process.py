"""New processes in a fraction of the time: forked from one that has imported what takes seconds, and has run nothing.

`WarmProcess(preload)` starts that process when it is first used. `run` is `subprocess.run([python, "-c", code, ...])`,
and `start` is `subprocess.Popen` of the same; `program` is a file that runs a command in a fork, for shells. A fork
does not read variables again that a preloaded library reads when it is imported: where a test is about these, or about
what an import does, preload less. A thread pool does not survive a fork, so the process has one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# What `transformers` imports of torch and of others for a model, and nothing of transformers: two thirds of the time.
TORCH_ONLY = """
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.export, torch.onnx
import scipy.optimize, jinja2
"""
# All of it, and the package with both of its wings.
PACKAGE = """
import torch, transformers, exaonepath.cli.app, exaonepath.slides.encode, exaonepath.alignment.training.run
"""

SERVER = """
import atexit, gc, json, os, select, signal, socket, sys, traceback, types
{preload}
def child(request, streams):
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["-c", *request["arguments"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status, interrupted = 0, False
    try:
        exec(compile(request["code"], "<string>", "exec"), vars(main))
    except SystemExit as exc:
        if not isinstance(exc.code, (int, type(None))):
            print(exc.code, file=sys.stderr)
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException as exc:
        traceback.print_exc()
        status = 1
        interrupted = isinstance(exc, KeyboardInterrupt)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status & 255)

if "torch" in sys.modules:
    torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
ended, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
signal.signal(signal.SIGCHLD, lambda *_: None)
gc.collect()
gc.freeze()  # or each child would copy the whole heap by looking at it
callers = {{}}
print("ready", flush=True)
while True:
    ready, _, _ = select.select([server, ended], [], [])
    if ended in ready:
        os.read(ended, 1 << 12)
        while callers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with callers.pop(pid) as caller:
                try:
                    caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                except OSError:
                    pass  # nobody waits for it
    if server in ready:
        caller, _ = server.accept()
        size = int.from_bytes(caller.recv(8, socket.MSG_WAITALL), "big")
        _, streams, _, _ = socket.recv_fds(caller, 1, 3)
        request = json.loads(caller.recv(size, socket.MSG_WAITALL))
        pid = os.fork()
        if not pid:
            server.close()
            caller.close()
            for other in callers.values():
                other.close()
            child(request, streams)
        for stream in streams:
            os.close(stream)
        caller.sendall(pid.to_bytes(8, "big"))
        callers[pid] = caller
"""

# Stands for an installed command: it starts without the package, and lets a fork do the work.
PROGRAM = """#!{python} -IS
import json, os, socket, sys
request = {{"cwd": os.getcwd(), "env": dict(os.environ), "arguments": sys.argv[1:], "code": {code!r}}}
request = json.dumps(request).encode()
caller = socket.socket(socket.AF_UNIX)
caller.connect({address!r})
caller.sendall(len(request).to_bytes(8, "big"))
socket.send_fds(caller, [b"-"], [0, 1, 2])
caller.sendall(request)
caller.recv(8, socket.MSG_WAITALL)
status = int(caller.recv(16) or 1)
sys.exit(status if status >= 0 else 128 - status)
"""


class Started:
    """A process that runs: what `subprocess.Popen` has of methods that tests use."""

    def __init__(self, caller: socket.socket, pid: int, out, err) -> None:
        self._caller, self.pid, self._out, self._err = caller, pid, out, err
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._caller.settimeout(timeout)
            try:
                answer = self._caller.recv(16)
            except (TimeoutError, BlockingIOError) as exc:
                raise subprocess.TimeoutExpired("fork", timeout or 0) from exc
            assert answer, "the process that others are forked from has ended"
            self.returncode = int(answer)
            self._caller.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return what it wrote to standard output and to standard error."""
        self.wait(timeout)
        written = []
        for stream in (self._out, self._err):
            with stream:
                stream.seek(0)
                written.append(stream.read().decode("utf-8", "replace"))
        return written[0], written[1]


class WarmProcess:
    """A process that has imported `preload`, from which others are forked."""

    def __init__(self, preload: str) -> None:
        self._preload = preload
        self._server: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")  # short: an address has 107 bytes at most
        self._address = str(Path(self._folder.name) / "s")

    def _ensure_started(self) -> None:
        if self._server is None:
            command = [sys.executable, "-c", SERVER.format(preload=self._preload), self._address]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            assert self._server.stdout.readline() == "ready\n"

    def start(self, code: str, *arguments: object, cwd: Path | str | None = None, env: dict | None = None) -> Started:
        """Run `code` with `sys.argv[1:]` set to the arguments; its output goes to files until it is asked for."""
        self._ensure_started()
        request = json.dumps(
            {
                "code": code,
                "arguments": [str(argument) for argument in arguments],
                "cwd": str(cwd or Path.cwd()),
                "env": dict(os.environ) if env is None else env,
            }
        ).encode()
        caller = socket.socket(socket.AF_UNIX)
        caller.connect(self._address)
        caller.sendall(len(request).to_bytes(8, "big"))
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123
            socket.send_fds(caller, [b"-"], [nothing.fileno(), out.fileno(), err.fileno()])
        caller.sendall(request)
        return Started(caller, int.from_bytes(caller.recv(8, socket.MSG_WAITALL), "big"), out, err)

    def run(self, code: str, *arguments: object, cwd: Path | str | None = None, env: dict | None = None):
        """As `start`, until it has ended. Returns a `subprocess.CompletedProcess` with text."""
        started = self.start(code, *arguments, cwd=cwd, env=env)
        out, err = started.communicate()
        return subprocess.CompletedProcess(["-c", *map(str, arguments)], started.returncode, out, err)

    def program(self, path: Path, code: str) -> Path:
        """Write a program to `path` that runs `code` in a fork, with its caller's streams, folder and variables."""
        self._ensure_started()
        path.write_text(PROGRAM.format(python=sys.executable, code=code, address=self._address))
        path.chmod(0o755)
        return path

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server.stdout.close()
            self._server = None
        self._folder.cleanup()
