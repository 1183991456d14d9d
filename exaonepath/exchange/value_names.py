"""Names of values of patches in formats that do not allow every name, or have columns of their own."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence

from exaonepath.exchange.slide_patches import SlidePatches
from exaonepath.files.hdf5_output import encodable
from exaonepath.log_once import warn_once

logger = logging.getLogger(__name__)


def names_of_values(slides: Iterable[SlidePatches]) -> list[str]:
    """The names of the values of all slides, each once, in the order in which they appear."""
    return list(dict.fromkeys(name for slide in slides for name in slide.values))


def stored_names(
    names: Sequence[str],
    where: str,
    *,
    reserved: Collection[str] = (),
    unsafe: str = r"[\x00-\x1f\x7f]",
    edges: str = "",
    ignore_case: bool = False,
) -> dict[str, str]:
    """The name under which each value is stored; no two are equal. A warning lists those that had to be changed.

    Args:
        names: of the values, each once.
        where: names the format in the warning ("AnnData files").
        reserved: names that the format or this package uses itself; "_value" is added to a value that is called so.
        unsafe: pattern of the characters that the format does not allow; each becomes "_".
        edges: characters that a name must not begin or end with.
        ignore_case: the format treats upper and lower case as equal.
    """

    def key(text: str) -> str:
        return text.casefold() if ignore_case else text

    own = {key(text) for text in reserved}
    allowed = {name: re.sub(unsafe, "_", encodable(name)).strip(edges) or "value" for name in names}
    wanted = {name: f"{text}_value" if key(text) in own else text for name, text in allowed.items()}
    found: dict[str, str] = {}
    taken = set(own)
    # Names that can stay are given first, so that a changed one never takes the name of another column.
    for name in sorted(names, key=lambda name: wanted[name] != name):
        stored, number = wanted[name], 1
        while key(stored) in taken:
            number += 1
            stored = f"{wanted[name]}-{number}"
        taken.add(key(stored))
        found[name] = stored
    changed = [f"{name!r} is {stored!r}" for name, stored in found.items() if name != stored]
    if changed:
        warn_once(logger, "values have other names in %s: %s", where, ", ".join(changed))  # the same for every slide
    return {name: found[name] for name in names}
