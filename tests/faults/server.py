"""Runs commands of `exaonepath` in forked children, each with one of its file operations disturbed.

Started by the tests with the shim preloaded: everything heavy is imported once, and a command then takes a fraction of
a second. One request a line on standard input, one answer a line on standard output, both JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path


class Plan(ctypes.Structure):
    """`struct plan` of shim.c."""

    _fields_ = (
        ("action", ctypes.c_int),
        ("at", ctypes.c_int),
        ("ongoing", ctypes.c_int),
        ("error", ctypes.c_int),
        ("budget", ctypes.c_long),
        ("count", ctypes.c_int),
        ("fired", ctypes.c_int),
        ("prefix", ctypes.c_char * 512),
        ("log", ctypes.c_char * (1 << 16)),
    )


ACTIONS = ("nothing", "fail", "kill before", "kill inside", "kill after", "signal", "full", "no locks")


def prepare() -> None:
    """Import what the commands import, and put models that cost nothing in the place of the published ones."""
    import torch

    torch.set_num_threads(1)  # a thread pool does not survive a fork

    from exaonepath import ExaonePathSlideEncoderConfig, ExaonePathSlideEncoderModel
    from exaonepath.cli.app import app as cli  # noqa: F401
    from exaonepath.encoders import loading

    class ColourEncoder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)).repeat(1, 256)

    tiny = {"input_dim": 768, "embed_dim": 32, "depth": 1, "num_heads": 2, "n_storage_tokens": 1}
    slide_encoder = ExaonePathSlideEncoderModel(ExaonePathSlideEncoderConfig(wsi_cfg=tiny)).eval()
    loading.randomize(slide_encoder, 0)
    slide_encoder = loading.LoadedEncoder(slide_encoder, "random:0", "tiny", True)
    patch_encoder = loading.LoadedEncoder(ColourEncoder(), "random:0", "colour", True)
    loading.LoadedEncoder.device = torch.device("cpu")
    loading.load_patch_encoder = lambda *_, **__: patch_encoder
    loading.load_slide_encoder = lambda *_, **__: slide_encoder
    try:
        import accelerate
        import anndata
        import sklearn.metrics  # noqa: F401

        from exaonepath.alignment.data.cohort import load_cohort  # noqa: F401
        from exaonepath.alignment.training import run, trainer  # noqa: F401

        del accelerate, anndata
    except ImportError:
        pass  # the tests of training skip


def child(request: dict) -> None:
    for descriptor, target in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(target, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    from exaonepath.cli.app import main

    sys.argv = ["exaonepath", *request["arguments"]]
    try:
        main()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:  # noqa: BLE001  whatever it is, the test looks for it on standard error
        traceback.print_exc()
        code = 99
    gc.collect()  # what the command made is let go of here; taking all of Python down would take seconds
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.faults_plan.restype = ctypes.POINTER(Plan)
    plan = shim.faults_plan().contents
    prepare()
    gc.collect()
    gc.freeze()  # or each child would copy the whole heap by looking at it
    lines = open(os.dup(0), "rb", buffering=0)  # noqa: SIM115, PTH123  unbuffered: nothing of it in a child
    print(json.dumps({"ready": True}), flush=True)
    while line := lines.readline():
        request = json.loads(line)
        plan.prefix = b""
        plan.action = ACTIONS.index(request.get("action", "nothing"))
        plan.at, plan.ongoing = request.get("at", 0), request.get("ongoing", False)
        plan.error, plan.budget = request.get("error", 0), request.get("budget", 0)
        plan.count = plan.fired = 0
        plan.prefix = os.fsencode(request["prefix"])
        begin = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(request)
        status = None
        while status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() - begin > request.get("timeout", 120):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                status = "hang"
            else:
                time.sleep(0.002)
        plan.prefix = b""
        answer = {
            "status": status,
            "operations": plan.log[: plan.count].decode(),
            "fired": plan.fired,
            "seconds": time.monotonic() - begin,
            "stdout": Path(request["stdout"]).read_text(errors="replace"),
            "stderr": Path(request["stderr"]).read_text(errors="replace"),
        }
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
