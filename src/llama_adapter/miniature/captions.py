"""Scenes in words: passages to read, descriptions to write, and captions read back.

Two kinds of text say what a scene holds. A *passage* is given to the decoder: its
wording, order and completeness of repetition vary. A *description* is asked of the
decoder, by one of a few instructions; its objects come in reading order of their places,
so that a description of a scene is one text. Descriptions serve as targets for
passages and, later, for images; most of them consist of the same sentences that
answer questions, so that describing exercises what answering needs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_adapter.miniature.scenes import COLORS, PLACES, SHAPES, SIZES, Scene, SceneObject

NEXT_TEXT = "text:"
"""Is between an image or an earlier text and the text that questions are about."""

NUMBERS = ("zero", "one", "two", "three")

RELATIONS: dict[str, Callable[[SceneObject, SceneObject], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
"""What holds between two objects when the first is, say, "left of" the second."""


def listed(parts: Sequence[str]) -> str:
    """Join as English does.

    >>> listed(["red", "blue", "white"])
    'red, blue and white'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def with_article(word: str) -> str:
    return f"an {word}" if word == "orange" else f"a {word}"


def noun_phrase(one: SceneObject) -> str:
    return f"a {one.size} {one.color} {one.shape}"


def count_sentence(scene: Scene) -> str:
    count = len(scene.objects)
    return "there is one thing." if count == 1 else f"there are {NUMBERS[count]} things."


def colors_sentence(scene: Scene) -> str:
    """The colors in the order of `COLORS`, whatever the order of the objects."""
    colors = sorted((t.color for t in scene.objects), key=COLORS.index)
    return f"the {'color is' if len(colors) == 1 else 'colors are'} {listed(colors)}."


def relation_sentences(first: SceneObject, second: SceneObject) -> list[str]:
    """Every relation of the first object to the second, as sentences."""
    return [
        f"the {first.shape} is {relation} the {second.shape}."
        for relation, holds in RELATIONS.items()
        if holds(first, second)
    ]


def caption_of(objects: Sequence[SceneObject]) -> str:
    """The standard caption: size, color, shape and place of each of the objects."""
    return listed([f"{noun_phrase(t)} in the {t.place}" for t in objects]) + "."


def _each(sentence: Callable[[SceneObject], str]) -> Callable[[Sequence[SceneObject]], str]:
    return lambda objects: " ".join(sentence(t) for t in objects)


def _tags(objects: Sequence[SceneObject]) -> str:
    return ", ".join(f"{t.place} {t.shape} {t.color} {t.size}" for t in objects) + "."


_facts = _each(
    lambda t: (
        f"the {t.shape} is {t.color}. the {t.shape} is {t.size}. the {t.shape} is in the {t.place}."
    )
)
_color_facts = _each(
    lambda t: f"the {t.color} thing is a {t.shape}. the {t.color} thing is in the {t.place}."
)
_places = _each(lambda t: f"{noun_phrase(t)} is in the {t.place}.")

_PASSAGE_STYLES: tuple[tuple[float, Callable[[Sequence[SceneObject]], str]], ...] = (
    (5, caption_of),
    (2, _tags),
    (1, _places),
    (1, _each(lambda t: f"there is {noun_phrase(t)} in the {t.place}.")),
    (2, _each(lambda t: f"in the {t.place} is {noun_phrase(t)}.")),
)


def sign_sentence(scene: Scene) -> str:
    """What the scene's sign says; the scene must have one."""
    return f"a sign says {scene.sign}."


def passage(
    scene: Scene, rng: random.Random, *, repeats: float = 0.5, styles: int | None = None
) -> str:
    """A text that says everything about a scene, in one of many ways.

    `repeats` is the probability that tags say the facts a second time in the opposite
    order of attributes, which makes them much easier to look up. `styles` restricts the
    wording to the first few styles.
    """
    objects = list(scene.objects)
    if rng.random() < 0.7:
        rng.shuffle(objects)
    weights, written = zip(*_PASSAGE_STYLES[:styles], strict=True)
    style = rng.choices(written, weights)[0]
    parts = [style(objects)]
    if style is not _tags and rng.random() < repeats:
        parts.insert(rng.randrange(2), f"tags: {_tags(objects)}")
    if scene.sign is not None:
        parts.insert(rng.choice((0, len(parts))), sign_sentence(scene))
    return " ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribeTask:
    """One way to describe a scene: how it is asked for and what is written."""

    name: str
    instructions: tuple[str, ...]
    """Wordings that ask for this description; the first is the usual one."""
    compose: Callable[[Scene], str]
    names_colors: bool = True

    def write(self, scene: Scene, rng: random.Random) -> str:  # noqa: ARG002
        """The description, objects in reading order; one text per scene."""
        return self.compose(scene)


