"""A signal inside a file operation acts, and acts after it."""

import os
import signal
import threading

import numpy as np
import pytest

from exaonepath.files.hdf5_output import atomic_h5
from exaonepath.files.raw_file import RawFile
from exaonepath.files.signals import signals_held


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def number(request):
    """A signal whose handler raises KeyboardInterrupt, as the command line sets it up."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_it_is_raised_after_the_block(number):
    steps = []

    def work():
        with signals_held():
            with signals_held():
                os.kill(os.getpid(), number)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["inner", "outer"]
    assert signal.getsignal(number) is signal.default_int_handler


def test_an_error_of_the_block_does_not_hide_it(number):
    def work():
        with signals_held():
            os.kill(os.getpid(), number)
            raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(number) is signal.default_int_handler


def test_one_that_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with signals_held():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def work():
        with signals_held():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("operation", ["write", "seek", "truncate", "sync", "close"])
def test_inside_hdf5s_own_calls_it_is_not_swallowed(number, operation, tmp_path, monkeypatch):
    original = getattr(RawFile, operation)

    def interrupted(self, *args):
        os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(RawFile, operation, interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_h5(tmp_path / "a.h5") as file:
        file.array("x", np.arange(3))
