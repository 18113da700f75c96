"""Lines of text in the order in which a person reads them: rows, columns, tables.

Geometry alone. Lines come as quadrilaterals; a page that stands slightly askew is straightened
first. Lines next to each other make a row, whose parts are cells; long lines on both sides of a
gap that runs down several rows make columns, which are read one after the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Quad = tuple[tuple[float, float], ...]
"""Corners from the top left on, clockwise as the text is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A stretch of text that an engine read in one piece."""

    text: str
    confidence: float
    quad: Quad

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        xs, ys = [x for x, _ in self.quad], [y for _, y in self.quad]
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the box."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def moved(self, *, dx: float = 0.0, dy: float = 0.0, scale: float = 1.0) -> Line:
        """The line elsewhere: moved, then scaled."""
        return replace(self, quad=tuple(((x + dx) * scale, (y + dy) * scale) for x, y in self.quad))


@dataclass(frozen=True, slots=True)
class _Placed:
    """A line with its box on the straightened page."""

    index: int
    left: float
    top: float
    right: float
    bottom: float

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


_Row = list[_Placed]

_COLUMN_ROWS = 3
"""Rows that a column must have on either side of its gap."""
_COLUMN_FILL = 0.6
"""Share of a column's width that its middling line fills; cells of tables fill less."""
_COLUMN_LETTERS = 8.0
"""Width of a column's middling line, in heights of a line."""


def rows_of(lines: Sequence[Line]) -> list[list[int]]:
    """Indices of the lines, row by row from the top, each row from left to right."""
    placed = _straightened(lines)
    return [[cell.index for cell in row] for row in _read(_rows(placed))]


def skew_of(lines: Sequence[Line]) -> float:
    """The angle of the lines in radians, positive where they fall to the right.

    It is the angle in the middle of the text: half of it, by width, is at smaller angles.
    """
    angles: list[tuple[float, float]] = []
    for line in lines:
        (x0, y0), (x1, y1), (x3, y3) = line.quad[0], line.quad[1], line.quad[3]
        width, height = math.hypot(x1 - x0, y1 - y0), math.hypot(x3 - x0, y3 - y0)
        # short pieces lie at any angle
        if width > 3 * height:
            angles.append((math.atan2(y1 - y0, x1 - x0), width))
    angles.sort()
    half = sum(width for _, width in angles) / 2
    for angle, width in angles:
        half -= width
        if half <= 0:
            return angle if abs(angle) < math.pi / 4 else 0.0
    return 0.0


def _straightened(lines: Sequence[Line]) -> list[_Placed]:
    angle = skew_of(lines)
    cosine, sine = math.cos(-angle), math.sin(-angle)
    placed = []
    for index, line in enumerate(lines):
        xs = [x * cosine - y * sine for x, y in line.quad]
        # means of opposite corners: single lines may still be askew
        ys = sorted(x * sine + y * cosine for x, y in line.quad)
        placed.append(_Placed(index, min(xs), (ys[0] + ys[1]) / 2, max(xs), (ys[2] + ys[3]) / 2))
    return placed


def _rows(placed: Sequence[_Placed]) -> list[_Row]:
    """Lines whose middles lie within each other's height, from the top."""
    rows: list[_Row] = []
    for line in sorted(placed, key=lambda p: p.middle):
        # only the last few rows reach so far down
        for row in reversed(rows[-3:]):
            if _continues(row, line):
                row.append(line)
                break
        else:
            rows.append([line])
    for row in rows:
        row.sort(key=lambda p: p.left)
    rows.sort(key=lambda row: statistics.fmean(p.middle for p in row))
    return rows


def _continues(row: _Row, line: _Placed) -> bool:
    """Whether a line continues a row: level with its nearest cell, and not above or below one."""
    for cell in row:
        common = min(cell.right, line.right) - max(cell.left, line.left)
        if common > 0.3 * min(cell.right - cell.left, line.right - line.left):
            return False
    nearest = min(row, key=lambda p: max(line.left - p.right, p.left - line.right))
    lower = min(nearest.height, line.height)
    return abs(nearest.middle - line.middle) < 0.5 * lower


def _read(rows: list[_Row]) -> list[_Row]:
    """Rows in reading order: what stands above columns, each column, what stands below."""
    found = _columns(rows)
    if found is None:
        return rows
    first, last, gap = found
    left, right = _sides(rows[first:last], gap)
    return [*_read(rows[:first]), *_read(left), *_read(right), *_read(rows[last:])]


def _sides(rows: Sequence[_Row], gap: float) -> tuple[list[_Row], list[_Row]]:
    """What of the rows stands on the left of a gap, and on its right."""
    left = ([p for p in row if p.right <= gap] for row in rows)
    right = ([p for p in row if p.left >= gap] for row in rows)
    return [row for row in left if row], [row for row in right if row]


def _columns(rows: Sequence[_Row]) -> tuple[int, int, float] | None:
    """The longest run of rows that a gap parts into columns: first, last + 1, where."""
    best: tuple[int, int, float] | None = None
    pairs = [pair for row in rows for pair in pairwise(row)]
    for gap in sorted({round((a.right + b.left) / 2) for a, b in pairs if b.left > a.right}):
        start = 0
        while start < len(rows):
            end = start
            while end < len(rows) and not any(p.left < gap < p.right for p in rows[end]):
                end += 1
            longer = best is None or end - start > best[1] - best[0]
            if longer and all(_is_column(side) for side in _sides(rows[start:end], gap)):
                best = (start, end, gap)
            start = end + 1
    return best


def _is_column(rows: Sequence[_Row]) -> bool:
    lines = [line for row in rows for line in row]
    if len({round(line.middle) for line in lines}) < _COLUMN_ROWS:
        return False
    width = max(line.right for line in lines) - min(line.left for line in lines)
    usual = statistics.median(line.right - line.left for line in lines)
    height = statistics.median(line.height for line in lines)
    return usual >= _COLUMN_FILL * width and usual >= _COLUMN_LETTERS * height
