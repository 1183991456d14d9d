"""Finds the points of a regular grid that lie in a polygon, for many polygons at once, without a loop over points.

The result for each point is exactly that of `cv2.pointPolygonTest(polygon, point, False)`: all arithmetic is on
integers. A row of grid points crosses the polygon's edges at certain positions. A point is inside if the number of
crossings to its left is odd, and on the edge if it lies on a crossing, a vertex or a horizontal edge. An edge of a
dense outline is a few pixels long and grid rows are hundreds of pixels apart, so almost all edges are discarded early.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 18  # vertices processed at a time; this bounds the temporary arrays (about 150 bytes per vertex)


@dataclass(frozen=True)
class Polygons:
    """Closed polygons: `vertices` integer [M, 2] as (x, y), one polygon after the other; `lengths` [n], each >= 1."""

    vertices: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Grids:
    """One grid per polygon: points (x[p] + i * step_x, y[p] + j * step_y), i < columns[p], j < rows[p]; int64 [n] each.

    The results of all grids are in one flat array: grid after grid, each row by row; `offsets` [n + 1] holds the start
    of each grid.
    """

    x: np.ndarray
    y: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    step_x: int
    step_y: int

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rows * self.columns)])

    def places(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(grid, row, column) of flat indices."""
        offsets = self.offsets
        grid = np.searchsorted(offsets, flat, side="right") - 1
        row, column = np.divmod(flat - offsets[grid], self.columns[grid])
        return grid, row, column


class Location(NamedTuple):
    """Arrays bool [offsets[-1]]. A point on the edge is `on_edge`, and may or may not be `odd`."""

    odd: np.ndarray
    on_edge: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """True where pointPolygonTest >= 0."""
        return self.odd | self.on_edge

    @property
    def strictly_inside(self) -> np.ndarray:
        """True where pointPolygonTest > 0."""
        return self.odd & ~self.on_edge


def locate(polygons: Polygons, grids: Grids, shifts_x: tuple[int, ...] = (0,)) -> list[Location]:
    """Location of each grid's points relative to its polygon, once per shift, with the grids moved right by the shift.

    The search for the edges that the rows meet is done once for all shifts.
    """
    offsets = grids.offsets
    bins = [_Bins(grids, offsets, shift) for shift in shifts_x]
    for crossings, contacts in _meetings(polygons, grids):
        for target in bins:
            target.add(crossings, contacts)
    return [target.result() for target in bins]


class _Crossings(NamedTuple):
    """Row `row` of grid `grid` crosses an edge at x in (ceiling - 1, ceiling]; exactly at `ceiling` if `exact`."""

    grid: np.ndarray
    row: np.ndarray
    ceiling: np.ndarray
    exact: np.ndarray


class _Contacts(NamedTuple):
    """Row `row` of grid `grid` shares [low, high] with an edge that it does not cross."""

    grid: np.ndarray
    row: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _meetings(polygons: Polygons, grids: Grids) -> Iterator[tuple[_Crossings, _Contacts]]:
    owner = np.repeat(np.arange(len(polygons.lengths)), polygons.lengths)
    ends = np.cumsum(polygons.lengths)
    begins = ends - polygons.lengths
    for start in range(0, len(owner), _CHUNK):
        stop = min(start + _CHUNK, len(owner))
        p = owner[start:stop]
        before = np.arange(start - 1, stop - 1)
        before = np.where(before < begins[p], ends[p] - 1, before)
        x, y = polygons.vertices[start:stop].astype(np.int64).T
        x0, y0 = polygons.vertices[before].astype(np.int64).T
        origin, count = grids.y[p], grids.rows[p]
        # First grid row at or below each vertex. An edge is crossed by the rows from its upper end (included) to its
        # lower end (excluded). A row through a vertex then counts once if the outline passes through, 0 or 2 times at a
        # tip.
        row = -((origin - y) // grids.step_y)
        row0 = -((origin - y0) // grids.step_y)
        first, last = np.clip(np.minimum(row, row0), 0, count), np.clip(np.maximum(row, row0), 0, count)
        on_row = np.flatnonzero((origin + row * grids.step_y == y) & (row >= 0) & (row < count))
        flat = y[on_row] == y0[on_row]
        low, high = np.minimum(x, x0)[on_row], np.maximum(x, x0)[on_row]
        at = x[on_row]
        contacts = _Contacts(p[on_row], row[on_row], np.where(flat, low, at), np.where(flat, high, at))

        edge = np.flatnonzero(last > first)
        times = last[edge] - first[edge]
        edges = np.repeat(edge, times)
        rows = np.arange(len(edges)) - np.repeat(np.cumsum(times) - times - first[edge], times)
        down = y0[edges] < y[edges]
        upper_x, lower_x = np.where(down, x0[edges], x[edges]), np.where(down, x[edges], x0[edges])
        upper_y, lower_y = np.where(down, y0[edges], y[edges]), np.where(down, y[edges], y0[edges])
        below = origin[edges] + rows * grids.step_y - upper_y
        whole, rest = np.divmod(below * (lower_x - upper_x), lower_y - upper_y)
        exact = rest == 0
        yield _Crossings(p[edges], rows, upper_x + whole + ~exact, exact), contacts


class _Bins:
    """Collects the positions of crossings and contacts between the columns of the grids moved right by `shift`."""

    def __init__(self, grids: Grids, offsets: np.ndarray, shift: int) -> None:
        self._grids, self._offsets, self._shift = grids, offsets, shift
        # One extra byte: a crossing to the right of a row's last column toggles the first point of the next row. This
        # is harmless, because every row crosses a closed outline an even number of times.
        self._toggles = np.zeros(offsets[-1] + 1, np.uint8)
        self._contacts: np.ndarray | None = None

    def add(self, crossings: _Crossings, contacts: _Contacts) -> None:
        base, column, hit = self._column(crossings.grid, crossings.row, crossings.ceiling)
        np.bitwise_xor.at(self._toggles, base + column, np.uint8(1))
        on = np.flatnonzero(crossings.exact & hit)
        self._touch(base[on] + column[on], base[on] + column[on] + 1)
        base, first, _ = self._column(contacts.grid, contacts.row, contacts.low)
        _, last, _ = self._column(contacts.grid, contacts.row, contacts.high + 1)
        some = np.flatnonzero(last > first)
        self._touch(base[some] + first[some], base[some] + last[some])

    def _column(self, grid: np.ndarray, row: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat index of the row's first point; first column at or right of x; whether that column is exactly at x."""
        count, step = self._grids.columns[grid], self._grids.step_x
        distance = x - self._grids.x[grid] - self._shift
        column = -(-distance // step)
        hit = (column * step == distance) & (column >= 0) & (column < count)
        return self._offsets[grid] + row * count, np.clip(column, 0, count), hit

    def _touch(self, start: np.ndarray, stop: np.ndarray) -> None:
        if len(start):
            if self._contacts is None:
                self._contacts = np.zeros(len(self._toggles), np.int32)
            np.add.at(self._contacts, start, 1)
            np.add.at(self._contacts, stop, -1)

    def result(self) -> Location:
        odd = np.bitwise_xor.accumulate(self._toggles)[:-1].astype(bool)
        if self._contacts is None:
            return Location(odd, np.zeros_like(odd))
        return Location(odd, np.cumsum(self._contacts)[:-1] > 0)
