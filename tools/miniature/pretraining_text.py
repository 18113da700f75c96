"""Documents for pretraining the decoder: text only, scenes of the training split only.

A document is a passage followed by restatements and by questions with answers. It is cut
into segments (the passage, each question with its answer) and every piece has a weight
in the loss: what follows from the text before counts, what is drawn at random hardly.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from llama_adapter.miniature.captions import (
    NEXT_TEXT,
    count_sentence,
    passage,
    relation_sentences,
    with_article,
)
from llama_adapter.miniature.instructions import (
    KNOWLEDGE,
    sample_question,
    sample_task,
)
from llama_adapter.miniature.questions import QUESTION_TYPES
from llama_adapter.miniature.scenes import Scene, sample_scene

CHANCE_WEIGHT = 0.03
"""Weight of text that cannot be foreseen: passages and questions."""

ANSWER_WEIGHT = 1.0


DOCUMENT_LENGTH = 750
"""Documents grow until they have this many characters, so that batches need little padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a document."""

    text: str
    weight: float
    segment: int
    """Passage and each question with its answer are segments of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text to read, in pieces, and the scene it is about."""

    pieces: tuple[Piece, ...]
    scene: Scene | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """How hard the documents are."""

    repeats: float = 0.5
    """Probability that a passage says its facts twice, in opposite orders."""
    restated: float = 0.15
    """Share of documents that restate the passage in single facts instead of questions."""
    describing: float = 0.2
    """Share of questions that ask for a description."""
    kinds: tuple[str, ...] = QUESTION_TYPES
    """Types of the other questions; one named twice is asked twice as often."""
    styles: int | None = None
    """How many of the styles of passages occur, the commonest first."""
    one_word: float = 0.1
    """Share of questions that want one word."""
    signs: float = 0.4
    """Share of scenes with a sign."""
    crowded: float = 0.0
    """Share of scenes that hold three things for certain."""
    caption_weight: float = 1.0
    """How often the full caption is asked for, against 1 for every other way to describe."""
    distracted: float = 0.0
    """Share of documents in which another scene's passage comes first; the last one counts."""


EASY = Curriculum(
    repeats=0.95,
    restated=0.05,
    describing=0.1,
    kinds=("color", "shape", "size", "where", "where_color", "at"),
    styles=2,
    one_word=0.0,
)
"""Nothing but looking up one thing."""


STANDARD = Curriculum()

LATE = Curriculum(kinds=(*QUESTION_TYPES, "sign", "exist", "compare"), signs=0.6)
"""More of what is learnt late."""

LAST = Curriculum(
    kinds=("color", "shape", "size", "sign", "compare", "count", "colors")
    + ("where", "where_color", "at", "exist", "relation") * 2,
    describing=0.3,
)
"""More of what is learnt last."""


HARDEST = Curriculum(
    kinds=("color", "shape", "size", "sign", "compare", "count", "colors", "where", "where_color")
    + ("at",) * 4
    + ("relation",) * 3
    + ("exist",) * 2,
    describing=0.35,
    one_word=0.2,
)


FINISH = Curriculum(
    repeats=0.3,
    kinds=("color", "shape", "size", "sign", "compare", "count", "colors", "exist")
    + ("where", "where_color", "at") * 3
    + ("relation",) * 5,
    describing=0.35,
    one_word=0.15,
    crowded=0.5,
)
"""Three things at once, and mostly said only once."""


DESCRIBING = Curriculum(
    repeats=0.3,
    kinds=(*QUESTION_TYPES, "where", "where_color", "at", "relation"),
    describing=0.65,
    crowded=0.5,
    caption_weight=5.0,
)
"""Whole scenes, thing after thing in reading order, whatever the order of the passage."""


DISTRACTED = replace(DESCRIBING, describing=0.4, distracted=0.55)
"""Two passages, of which the last one counts."""


