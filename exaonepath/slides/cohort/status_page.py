"""The status of an output folder as one HTML page that needs nothing else: no script, no request, pictures inside."""

from __future__ import annotations

import base64
import html
import io
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from exaonepath.files.atomic import atomic_path
from exaonepath.slides.cohort.status import STAGES, STATES, CohortStatus, SlideStatus
from exaonepath.slides.outputs import paths_in_layout
from exaonepath.text import printable

logger = logging.getLogger(__name__)

PICTURES = 500  # slides with a picture, unless another number is asked for; a picture has about 5 kB
_SIDE, _QUALITY = 160, 70  # pixels
_MOST_PIXELS = 1 << 25
_MOST_FAILURES = 1000
_COLOURS = {
    "finished": "#2e7d32",
    "empty": "#9e9e9e",
    "running": "#1565c0",
    "failed": "#c62828",
    "stale": "#ef6c00",
    "partial": "#6a1b9a",
    "new": "#cfd8dc",
}
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem; color: #1b1f27; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #d5d9e0; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; }
.bar { display: flex; height: 1rem; max-width: 60rem; border-radius: 3px; overflow: hidden; }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; border-radius: 2px; }
.muted { color: #6a7280; }
.slides { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1rem; }
figure { margin: 0; border-top: 3px solid; padding-top: .3rem; overflow-wrap: anywhere; }
figure img { max-width: 100%; display: block; } figcaption { font-size: .85rem; }
"""


def write_status_page(status: CohortStatus, path: str | os.PathLike[str], pictures: int = PICTURES) -> None:
    """Write the page, whole or not at all.

    Args:
        status: from `cohort_status`.
        path: the HTML file.
        pictures: slides with a picture of their tissue at most.

    Raises:
        OutputError: the page cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for part in _page(status, pictures):
            file.write(part)


def _page(status: CohortStatus, pictures: int) -> Iterable[str]:
    n_slides = f"{len(status.slides)} slides"
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    # Nothing is loaded, whatever a name on this page may contain.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f"<title>{_text(status.out.name)}: {n_slides}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    yield f'<h1>{_text(status.out)}</h1>\n<p class="muted">{n_slides}, as of {_text(status.time)}</p>\n'
    yield _counts(status)
    yield _seconds(status.slides)
    yield _running(status)
    yield _failures(status)
    yield from _slides(status, pictures)
    yield "</body>\n</html>\n"


def _counts(status: CohortStatus) -> str:
    counts = status.counts
    parts = [(name, counts[name]) for name in STATES if counts[name]]
    bar = "".join(f'<div style="flex:{count};background:{_COLOURS[name]}"></div>' for name, count in parts)
    keys = "".join(
        f'<li><span class="key" style="background:{_COLOURS[name]}"></span>{count} {name}{_part(name, counts)}</li>'
        for name, count in parts
    )
    patches = sum(one.state.n_patches or 0 for one in status.slides if one.state.state == "finished")
    return (
        f'<div class="bar">{bar}</div>\n<ul style="list-style:none;padding:0">{keys}</ul>\n'
        f"<p>{patches:,} patches encoded</p>\n"
    )


def _part(name: str, counts: dict[str, int]) -> str:
    if name == "finished" and counts["unreadable"]:
        return f" ({counts['unreadable']} with unreadable patches)"
    if name == "failed" and counts["quarantined"]:
        return f" ({counts['quarantined']} given up after three tries)"
    return ""


def _seconds(slides: Sequence[SlideStatus]) -> str:
    rows = []
    for stage in STAGES:
        seconds = sorted(one.stages[stage].seconds for one in slides if stage in one.stages)
        if seconds:
            median, largest = seconds[len(seconds) // 2], seconds[-1]
            rows.append((stage, len(seconds), f"{sum(seconds):,.0f}", f"{median:,.1f}", f"{largest:,.1f}"))
    if not rows:
        return ""
    header = ("stage", "slides", "seconds in all", "median", "longest")
    return "<h2>Time</h2>\n" + _table(header, rows, numbers={1, 2, 3, 4})


def _running(status: CohortStatus) -> str:
    rows = []
    for one in status.slides:
        holder = one.state.holder
        if one.state.state == "running":
            heartbeat = "" if one.state.heartbeat_s is None else f"{one.state.heartbeat_s:.0f} s ago"
            where = ("", "", "", "") if holder is None else (holder.host, holder.pid, holder.job, holder.since)
            rows.append((one.state.id, *where, heartbeat))
    if not rows:
        return ""
    header = ("slide", "host", "process", "job", "since", "last sign of life")
    return "<h2>Running</h2>\n" + _table(header, rows)


def _failures(status: CohortStatus) -> str:
    failed = [one.state for one in status.slides if one.state.state in ("failed", "stale")]
    if not failed:
        return ""
    rows = [
        (
            one.id,
            one.state,
            one.failure.tries if one.failure else "",
            one.failure.error if one.failure else "",
            f"{one.reason}{' (given up)' if one.quarantined else ''}",
        )
        for one in failed[:_MOST_FAILURES]
    ]
    more = f'<p class="muted">and {len(failed) - len(rows)} more</p>\n' if len(failed) > len(rows) else ""
    header = ("slide", "state", "tries", "error", "reason")
    return "<h2>Failed and stale</h2>\n" + _table(header, rows, numbers={2}) + more


def _slides(status: CohortStatus, pictures: int) -> Iterable[str]:
    if not status.slides:
        return
    shown = status.slides[:pictures]
    yield "<h2>Slides</h2>\n"
    if len(shown) < len(status.slides):
        yield f'<p class="muted">the first {len(shown)} of {len(status.slides)}</p>\n'
    yield '<div class="slides">\n'
    for one in shown:
        state = one.state
        picture = _picture(paths_in_layout(status.out, state.id, status.layout).mask)
        image = f'<img alt="" src="data:image/jpeg;base64,{picture}">' if picture else ""
        count = "" if state.n_patches is None else f", {state.n_patches:,} patches"
        unreadable = f", {state.n_failed} unreadable" if state.n_failed else ""
        total = sum(stage.seconds for stage in one.stages.values())
        seconds = f", {total:,.1f} s" if one.stages else ""
        yield (
            f'<figure style="border-color:{_COLOURS[state.state]}">{image}<figcaption><b>{_text(state.id)}</b><br>'
            f"{state.state}{count}{unreadable}{seconds}</figcaption></figure>\n"
        )
    yield "</div>\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f'<{tag} class="n">{_text(value)}</{tag}>' if at in right else f"<{tag}>{_text(value)}</{tag}>"
            for at, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>\n<tr>{cells('th', header)}</tr>\n{body}</table>\n"


def _picture(path: Path) -> str:
    """A small JPEG of the picture of the tissue, in base64; empty if there is none that can be read."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            if image.width * image.height > _MOST_PIXELS:
                return ""
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # decodes at a fraction of the size
            image.thumbnail((_SIDE, _SIDE))
            data = io.BytesIO()
            image.convert("RGB").save(data, "JPEG", quality=_QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        if path.exists():
            logger.info("%s is not shown (%s)", path, exc)
        return ""
    return base64.b64encode(data.getvalue()).decode("ascii")


def _text(value: object) -> str:
    return html.escape(printable(value), quote=True)
