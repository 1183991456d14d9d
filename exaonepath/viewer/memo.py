"""Results that are computed once and kept for a while, and the two ways in which a request can miss them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from exaonepath.errors import ExaonePathError

T = TypeVar("T")


class NotFound(ExaonePathError):
    """There is nothing at this address."""


class Outdated(ExaonePathError):
    """The address is of results or of a slide file that have been replaced since."""


class Memo:
    """Keeps the last results. Of several threads that want the same, one computes it and the others wait for it.

    Args:
        limit: number of results that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[threading.Lock, list[Any]]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, computed if it is not kept; an error is not kept."""
        with self._lock:
            lock, made = self._kept.setdefault(key, (threading.Lock(), []))
            self._kept.move_to_end(key)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        with lock:
            if not made:
                made.append(make())
            result: T = made[0]
            return result
