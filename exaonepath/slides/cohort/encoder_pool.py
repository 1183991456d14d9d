"""The encoders of a run: loaded when a slide needs them, and few at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from exaonepath.errors import ExaonePathError

E = TypeVar("E")

MOST_LOADED = 2


class EncoderPool(Generic[E]):
    """Encoders by the weights that a user names; of the last used ones, `MOST_LOADED` are kept.

    Args:
        load: loads the encoders of some weights.
        most: encoders that are kept.
    """

    def __init__(self, load: Callable[[str], E], most: int = MOST_LOADED) -> None:
        self._load, self._most = load, most
        self._loaded: OrderedDict[str, E] = OrderedDict()
        self._errors: dict[str, ExaonePathError] = {}

    def get(self, weights: str) -> E:
        """The encoders of these weights.

        Raises:
            ExaonePathError: they cannot be loaded; weights that could not be loaded once are not tried again.
        """
        if weights in self._errors:
            raise self._errors[weights]
        if weights in self._loaded:
            self._loaded.move_to_end(weights)
            return self._loaded[weights]
        while len(self._loaded) >= self._most:  # before the new ones are loaded: memory may not suffice for one more
            self._loaded.popitem(last=False)
        try:
            self._loaded[weights] = self._load(weights)
        except ExaonePathError as exc:
            self._errors[weights] = exc
            raise
        return self._loaded[weights]
