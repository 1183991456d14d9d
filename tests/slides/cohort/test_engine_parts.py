"""Parts of the engine by themselves: the device for one thread alone, and errors of what reads ahead."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.device_gate import DeviceGate
from exaonepath.slides.cohort.read_ahead import ReadAhead
from exaonepath.slides.cohort.schedule import Schedule
from exaonepath.slides.features.reader import PatchBatch


def test_no_batch_begins_while_the_device_is_needed_alone(monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    gate, begun = DeviceGate(), threading.Event()

    def batch():
        with gate.batch():
            begun.set()

    with gate.alone(torch.device("cuda")):
        thread = threading.Thread(target=batch)
        thread.start()
        assert not begun.wait(0.1)
    thread.join(10)
    assert begun.is_set()


class Batches:
    """A reader of three batches, whose third one fails."""

    def __init__(self):
        self.cancelled = threading.Event()

    def __iter__(self):
        for i in range(2):
            yield PatchBatch(np.array([i]), np.zeros((1, 8, 8, 3), np.uint8), (), i + 1)
        raise OSError("the disk is gone")

    def cancel(self):
        self.cancelled.set()


def test_an_error_of_the_reader_comes_after_the_batches_before_it():
    ahead = ReadAhead(Batches(), 1 << 20)
    assert [next(ahead).stop, next(ahead).stop] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    ahead.close()


def test_closing_ends_a_reader_that_waits_for_room():
    reader = Batches()
    ahead = ReadAhead(reader, 0)
    ahead.close()
    assert reader.cancelled.is_set()
    assert ahead.waiting_bytes <= 192


def test_a_schedule_waits_for_slides_in_hand(tmp_path):
    schedule = Schedule([CohortSlide(tmp_path / name, name) for name in "ab"], poll=(0.01, 0.02))
    a, b = schedule.next(), schedule.next()
    assert schedule.next() == float("inf")
    schedule.done(a)
    schedule.busy(b)
    assert 0 < schedule.next() <= 0.01
    time.sleep(0.03)
    again = schedule.take()
    assert again.slide.id == "b"
    schedule.again(again)
    assert schedule.take().slide.id == "b"
    assert not schedule.empty
    schedule.done(b)
    assert schedule.next() is None
    assert schedule.empty
    threading.Timer(0.05, schedule.stop).start()
    assert schedule.take() is None
