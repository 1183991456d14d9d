"""Answers the questions of the page about slides: what there is, and what was computed of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, ExaonePathError, FileBusyError, MaskError
from exaonepath.files.atomic import ensure_folder
from exaonepath.files.regions import MOST_REGIONS, Region, parse_region, read_regions, write_regions
from exaonepath.files.strict_json import parse_json
from exaonepath.slides.patches.fragments import grid_step
from exaonepath.text import printable
from exaonepath.version import __version__
from exaonepath.viewer import tiles
from exaonepath.viewer.memo import Memo, NotFound, Outdated
from exaonepath.viewer.pixels import Pixels, SlideInfo
from exaonepath.viewer.slide_pool import SlidePool
from exaonepath.viz.values.analysis import MOST_CLUSTERS, Components, clusters, components
from exaonepath.viz.values.attention import Attention, AttentionUnavailable
from exaonepath.viz.values.banners import banners
from exaonepath.viz.values.library import Entry, Library
from exaonepath.viz.values.patch_values import read_vectors
from exaonepath.viz.values.results import (
    APPEARANCE,
    CONTEXT,
    Results,
    VectorSource,
    load_results,
    packed_outlines,
    version_of,
)
from exaonepath.viz.values.table import PatchTable
from exaonepath.viz.values.vectors import Match, UnitRows, VectorStore, most_similar

logger = logging.getLogger(__name__)

Query = Mapping[str, str]
Answer = tuple[np.ndarray, dict[str, str]]  # an array, and headers about it

_RESULTS_KEPT, _ARRAYS_KEPT = 16, 96
_MOST_SIMILAR = 100
_INDEXING_SECONDS = 1.0  # of one request that searches the cohort: then the page is told how far it is


@dataclass(frozen=True)
class _Member:
    """What the search of all slides knows of one; the fields are those of `Results`."""

    version: str
    vectors: dict[str, VectorSource]
    made_by: dict[str, str]


class Service:
    """The slides of an output folder, for the page. Every method may be called by several threads at once.

    Args:
        library: the slides.
        table: values of patches from a table.
        weights, device: of the slide encoder, for attention (see `Attention`).
    """

    def __init__(
        self,
        library: Library,
        table: PatchTable | None = None,
        *,
        weights: str | None = None,
        device: str = "auto",
    ) -> None:
        self._library, self._table = library, table
        self._pool = SlidePool()
        self.pixels = Pixels(self._pool)
        self._store = VectorStore()
        self._attention = Attention(weights, device)
        self._members: dict[str, _Member] = {}
        self._results, self._arrays = Memo(_RESULTS_KEPT), Memo(_ARRAYS_KEPT)
        self.arrays: dict[str, Callable[[str, Query], Answer]] = {
            "coords": self._coords,
            "fragments": self._fragments,
            "outlines": self._outlines,
            "colours": self._colours,
            "scatter": self._scatter,
            "clusters": self._clusters,
            "similarity": self._similarity,
            "attention": self._attention_row,
            "column": self._column,
        }

    def close(self) -> None:
        """Close all slides, and remove temporary files."""
        self._pool.close()
        self._store.close()

    def entry(self, key: str) -> Entry:
        """The slide with this key; `NotFound` is raised if there is none."""
        entry = self._library.get(key)
        if entry is None:
            raise NotFound("there is no such slide")
        return entry

    def slides(self) -> dict[str, Any]:
        """The list of slides, and what is common to all of them."""
        return {
            "folder": printable(self._library.out),
            "version": __version__,
            "slides": [
                {"key": entry.key, "id": printable(entry.id), "state": entry.state} for entry in self._library.entries()
            ],
        }

    def detail(self, key: str) -> dict[str, Any]:
        """Everything about one slide but its pixels and arrays. A slide file that cannot be read is stated, and so are
        results that cannot be read: each can be shown without the other."""
        entry = self.entry(key)
        info, slide_error = _tried(lambda: self.pixels.info(entry))
        results, results_error = _tried(lambda: self._load(entry))
        answer: dict[str, Any] = {
            "key": key,
            "id": printable(entry.id),
            "state": entry.state,
            "slide": None if info is None else _slide_json(info),
            "slide_error": slide_error,
            "results_error": results_error,
            "version": version_of(entry),
            "banners": banners(info, results),
            "bad_tiles": self.pixels.bad_tiles(entry),
        }
        if results is not None:
            table = self._table
            answer |= {
                "version": results.version,
                "patches": {
                    "count": len(results.coords),
                    "size": results.patch_size,
                    "step": grid_step(results.coords, results.patch_size),
                    "failed": len(results.failures),
                    "fragments": int(results.fragments.max(initial=-1)) + 1,
                },
                "vectors": list(results.vectors),
                "attention": CONTEXT in results.vectors and APPEARANCE in results.vectors,
                "columns": [] if table is None else table.described(),
                "outlines": results.outlines is not None,
                "most_clusters": MOST_CLUSTERS,
                "weights": printable(results.attrs.get("weights", "")),
                "notes": [printable(note) for note in results.notes],
            }
        return answer

    def state(self, key: str) -> dict[str, Any]:
        """Whether the slide file is still the one that is shown, and how many of its tiles could not be read."""
        entry = self.entry(key)
        info, error = _tried(lambda: self.pixels.info(entry))
        return {
            "error": error,
            "fingerprint": None if info is None else info.fingerprint,
            "bad_tiles": self.pixels.bad_tiles(entry),
            "version": version_of(entry),
        }

    def failed(self, key: str, query: Query) -> list[dict[str, Any]]:
        """The patches that could not be read, with reasons."""
        failures = self._asked(key, query).failures
        return [{"x": f.x, "y": f.y, "reason": printable(f.reason)} for f in failures]

    def similar(self, key: str, query: Query) -> dict[str, Any]:
        """The patches most similar to one, in this slide or in all slides whose vectors are comparable.

        If vectors of the cohort still have to be read, {"pending": {"done", "total"}} after about a second: ask again.
        """
        results, entry = self._asked(key, query), self.entry(key)
        kind, patch = _kind(results, query), _patch(results, query)
        count = _number(query, "count", 20, range(1, _MOST_SIMILAR + 1))
        unit = self._unit(entry, results, kind)
        if not unit.usable[patch]:
            raise NotFound("the vector of this patch is zero or not finite")
        members, left_out = [(entry, unit)], 0
        if query.get("scope") == "cohort":
            found = self._cohort(entry, results, kind)
            if isinstance(found, dict):
                return found
            members, left_out = found
        own = next(at for at, member in enumerate(members) if member[0].key == key)
        best = most_similar(self._store, [member[1] for member in members], unit.rows[patch], count, (own, patch))
        return {
            "slides": len(members),
            "left_out": left_out,
            "patches": sum(len(member[1]) for member in members),
            "matches": [self._match_json(members[match.slide][0], match) for match in best],
        }

    def _match_json(self, entry: Entry, match: Match) -> dict[str, Any]:
        results = self._load(entry)
        if match.row >= len(results.coords):
            raise Outdated(f"the results of {printable(entry.id)} were replaced during the search; search again")
        x, y = results.coords[match.row].tolist()
        where = {"patch": match.row, "x": x, "y": y, "size": results.patch_size}
        return {"key": entry.key, "id": printable(entry.id), **where, "cosine": round(match.cosine, 6)}

    def regions(self, key: str) -> dict[str, Any]:
        """The saved regions of a slide."""
        path = self._regions_path(self.entry(key))
        regions, revision, ours = read_regions(path)
        return {
            "path": printable(path),
            "revision": revision,
            "ours": ours,
            "regions": list(map(_region_json, regions)),
        }

    def save_regions(self, key: str, body: bytes) -> dict[str, Any]:
        """Save the regions {"regions": [...], "revision": ...}; the revision is that of the ones they replace."""
        entry = self.entry(key)
        value = parse_json(body, "the request", MaskError)
        if not isinstance(value, dict) or not isinstance(value.get("regions"), list):
            raise MaskError("the request holds no list of regions")
        if not isinstance(value.get("revision"), str):
            raise MaskError("the request does not state the revision of the regions that it replaces")
        if len(value["regions"]) > MOST_REGIONS:
            raise MaskError(f"more than {MOST_REGIONS} regions")
        info = self.pixels.info(entry)
        extent = info.width, info.height
        regions = [parse_region(item, extent, f"region {at}") for at, item in enumerate(value["regions"])]
        path = self._regions_path(entry)
        ensure_folder(path.parent)
        with self._pool.use(entry) as slide:
            fingerprint = slide.fingerprint()
        write_regions(path, regions, {"slide_fingerprint": fingerprint}, value["revision"])
        return self.regions(key)

    def _coords(self, key: str, query: Query) -> Answer:
        return self._asked(key, query).coords, {}

    def _fragments(self, key: str, query: Query) -> Answer:
        return self._asked(key, query).fragments, {}

    def _outlines(self, key: str, query: Query) -> Answer:
        outlines = self._asked(key, query).outlines
        return packed_outlines(outlines), {}

    def _colours(self, key: str, query: Query) -> Answer:
        found = self._components(key, query)
        return found.colours, {"x-explained": ",".join(f"{share:.4f}" for share in found.explained)}

    def _scatter(self, key: str, query: Query) -> Answer:
        found = self._components(key, query)
        return found.points, {"x-explained": ",".join(f"{share:.4f}" for share in found.explained)}

    def _clusters(self, key: str, query: Query) -> Answer:
        results, entry = self._asked(key, query), self.entry(key)
        kind, count = _kind(results, query), _number(query, "k", 8, range(2, MOST_CLUSTERS + 1))
        name = ("clusters", key, results.version, kind, count)
        return self._arrays.get(name, lambda: clusters(self._unit(entry, results, kind), count)), {}

    def _similarity(self, key: str, query: Query) -> Answer:
        results, entry = self._asked(key, query), self.entry(key)
        kind, patch = _kind(results, query), _patch(results, query)
        unit = self._unit(entry, results, kind)
        if not unit.usable[patch]:
            raise NotFound("the vector of this patch is zero or not finite")
        return self._store.cosine(unit, unit.rows[patch]), {}

    def _attention_row(self, key: str, query: Query) -> Answer:
        results = self._asked(key, query)
        patch = _patch(results, query)
        if CONTEXT not in results.vectors or APPEARANCE not in results.vectors:
            raise AttentionUnavailable("attention needs the embeddings file with its patch features")
        source = results.vectors[APPEARANCE]
        features = self._arrays.get(("features", key, results.version), lambda: read_vectors(source))
        self._check_version(self.entry(key), results)
        maps = self._attention.of_patch(
            f"{key}:{results.version}", results.attrs, features, results.coords, results.fragments, patch
        )
        block = _number(query, "block", len(maps) - 1, range(len(maps)))
        return maps[block], {"x-blocks": str(len(maps)), "x-block": str(block)}

    def _column(self, key: str, query: Query) -> Answer:
        results, entry, table = self._asked(key, query), self.entry(key), self._table
        name = query.get("name", "")
        column = None
        if table is not None:
            kept = ("column", key, results.version, name)
            column = self._arrays.get(kept, lambda: table.column(name, entry.id, results.coords))
        if column is None:
            raise NotFound("the table has no such column, or no row of this slide")
        return column.values, {}

    def _components(self, key: str, query: Query) -> Components:
        results, entry = self._asked(key, query), self.entry(key)
        kind = _kind(results, query)
        name = ("components", key, results.version, kind)
        return self._arrays.get(name, lambda: components(self._unit(entry, results, kind)))

    def _load(self, entry: Entry) -> Results:
        return self._results.get((entry.key, version_of(entry)), lambda: load_results(entry))

    def _asked(self, key: str, query: Query) -> Results:
        """The results of a slide, which have to be of the version that the request is about."""
        results = self._load(self.entry(key))
        if query.get("v") != results.version:
            raise Outdated("the results of this slide have changed since the page was loaded; load it again")
        return results

    def _member(self, entry: Entry) -> _Member:
        """What the search of all slides keeps of one: not its patches, of which there may be millions in a cohort."""
        member, version = self._members.get(entry.key), version_of(entry)
        if member is None or member.version != version:
            results = self._load(entry)
            member = _Member(results.version, results.vectors, results.made_by)
            self._members[entry.key] = member
        return member

    def _unit(self, entry: Entry, results: Results | _Member, kind: str) -> UnitRows:
        unit = self._store.get(_unit_name(entry, results, kind), results.vectors[kind])
        self._check_version(entry, results)
        return unit

    def _check_version(self, entry: Entry, results: Results | _Member) -> None:
        """To be called after vectors were read: if no file was replaced since, they belong to the other arrays."""
        if version_of(entry) != results.version:
            raise Outdated("the results of this slide have changed since the page was loaded; load it again")

    def _cohort(
        self, entry: Entry, results: Results, kind: str
    ) -> tuple[list[tuple[Entry, UnitRows]], int] | dict[str, Any]:
        """The slides with comparable vectors and how many others there are; or how far reading them is."""
        entries = [other for other in self._library.entries() if other.state in ("embedded", "features")]
        members, left_out, began = [], 0, time.monotonic()
        for done, other in enumerate(entries):
            try:
                loaded = self._member(other)
                if kind not in loaded.vectors or loaded.made_by.get(kind) != results.made_by.get(kind):
                    left_out += 1
                    continue
                ready = self._store.has(_unit_name(other, loaded, kind))
                if not ready and time.monotonic() - began > _INDEXING_SECONDS:
                    return {"pending": {"done": done, "total": len(entries)}}
                members.append((other, self._unit(other, loaded, kind)))
            except (DataFileError, FileBusyError, Outdated) as exc:
                logger.warning("%s is left out of the search: %s", other.id, exc)
                left_out += 1
        return members, left_out

    def _regions_path(self, entry: Entry) -> Any:
        return self._library.out / "regions" / f"{entry.id}.geojson"


def _tried(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, the error as text)."""
    try:
        return work(), None
    except ExaonePathError as exc:
        return None, printable(exc)


def _slide_json(info: SlideInfo) -> dict[str, Any]:
    top = tiles.Pyramid(info.width, info.height).top
    return {**asdict(info), "doubts": list(info.doubts), "tile": tiles.TILE, "overlap": tiles.OVERLAP, "top": top}


def _region_json(region: Region) -> dict[str, Any]:
    return {"name": printable(region.name), "class": printable(region.class_name), "points": region.ring}


def _unit_name(entry: Entry, results: Results | _Member, kind: str) -> str:
    return f"{entry.key}:{results.version}:{kind}"


def _kind(results: Results, query: Query) -> str:
    kind = query.get("vectors", next(iter(results.vectors), ""))
    if kind not in results.vectors:
        raise NotFound("this slide has no such vectors")
    return kind


def _patch(results: Results, query: Query) -> int:
    return _number(query, "patch", None, range(len(results.coords)))


def _number(query: Query, name: str, default: int | None, allowed: range) -> int:
    text = query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 9) or int(text) not in allowed:
        raise NotFound(f"{name} must be a number from {allowed.start} to {allowed.stop - 1}")
    return int(text)