def course(done: float) -> Curriculum:
    """What to read after a share of the run: the longer, the less is said twice."""
    stages = (
        (0.882, DISTRACTED), (0.5, DESCRIBING), (0.368, FINISH), (0.243, HARDEST), (0.206, LAST),
        (0.051, LATE), (0.02, STANDARD), (0.0, EASY),
    )  # fmt: skip
    stage = next(stage for start, stage in stages if done >= start)
    if stage not in (STANDARD, LATE, LAST, HARDEST):
        return stage
    return replace(stage, repeats=max(0.4, 0.95 - (done - 0.02) * 6.8))


def _fact(scene: Scene, rng: random.Random) -> str:
    t = rng.choice(scene.objects)
    facts = [
        f"the {t.shape} is {t.color}.",
        f"the {t.shape} is {t.size}.",
        f"the {t.shape} is in the {t.place}.",
        f"the {t.color} thing is a {t.shape}.",
        f"the {t.color} thing is in the {t.place}.",
        f"a {t.size} {t.color} {t.shape} is in the {t.place}.",
        f"there is {with_article(t.color)} {t.shape}.",
        count_sentence(scene),
    ]
    for other in scene.objects:
        facts += relation_sentences(t, other)
    return rng.choice(facts)


def _question_pieces(question: str, answer: str, segment: int) -> list[Piece]:
    return [
        Piece(text=f"question: {question} answer:", weight=CHANCE_WEIGHT, segment=segment),
        Piece(text=answer, weight=ANSWER_WEIGHT, segment=segment),
    ]


def _length(pieces: list[Piece]) -> int:
    return sum(len(p.text) for p in pieces)


def _knowledge_document(rng: random.Random) -> list[Piece]:
    pieces: list[Piece] = []
    for segment, (question, answer) in enumerate(rng.sample(KNOWLEDGE, 14)):
        if rng.random() < 0.5:
            pieces.append(Piece(text=answer, weight=CHANCE_WEIGHT, segment=segment))
        else:
            pieces += _question_pieces(question, answer, segment)
    return pieces


def sample_document(rng: random.Random, curriculum: Curriculum = STANDARD) -> Document:
    """One document about one scene; now and then one about no scene."""
    if rng.random() < 0.03:
        return Document(pieces=tuple(_knowledge_document(rng)))
    scene = sample_scene(
        rng,
        sign_probability=curriculum.signs,
        num_objects=3 if rng.random() < curriculum.crowded else None,
    )
    text = passage(scene, rng, repeats=curriculum.repeats, styles=curriculum.styles)
    pieces = []
    if rng.random() < curriculum.distracted:
        other = passage(sample_scene(rng), rng, repeats=curriculum.repeats)
        pieces.append(Piece(text=other, weight=CHANCE_WEIGHT, segment=0))
        text = f"{NEXT_TEXT} {text}"
    segment = len(pieces)
    pieces.append(Piece(text=text, weight=CHANCE_WEIGHT, segment=segment))
    if rng.random() < curriculum.restated:
        segment += 1
        pieces.append(Piece(text="in other words:", weight=CHANCE_WEIGHT, segment=segment))
        while _length(pieces) < DOCUMENT_LENGTH:
            pieces.append(Piece(text=_fact(scene, rng), weight=0.5, segment=segment))
    while _length(pieces) < DOCUMENT_LENGTH:
        segment += 1
        pieces += _question_pieces(*_question(scene, rng, curriculum), segment)
    return Document(pieces=tuple(pieces), scene=scene)


def _question(scene: Scene, rng: random.Random, curriculum: Curriculum) -> tuple[str, str]:
    if rng.random() < curriculum.describing:
        task = sample_task(rng, caption_weight=curriculum.caption_weight)
        return rng.choice(task.instructions), task.write(scene, rng)
    asked = sample_question(scene, rng, one_word=curriculum.one_word, kinds=curriculum.kinds)
    return asked.question, asked.answer
