"""Lines of text in the order in which a person reads them: rows, columns, tables.

Geometry alone. Lines come as quadrilaterals; a page that stands slightly askew is straightened
first. Lines beside each other make a row, whose parts are cells; long lines on both sides of a
gap that runs down several rows make columns, which are read one after the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
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
    """The angle of the lines in radians, positive where they fall to the right."""
    angles = []
    for line in lines:
        (x0, y0), (x1, y1) = line.quad[0], line.quad[1]
        width, height = math.hypot(x1 - x0, y1 - y0), _side(line)
        # short pieces lie at any angle
        if width > 3 * height:
            angles.append((math.atan2(y1 - y0, x1 - x0), width))
    if not angles:
        return 0.0
    angles.sort()
    half, passed = sum(width for _, width in angles) / 2, 0.0
    for angle, width in angles:
        passed += width
        if passed >= half:
            return angle if abs(angle) < math.pi / 4 else 0.0
    return 0.0


def _side(line: Line) -> float:
    (x0, y0), (x3, y3) = line.quad[0], line.quad[3]
    return math.hypot(x3 - x0, y3 - y0)


def _straightened(lines: Sequence[Line]) -> list[_Placed]:
    angle = skew_of(lines)
    cosine, sine = math.cos(-angle), math.sin(-angle)
    placed = []
    for index, line in enumerate(lines):
        xs = [x * cosine - y * sine for x, y in line.quad]
        ys = [x * sine + y * cosine for x, y in line.quad]
        # means of opposite corners: single lines may still be askew
        ys.sort()
        placed.append(_Placed(index, min(xs), (ys[0] + ys[1]) / 2, max(xs), (ys[2] + ys[3]) / 2))
    return placed


def _rows(placed: Sequence[_Placed]) -> list[_Row]:
    """Lines whose middles lie within each other's height, from the top."""
    rows: list[_Row] = []
    for line in sorted(placed, key=lambda p: p.middle):
        # only the last few rows reach so far down
        for row in reversed(rows[-3:]):
            if _beside(row, line):
                row.append(line)
                break
        else:
            rows.append([line])
    for row in rows:
        row.sort(key=lambda p: p.left)
    rows.sort(key=lambda row: statistics.fmean(p.middle for p in row))
    return rows


def _beside(row: _Row, line: _Placed) -> bool:
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
    left = [[p for p in row if p.right <= gap] for row in rows[first:last]]
    right = [[p for p in row if p.left >= gap] for row in rows[first:last]]
    return [
        *_read(rows[:first]),
        *_read([row for row in left if row]),
        *_read([row for row in right if row]),
        *_read(rows[last:]),
    ]


def _columns(rows: Sequence[_Row]) -> tuple[int, int, float] | None:
    """The longest run of rows that a gap parts into columns: first, last + 1, where."""
    best: tuple[int, int, float] | None = None
    gaps = {
        round((one.right + other.left) / 2)
        for row in rows
        for one, other in pairwise(row)
        if other.left > one.right
    }
    for gap in sorted(gaps):
        start = 0
        while start < len(rows):
            end = start
            while end < len(rows) and not any(p.left < gap < p.right for p in rows[end]):
                end += 1
            longer = best is None or end - start > best[1] - best[0]
            if longer and _are_columns(rows[start:end], gap):
                best = (start, end, gap)
            start = end + 1
    return best


def _are_columns(rows: Sequence[_Row], gap: float) -> bool:
    left = [p for row in rows for p in row if p.right <= gap]
    right = [p for row in rows for p in row if p.left >= gap]
    sides = (left, right)
    if any(len({round(p.middle) for p in side}) < _COLUMN_ROWS for side in sides):
        return False
    for side in sides:
        width = max(p.right for p in side) - min(p.left for p in side)
        line = statistics.median(p.right - p.left for p in side)
        height = statistics.median(p.height for p in side)
        if line < _COLUMN_FILL * width or line < _COLUMN_LETTERS * height:
            return False
    return True
