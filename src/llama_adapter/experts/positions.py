"""Places in a picture in words, and things that are alike in one phrase; geometry alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_NUMBERS = """
    no one two three four five six seven eight nine ten eleven twelve
""".split()  # noqa: SIM905
_IRREGULAR = {
    "person": "people", "child": "children", "man": "men", "woman": "women", "mouse": "mice",
    "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "foot": "feet",
    "tooth": "teeth", "goose": "geese", "deer": "deer", "fish": "fish", "leaf": "leaves",
}  # fmt: skip
_SILENT = ("hour", "honest")
_LIKE_YOU = ("uni", "use", "eu", "one")


def place(box: Box, *, width: float, height: float) -> str:
    """Where the middle of a box is: a cell of a three by three grid.

    >>> place((0, 0, 10, 10), width=100, height=100)
    'top left'
    >>> place((40, 80, 60, 100), width=100, height=100)
    'bottom'
    >>> place((0, 0, 95, 99), width=100, height=100)
    'filling the picture'
    """
    left, top, right, bottom = box
    if (right - left) * (bottom - top) >= 0.8 * width * height:
        return "filling the picture"
    x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    return " ".join(word for word in (row, column) if word) or "centre"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One thing a detector saw."""

    label: str
    confidence: float
    box: Box


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Things of one label in one place."""

    label: str
    where: str
    members: tuple[Seen, ...]

    @property
    def text(self) -> str:
        """As `two dogs, left`."""
        return f"{counted(len(self.members), self.label)}, {self.where}"


def group(things: Sequence[Seen], *, width: float, height: float) -> list[Group]:
    """Things of one label and place together, the largest groups' members first by area.

    Boxes of one label that all but coincide are one thing.
    """
    found: dict[tuple[str, str], list[Seen]] = {}
    for thing in without_doubles(things):
        where = place(thing.box, width=width, height=height)
        found.setdefault((thing.label, where), []).append(thing)
    groups = [
        Group(label=label, where=where, members=tuple(members))
        for (label, where), members in found.items()
    ]
    return sorted(groups, key=lambda g: -max(area(m.box) for m in g.members))


def without_doubles(things: Sequence[Seen], *, overlap: float = 0.8) -> list[Seen]:
    """The surest of each set of boxes of one label that overlap as much."""
    kept: list[Seen] = []
    for thing in sorted(things, key=lambda t: -t.confidence):
        twins = (k for k in kept if k.label == thing.label)
        if all(intersection_over_union(k.box, thing.box) < overlap for k in twins):
            kept.append(thing)
    return kept


def area(box: Box) -> float:
    """Width times height; nothing for a box that is inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection_over_union(one: Box, other: Box) -> float:
    """Share of their common area in the area that either covers.

    >>> intersection_over_union((0, 0, 2, 1), (1, 0, 3, 1))
    0.3333333333333333
    """
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    common = area((left, top, right, bottom)) if right > left and bottom > top else 0.0
    union = area(one) + area(other) - common
    return common / union if union > 0 else 0.0


def counted(count: int, label: str) -> str:
    """A number and a noun.

    >>> counted(1, "orange"), counted(2, "bus"), counted(3, "wine glass"), counted(1, "umbrella")
    ('an orange', 'two buses', 'three wine glasses', 'an umbrella')
    """
    if count == 1:
        lower = label.lower()
        vowel = lower[:1] in "aeiou" and not lower.startswith(_LIKE_YOU)
        return f"{'an' if vowel or lower.startswith(_SILENT) else 'a'} {label}"
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"{number} {plural(label)}"


def plural(noun: str) -> str:
    """The plural of a noun's last word.

    >>> plural("teddy bear"), plural("person"), plural("berry"), plural("bench")
    ('teddy bears', 'people', 'berries', 'benches')
    """
    head, space, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        made = _IRREGULAR[last]
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        made = f"{last[:-1]}ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        made = f"{last}es"
    else:
        made = f"{last}s"
    return f"{head}{space}{made}"
