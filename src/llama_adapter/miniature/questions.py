"""Questions about a scene, each with one right answer, and the words that matter in it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from llama_adapter.miniature.captions import (
    NUMBERS,
    RELATIONS,
    colors_sentence,
    count_sentence,
    with_article,
)
from llama_adapter.miniature.scenes import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    SIGN_WORDS,
    SIZES,
    Scene,
    SceneObject,
    Split,
)

KEYWORDS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "size": SIZES,
    "place": PLACES,
    "number": NUMBERS[1:],
    "truth": ("yes", "no"),
    "sign": SIGN_WORDS,
    "digit": tuple("0123456789"),
}
"""Words that carry the content of an answer, by category."""

_CATEGORY_OF = {word: name for name, words in KEYWORDS.items() for word in words}


@dataclass(frozen=True, kw_only=True, slots=True)
class Keyword:
    """A content word of an answer that the question does not give away."""

    word: str
    start: int
    """Where the word begins in the answer, in characters."""
    end: int
    category: str

    @property
    def alternatives(self) -> tuple[str, ...]:
        """All words of the category, this one included."""
        return KEYWORDS[self.category]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionAnswer:
    kind: str
    question: str
    answer: str
    keywords: tuple[Keyword, ...]


def key_positions(question: str, answer: str) -> tuple[Keyword, ...]:
    """The content words of an answer that the question does not contain.

    >>> [k.word for k in key_positions("how many?", "there are three things.")]
    ['three']
    """
    given = set(re.findall(r"[a-z]+|\d", question))
    return tuple(
        Keyword(
            word=match.group(),
            start=match.start(),
            end=match.end(),
            category=_CATEGORY_OF[match.group()],
        )
        for match in re.finditer(r"[a-z]+|\d", answer)
        if match.group() in _CATEGORY_OF and match.group() not in given
    )


Wordings = tuple[str, ...]
_Asked = tuple[Wordings, str] | None
"""Equivalent questions and their answer; None where the scene allows no such question."""


def _color(scene: Scene, rng: random.Random) -> _Asked:
    t = rng.choice(scene.objects)
    return (
        f"what color is the {t.shape}?",
        f"what colour is the {t.shape}?",
        f"which color does the {t.shape} have?",
        f"tell me the color of the {t.shape}.",
    ), f"the {t.shape} is {t.color}."


def _shape(scene: Scene, rng: random.Random) -> _Asked:
    t = rng.choice(scene.objects)
    return (
        f"what shape is the {t.color} thing?",
        f"what is the {t.color} thing?",
        f"which shape does the {t.color} thing have?",
    ), f"the {t.color} thing is a {t.shape}."


def _size(scene: Scene, rng: random.Random) -> _Asked:
    t = rng.choice(scene.objects)
    return (
        f"what size is the {t.shape}?",
        f"how big is the {t.shape}?",
        f"tell me the size of the {t.shape}.",
    ), f"the {t.shape} is {t.size}."


def _where(scene: Scene, rng: random.Random) -> _Asked:
    t = rng.choice(scene.objects)
    return (
        f"where is the {t.shape}?",
        f"where can i find the {t.shape}?",
        f"tell me where the {t.shape} is.",
    ), f"the {t.shape} is in the {t.place}."


def _where_color(scene: Scene, rng: random.Random) -> _Asked:
    t = rng.choice(scene.objects)
    return (
        f"where is the {t.color} thing?",
        f"where can i find the {t.color} thing?",
        f"tell me where the {t.color} thing is.",
    ), f"the {t.color} thing is in the {t.place}."


def _at(scene: Scene, rng: random.Random) -> _Asked:
    t = rng.choice(scene.objects)
    return (
        f"what is in the {t.place}?",
        f"which thing is in the {t.place}?",
        f"tell me what is in the {t.place}.",
    ), f"a {t.shape} is in the {t.place}."


def _count(scene: Scene, rng: random.Random) -> _Asked:  # noqa: ARG001
    return (
        "how many things are there?",
        "how many things do you see?",
        "count the things.",
    ), count_sentence(scene)


def _colors(scene: Scene, rng: random.Random) -> _Asked:  # noqa: ARG001
    return (
        "which colors are there?",
        "what colours do you see?",
        "name the colors.",
    ), colors_sentence(scene)


def _absent_pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A (shape, color) that no object has, often made of a shape and a color that occur."""
    pairs = {(t.shape, t.color) for t in scene.objects}
    shapes, colors = [s for s, _ in pairs], [c for _, c in pairs]
    while True:
        u = rng.random()
        shape = rng.choice(sorted(shapes) if u < 0.75 else SHAPES)
        color = rng.choice(sorted(colors) if u < 0.5 or u > 0.75 else COLORS)
        unseen = scene.split is Split.TRAIN and (shape, color) in HELD_OUT
        if (shape, color) not in pairs and not unseen:
            return shape, color