def _relations(scene: Scene) -> str:
    pairs = [(a, b) for i, a in enumerate(scene.objects) for b in scene.objects[i + 1 :]]
    return " ".join(s for a, b in pairs for s in relation_sentences(a, b)) or count_sentence(scene)


def _task(
    name: str,
    instructions: tuple[str, ...],
    objects: Callable[[Sequence[SceneObject]], str],
    *,
    names_colors: bool = True,
) -> DescribeTask:
    return DescribeTask(
        name=name,
        instructions=instructions,
        compose=lambda scene: objects(scene.objects),
        names_colors=names_colors,
    )


CAPTION_TASK = _task(
    "caption",
    ("describe the picture.", "describe the scene.", "what do you see?"),
    caption_of,
)

_DESCRIBE_TASKS = (
    CAPTION_TASK,
    _task(
        "short",
        ("give a short caption.", "describe the picture in a few words."),
        lambda objects: listed([f"{with_article(t.color)} {t.shape}" for t in objects]) + ".",
    ),
    _task(
        "shapes",
        ("describe the shapes.", "list the shapes and their places."),
        lambda objects: listed([f"a {t.size} {t.shape} in the {t.place}" for t in objects]) + ".",
        names_colors=False,
    ),
    _task("tags", ("list the tags.", "write tags for the picture."), _tags),
    _task("facts", ("state the facts.", "describe the picture in detail."), _facts),
    _task(
        "color_facts",
        ("say what each color is.", "describe the picture by color."),
        _color_facts,
    ),
    _task("places", ("say what is in each place.", "describe the picture by place."), _places),
    _task(
        "where",
        ("say where the things are.", "list the places of the things."),
        _each(lambda t: f"the {t.shape} is in the {t.place}."),
        names_colors=False,
    ),
    _task(
        "colors",
        ("say how the things are colored.", "list the things and their colors."),
        _each(lambda t: f"the {t.shape} is {t.color}."),
    ),
    _task(
        "sizes",
        ("say how big the things are.", "list the things and their sizes."),
        _each(lambda t: f"the {t.shape} is {t.size}."),
        names_colors=False,
    ),
    _task(
        "things",
        ("say what there is.", "list the things."),
        _each(lambda t: f"there is {with_article(t.color)} {t.shape}."),
    ),
    DescribeTask(
        name="summary",
        instructions=("give a summary.", "summarize the picture."),
        compose=lambda scene: f"{count_sentence(scene)} {colors_sentence(scene)}",
    ),
    DescribeTask(
        name="relations",
        instructions=("say how the things lie.", "describe the layout."),
        compose=_relations,
        names_colors=False,
    ),
)


def describe_tasks() -> tuple[DescribeTask, ...]:
    """All ways to describe a scene; the first is the standard caption."""
    return _DESCRIBE_TASKS


_CATEGORIES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}
_CATEGORY_OF = {word: name for name, words in _CATEGORIES.items() for word in words}


def parse_caption(text: str) -> list[SceneObject]:
    """The objects that a description states in full, in order of appearance.

    Reads the standard caption, tags, place sentences and fact lists. A clause that says
    only some attributes joins an earlier one of the same shape; objects of which an
    attribute stays unsaid, or is said twice differently, are left out.

    >>> [thing.place for thing in parse_caption("a small red star in the north.")]
    ['north']
    """
    found: list[dict[str, set[str]]] = []
    for clause in re.split(r"[.,]|\band\b", text.lower()):
        said: dict[str, set[str]] = {}
        for word in clause.split():
            if word in _CATEGORY_OF:
                said.setdefault(_CATEGORY_OF[word], set()).add(word)
        if not said:
            continue
        shape = said.get("shape")
        known = next((f for f in found if shape and f.get("shape") == shape), said)
        if known is said:
            found.append(said)
        for category, words in said.items():
            known.setdefault(category, set()).update(words)
    return [
        SceneObject(**{category: next(iter(words)) for category, words in each.items()})
        for each in found
        if len(each) == len(_CATEGORIES) and all(len(words) == 1 for words in each.values())
    ]
