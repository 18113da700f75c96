"""Scenes of the miniature world: what is in an image, before any pixel or word.

A scene holds one to three objects. Within a scene no two objects share a shape, a
color or a place, so that "the star" and "the red thing" each mean one object.

Some (shape, color) combinations are *held out*: they never occur in any training
stage (vision pretraining, text pretraining, captions, instructions), and every test
scene contains at least one of them. What is measured on test scenes is therefore
never a memory of the combination.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "pink")
SIZES = ("small", "large")
PLACES = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)  # fmt: skip
"""Cells of a 3 by 3 grid, row by row from the top left."""

HELD_OUT = frozenset(
    {
        ("circle", "green"),
        ("square", "yellow"),
        ("triangle", "purple"),
        ("star", "blue"),
        ("cross", "orange"),
        ("diamond", "red"),
    }
)
"""(shape, color) pairs that only test scenes contain."""

SIGN_WORDS = (
    "open", "closed", "stop", "exit", "sale", "bank", "cafe", "hotel", "milk", "bread",
    "taxi", "bus", "park", "shop", "book", "music", "water", "fire", "news", "post",
)  # fmt: skip

MAX_OBJECTS = 3


class Split(StrEnum):
    """Which combinations of shape and color a scene may contain."""

    TRAIN = "train"
    """Never a held-out combination."""
    TEST = "test"
    """At least one held-out combination."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One colored shape in one cell of the grid."""

    shape: str
    color: str
    size: str
    place: str

    @property
    def row(self) -> int:
        """0 is the top row."""
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        """0 is the left column."""
        return PLACES.index(self.place) % 3

    @property
    def is_held_out(self) -> bool:
        return (self.shape, self.color) in HELD_OUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One to three objects, in reading order of their places, and perhaps a sign."""

    objects: tuple[SceneObject, ...]
    sign: str | None = None
    """What the sign at the lower edge says: one word, or a number from 0 to 99."""

    @property
    def split(self) -> Split:
        return Split.TEST if any(t.is_held_out for t in self.objects) else Split.TRAIN


def sample_scene(
    rng: random.Random,
    *,
    split: Split = Split.TRAIN,
    num_objects: int | None = None,
    sign_probability: float = 0.3,
) -> Scene:
    """Draw a scene of the given split; `num_objects` fixes how many objects it holds."""
    while True:
        count = num_objects or rng.choices((1, 2, 3), (0.25, 0.4, 0.35))[0]
        shapes = rng.sample(SHAPES, count)
        colors = rng.sample(COLORS, count)
        cells = sorted(rng.sample(range(9), count))
        if split is Split.TEST:
            shapes[rng.randrange(count)], _ = rng.choice(sorted(HELD_OUT))
        objects = tuple(
            SceneObject(shape=s, color=c, size=rng.choice(SIZES), place=PLACES[p])
            for s, c, p in zip(shapes, colors, cells, strict=True)
        )
        sign = None
        if rng.random() < sign_probability:
            sign = rng.choice(SIGN_WORDS) if rng.random() < 0.5 else str(rng.randrange(100))
        scene = Scene(objects=objects, sign=sign)
        if len({t.shape for t in objects}) == count and scene.split is split:
            return scene


def scene_stream(seed: int, *, split: Split, sign_probability: float = 0.3) -> Iterator[Scene]:
    """Scenes without end, the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        yield sample_scene(rng, split=split, sign_probability=sign_probability)
