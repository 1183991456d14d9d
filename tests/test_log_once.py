"""A warning is logged once per process, logger and text."""

import logging

from exaonepath import log_once
from exaonepath.log_once import warn_once


def test_the_same_text_is_logged_once(caplog):
    log_once.forget()
    one, two = logging.getLogger("one"), logging.getLogger("two")
    for logger, values in ((one, ("a",)), (one, ("a",)), (one, ("b",)), (two, ("a",))):
        warn_once(logger, "%s is slow", *values)
    warn_once(one, "100 % sure")
    assert [record.getMessage() for record in caplog.records] == ["a is slow", "b is slow", "a is slow", "100 % sure"]
    log_once.forget()
    warn_once(one, "%s is slow", "a")
    assert len(caplog.records) == 5
