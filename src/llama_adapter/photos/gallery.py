"""Photographs that the photos model has never seen: a caption and answers of each, as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import answer
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.photos.bundled import CAPTION_INSTRUCTION
from llama_adapter.processing.processor import LlamaAdapterProcessor

EXAMPLES = Path(__file__).parent / "examples"
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Photograph:
    """A freely licensed photograph of the package, and what is asked about it."""

    path: Path
    title: str
    photographer: str
    license: str
    source: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]
    """Each with the answers that count as right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A question about a photograph, and what the model said."""

    question: str
    answer: str
    expected: tuple[str, ...]
    is_right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A photograph, the model's caption and its answers."""

    photograph: Photograph
    caption: str
    answers: tuple[Answered, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """The cards of all photographs, or why there are none."""

    cards: tuple[Card, ...] = ()
    missing: str | None = None
    """What the photos model lacks on this machine."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: files by name."""
        return json.loads(json.dumps(asdict(self), default=lambda path: path.name))


def photographs() -> list[Photograph]:
    """The photographs of the package, in the order of their credits."""
    stored = json.loads((EXAMPLES / "credits.json").read_text())["photographs"]
    return [_photograph(entry) for entry in stored]


def _photograph(entry: dict[str, Any]) -> Photograph:
    asked = entry.pop("questions")
    return Photograph(
        path=EXAMPLES / entry.pop("file"),
        questions=tuple((each["question"], tuple(each["expected"])) for each in asked),
        **entry,
    )


def is_right(said: str, expected: tuple[str, ...]) -> bool:
    """Whether an answer says one of the expected words; `yes` or `no` must be its first.

    >>> is_right("It is a small cat.", ("cat", "kitten")), is_right("No cat.", ("yes",))
    (True, False)
    """
    words = " ".join(re.findall(r"\w+", said.lower()))
    return any(
        words.split(" ")[0] == one if one in ("yes", "no") else f" {one} " in f" {words} "
        for one in expected
    )


def answer_gallery(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    *,
    advance: Callable[[int], None],
) -> Gallery:
    """A card of each photograph, its caption and answers generated together."""
    cards = []
    settings = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS)
    for photograph in photographs():
        image = ImageRef.of(photograph.path)
        questions = [CAPTION_INSTRUCTION, *(question for question, _ in photograph.questions)]
        prompts = [Conversation.ask(question, images=[image]) for question in questions]
        caption, *said = (one.text for one in answer(model, processor, prompts, settings))
        advance(1)
        answers = tuple(
            Answered(question=q, answer=a, expected=e, is_right=is_right(a, e))
            for (q, e), a in zip(photograph.questions, said, strict=True)
        )
        cards.append(Card(photograph=photograph, caption=caption, answers=answers))
    return Gallery(cards=tuple(cards))