def _exist(scene: Scene, rng: random.Random) -> _Asked:
    if rng.random() < 0.5:
        t = rng.choice(scene.objects)
        shape, color, answer = t.shape, t.color, f"yes, there is {with_article(t.color)} {t.shape}."
    else:
        shape, color = _absent_pair(scene, rng)
        answer = f"no, there is no {color} {shape}."
    return (
        f"is there {with_article(color)} {shape}?",
        f"do you see {with_article(color)} {shape}?",
        f"can you find {with_article(color)} {shape}?",
    ), answer


def _relation(scene: Scene, rng: random.Random) -> _Asked:
    asked: list[tuple[SceneObject, str, SceneObject]] = []
    for t in scene.objects:
        for relation, holds in RELATIONS.items():
            others = [other for other in scene.objects if holds(other, t)]
            if len(others) == 1:
                asked.append((t, relation, others[0]))
    if not asked:
        return None
    t, relation, other = rng.choice(asked)
    return (
        f"what is {relation} the {t.shape}?",
        f"which thing is {relation} the {t.shape}?",
        f"tell me what is {relation} the {t.shape}.",
    ), f"the {other.shape} is {relation} the {t.shape}."


def _compare(scene: Scene, rng: random.Random) -> _Asked:
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a is not b]
    larger = [(a, b) for a, b in pairs if (a.size, b.size) == ("large", "small")]
    if not larger:
        return None
    if rng.random() < 0.5:
        a, b = rng.choice(larger)
        answer = f"yes, the {a.shape} is larger than the {b.shape}."
    else:
        a, b = rng.choice([pair for pair in pairs if pair not in larger])
        answer = f"no, the {a.shape} is not larger than the {b.shape}."
    return (
        f"is the {a.shape} larger than the {b.shape}?",
        f"is the {a.shape} bigger than the {b.shape}?",
    ), answer


def _sign(scene: Scene, rng: random.Random) -> _Asked:  # noqa: ARG001
    if scene.sign is None:
        return None
    return (
        "what does the sign say?",
        "what is written on the sign?",
        "read the sign.",
    ), f"the sign says {scene.sign}."


_QUESTIONS: dict[str, Callable[[Scene, random.Random], _Asked]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "where": _where,
    "where_color": _where_color,
    "count": _count,
    "exist": _exist,
    "at": _at,
    "colors": _colors,
    "relation": _relation,
    "compare": _compare,
    "sign": _sign,
}

QUESTION_TYPES: tuple[str, ...] = tuple(_QUESTIONS)

ONE_WORD_TYPES = (
    "color", "shape", "size", "where", "where_color", "count", "exist", "compare", "relation",
)  # fmt: skip
"""Types that one word can answer."""

ONE_WORD = "in one word,"


def ask(
    scene: Scene, rng: random.Random, kind: str, *, one_word: float = 0.0
) -> QuestionAnswer | None:
    """A question of the given type, or None where the scene allows none.

    With probability `one_word` a single word is asked for, where one word can answer.
    """
    asked = _QUESTIONS[kind](scene, rng)
    if asked is None:
        return None
    wordings, answer = asked
    question = rng.choice(wordings)
    keywords = key_positions(question, answer)
    if kind in ONE_WORD_TYPES and rng.random() < one_word:
        answer = f"{keywords[0].word}."
        keywords = key_positions(question, answer)
        question = f"{ONE_WORD} {question}"
    return QuestionAnswer(kind=kind, question=question, answer=answer, keywords=keywords)
