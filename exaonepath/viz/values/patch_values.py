"""What patches are coloured by: attention, similarity, clusters, principal components, a column, fragments."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.hdf5 import open_h5
from exaonepath.text import printable
from exaonepath.viz.values.analysis import MOST_CLUSTERS, NO_CLUSTER, clusters, components
from exaonepath.viz.values.attention import Attention, AttentionUnavailable
from exaonepath.viz.values.library import Entry
from exaonepath.viz.values.results import APPEARANCE, CONTEXT, Results, VectorSource, version_of
from exaonepath.viz.values.table import PatchTable
from exaonepath.viz.values.vectors import UnitRows, VectorStore

By = Literal["attention", "similarity", "cluster", "pca", "component", "fragment", "column"]
MOST_COLOURS = 12  # categories that have a colour of their own
_OF_ONE_PATCH = ("attention", "similarity")
_MOST_ATTENTION = 0.99  # a few patches get most of the attention: the colours end where 1 % lie above
_LONGEST_NAME = 60  # characters of a column in the name of a file
_TAIL = 0.01  # share of a component's values beyond either end of the colours


@dataclass(frozen=True)
class Question:
    """What is to be shown of the patches of a slide.

    Attributes:
        by: "attention" (that patches receive), "similarity" (cosine to a patch), "cluster" (k-means of the vectors),
            "pca" (three principal components as one colour), "component" (the first one), "fragment", "column".
        patch: number of the patch that attends or that is compared with; None: attention is averaged over all patches.
        at: (x, y) in level-0 pixels, in place of `patch`: the patch there.
        vectors: "context", the slide encoder's output, or "appearance", the patch encoder's; None: context, or what
            there is.
        clusters: number of clusters.
        block: block of the slide encoder that attention is shown of, from 0; None: the last one.
        column: name of the column.

    Raises:
        SettingsError: a value cannot be used, or does not belong to `by`.
    """

    by: By
    patch: int | None = None
    at: tuple[float, float] | None = None
    vectors: str | None = None
    clusters: int = 8
    block: int | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise SettingsError(f"patches can be coloured by {', '.join(get_args(By))}, not by {self.by!r}")
        if self.patch is not None and self.at is not None:
            raise SettingsError("name a patch by its number or by its position, not by both")
        chosen = self.patch is not None or self.at is not None
        if chosen and self.by not in _OF_ONE_PATCH:
            raise SettingsError(f"a patch is chosen for {' and '.join(_OF_ONE_PATCH)}, not for {self.by}")
        if self.by == "similarity" and not chosen:
            raise SettingsError("similarity is that to a patch: name it by its number or by its position")
        if not 2 <= self.clusters <= MOST_CLUSTERS:
            raise SettingsError(f"2 to {MOST_CLUSTERS} clusters can be shown, not {self.clusters}")
        if self.vectors not in (None, CONTEXT, APPEARANCE):
            raise SettingsError(f"vectors are {CONTEXT} or {APPEARANCE}, not {self.vectors!r}")
        if self.block is not None and self.by != "attention":
            raise SettingsError(f"a block is chosen for attention, not for {self.by}")
        if (self.column is None) == (self.by == "column"):
            raise SettingsError("a column is named for by='column', and only for that")

    @property
    def of_one_slide(self) -> bool:
        """Whether it makes sense for one slide only, because it names a patch."""
        return self.patch is not None or self.at is not None


@dataclass(frozen=True)
class PatchValues:
    """A number, a category or a colour for each patch of a slide, and what it is.

    Attributes:
        title: what is shown, a phrase: "Similarity to patch 12".
        about: how it was computed, a phrase.
        label: what a number is, for the colour bar.
        values: float32 [N]; NaN where there is none. The number of the category, if there are categories.
        categories: names of the categories; empty for numbers.
        colours: uint8 [N, 3], if values are shown in colours of their own (PCA).
        limits: the values at the two ends of the colour map.
        beyond: whether values lie below and above the limits; they have the colours of the ends.
        marked: the patch that attends, or that is compared with.
        missing: why a patch has no value.
        unit: float32 [N, D], vectors of length 1 by which the patches of a category can be ordered; None if there are
            none.
    """

    title: str
    about: str
    label: str
    values: np.ndarray
    categories: tuple[str, ...] = ()
    colours: np.ndarray | None = None
    limits: tuple[float, float] = (0.0, 1.0)
    beyond: tuple[bool, bool] = (False, False)
    marked: int | None = None
    missing: str = "no value"
    unit: UnitRows | None = None

    def __len__(self) -> int:
        return len(self.values)


def values_name(results: Results, question: Question) -> str:
    """The part of file names that says what is shown: "similarity-12".

    Raises:
        SettingsError: there is no such patch.
    """
    if question.by == "column":
        return "column-" + re.sub(r"[^\w.-]", "_", str(question.column))[:_LONGEST_NAME]
    names = {"cluster": f"clusters-{question.clusters}", "component": "component-1", "fragment": "fragments"}
    parts = [names.get(question.by, question.by)]
    if question.by in _OF_ONE_PATCH:
        marked = _marked(results, question)
        parts.append("mean" if marked is None else str(marked))
    parts += [] if question.block is None else [f"block-{question.block}"]
    parts += [] if question.vectors is None else [question.vectors]
    return "-".join(parts)


def patch_values(
    entry: Entry,
    results: Results,
    question: Question,
    *,
    store: VectorStore,
    attention: Attention,
    table: PatchTable | None = None,
) -> PatchValues:
    """The answer to a question about the patches of a slide.

    Args:
        entry: the slide.
        results: its results.
        question: what is to be shown.
        store: keeps the vectors.
        attention: computes attention.
        table: the table of the column.

    Raises:
        SettingsError: there is no such patch, block or column, or no table.
        DataFileError: the vectors that are needed were not kept, or the results changed meanwhile.
        AttentionUnavailable: attention cannot be computed (see `Attention.of_patch`).
    """
    if question.by == "fragment":
        return _fragments(results)
    if question.by == "column":
        return _column(entry, results, str(question.column), table)
    marked = _marked(results, question)
    if question.by == "attention":
        return _attention(entry, results, question, marked, attention)
    kind = _kind(entry, results, question.vectors)
    unit = store.get(f"{entry.key}:{results.version}:{kind}", results.vectors[kind]) if kind else _no_rows()
    _check_unchanged(entry, results)
    of = f"{kind} vectors" if kind else "no patches"
    if question.by == "similarity":
        assert marked is not None
        return _similarity(store, unit, marked, of)
    if question.by == "cluster":
        return _clusters(unit, question.clusters, of)
    return _components(unit, of, as_colours=question.by == "pca")


def _fragments(results: Results) -> PatchValues:
    names = np.unique(results.fragments)
    values = np.searchsorted(names, results.fragments).astype(np.float32)
    categories = tuple(f"fragment {name}" for name in names.tolist())
    return PatchValues("Tissue fragments", "contours of the tissue", "", values, categories)


def _column(entry: Entry, results: Results, name: str, table: PatchTable | None) -> PatchValues:
    if table is None:
        raise SettingsError(f"the column {name} is that of a table: name the file (--table)")
    if name not in table.names:
        raise SettingsError(f"{table.path} has no column {name}; it has {', '.join(table.names)}")
    column = table.column(name, entry.id, results.coords)
    if column is None and len(results.coords):
        raise SettingsError(
            f"{table.path} has no row for a patch of {entry.id}: neither the slide's name nor the positions match"
        )
    values = np.empty(0, np.float32) if column is None else column.values
    categories = () if column is None else column.categories
    label = printable(name)
    shown = PatchValues(
        label,
        f"column of {printable(table.path.name)}",
        label,
        values,
        tuple(map(printable, categories)),
        missing="not in the table",
    )
    return _most_frequent(shown) if categories else replace(shown, limits=_range(values))


def _attention(
    entry: Entry, results: Results, question: Question, marked: int | None, attention: Attention
) -> PatchValues:
    whose = "all patches" if marked is None else f"patch {marked}"
    title = f"Attention from {whose}" + (" (mean)" if marked is None else "")
    if not len(results.coords):
        return PatchValues(title, "no patches", "attention", np.empty(0, np.float32))
    _require_vectors(entry, results)
    if CONTEXT not in results.vectors or APPEARANCE not in results.vectors:
        raise AttentionUnavailable(f"attention needs the embeddings of {entry.id} next to its patch features")
    features = read_vectors(results.vectors[APPEARANCE])
    _check_unchanged(entry, results)
    key = f"{entry.key}:{results.version}"
    maps = attention.of_patch(key, results.attrs, features, results.coords, results.fragments, marked)
    block = len(maps) - 1 if question.block is None else question.block
    if not 0 <= block < len(maps):
        raise SettingsError(f"the slide encoder has blocks 0 to {len(maps) - 1}, not {block}")
    values = maps[block]
    about = f"block {block} of 0 to {len(maps) - 1}, mean over heads"
    high = float(np.quantile(values, _MOST_ATTENTION, method="lower")) or float(values.max())
    # The mean differs little between patches: colours from 0 on would hide it.
    low = 0.0 if marked is not None else float(values.min())
    limits, beyond = (low, high), (False, bool(values.max() > high))
    return PatchValues(title, about, "attention", values, limits=limits, beyond=beyond, marked=marked)


def _similarity(store: VectorStore, unit: UnitRows, marked: int, of: str) -> PatchValues:
    if not unit.usable[marked]:
        raise SettingsError(f"the vector of patch {marked} is zero or not finite: nothing is similar to it")
    values = store.cosine(unit, unit.rows[marked])
    others = np.delete(values, marked)
    # The patch itself, whose cosine is 1, would compress the colours of all others.
    limits = _range(others if np.isfinite(others).any() else values)
    return PatchValues(
        f"Similarity to patch {marked}",
        of,
        "cosine",
        values,
        limits=limits,
        beyond=(False, bool(limits[1] < values[marked])),
        marked=marked,
        missing="vector not usable",
    )


def _clusters(unit: UnitRows, count: int, of: str) -> PatchValues:
    labels = clusters(unit, count)
    usable = labels != NO_CLUSTER
    values = np.where(usable, labels, np.nan).astype(np.float32)
    categories = tuple(f"cluster {number + 1}" for number in np.unique(labels[usable]).tolist())
    about = f"k-means of {of}"
    return PatchValues("Clusters", about, "", values, categories, missing="vector not usable", unit=unit)


def _components(unit: UnitRows, of: str, *, as_colours: bool) -> PatchValues:
    found = components(unit)
    first = np.where(unit.usable, found.points[:, 0], np.nan).astype(np.float32)
    shares = [f"{share:.0%}" for share in found.explained]
    if as_colours:
        colours = np.where(unit.usable[:, None], found.colours, 0).astype(np.uint8)
        about = f"{of}; similar colour = similar vector; {', '.join(shares)} of the variance"
        return PatchValues(
            "Principal components", about, "component 1", first, colours=colours, missing="vector not usable"
        )
    finite = first[np.isfinite(first)]
    limits = (0.0, 1.0)
    if len(finite):
        low, high = np.quantile(finite, (_TAIL, 1 - _TAIL))
        limits = (float(low), float(high))
    beyond = bool((finite < limits[0]).any()), bool((finite > limits[1]).any())
    about = f"{of}; {shares[0]} of the variance"
    return PatchValues(
        "First principal component",
        about,
        "component 1",
        first,
        limits=limits,
        beyond=beyond,
        missing="vector not usable",
    )


def _most_frequent(shown: PatchValues) -> PatchValues:
    """With more categories than colours, the rare ones become one."""
    if len(shown.categories) <= MOST_COLOURS:
        return shown
    known = shown.values[np.isfinite(shown.values)].astype(np.int64)
    counts = np.bincount(known, minlength=len(shown.categories))
    kept = np.sort(np.argsort(-counts, kind="stable")[: MOST_COLOURS - 1])
    number = np.full(len(shown.categories), MOST_COLOURS - 1, np.float32)
    number[kept] = np.arange(len(kept))
    values = shown.values.copy()
    values[np.isfinite(shown.values)] = number[known]
    others = len(shown.categories) - len(kept)
    return replace(shown, values=values, categories=(*(shown.categories[at] for at in kept), f"{others} others"))


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def _marked(results: Results, question: Question) -> int | None:
    count = len(results.coords)
    if question.at is not None:
        x, y = question.at
        inside = ((results.coords <= question.at) & (results.coords + results.patch_size > question.at)).all(axis=1)
        if not inside.any():
            raise SettingsError(f"no patch of the slide lies at {x:g}, {y:g} (level-0 pixels)")
        distance = ((results.coords + results.patch_size / 2 - question.at) ** 2).sum(axis=1)
        return int(np.where(inside, distance, np.inf).argmin())
    if question.patch is None:
        return None
    if not 0 <= question.patch < count:
        existing = f"patches 0 to {count - 1}" if count else "no patches"
        raise SettingsError(f"there is no patch {question.patch}: the slide has {existing}")
    return question.patch


def _kind(entry: Entry, results: Results, wanted: str | None) -> str | None:
    if not len(results.coords):
        return None
    _require_vectors(entry, results)
    if wanted is not None and wanted not in results.vectors:
        raise DataFileError(
            f"the results of {entry.id} hold {' and '.join(results.vectors)} vectors, not {wanted} ones"
        )
    return wanted or next(iter(results.vectors))


def _require_vectors(entry: Entry, results: Results) -> None:
    if not results.vectors:
        kept = "embedding" in entry.files
        what = "were kept without patch embeddings (--keep)" if kept else "hold no features or embeddings yet"
        raise DataFileError(f"the results of {entry.id} {what}; encode the slide (again) with --keep all")


def _no_rows() -> UnitRows:
    return UnitRows(np.empty((0, 1), np.float32), np.empty(0, bool))


def _check_unchanged(entry: Entry, results: Results) -> None:
    if version_of(entry) != results.version:
        raise DataFileError(f"the results of {entry.id} were replaced while they were read; run again")


def read_vectors(source: VectorSource) -> np.ndarray:
    """The vectors as they are stored, float32 [N, C].

    Raises:
        DataFileError: the file is damaged.
    """
    with open_h5(source.path, [source.dataset]) as file:
        dataset = file.dataset(source.dataset, "f", (None, None))
        first, last = source.columns
        values = np.empty((len(dataset), last - first), np.float32)
        for start, part in dataset.parts():
            values[start : start + len(part)] = part[:, first:last]
    return values
