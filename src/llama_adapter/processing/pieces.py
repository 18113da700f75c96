"""What a prompt is made of, and a prompt of which we know what every character is.

Shared by the templates of `templates` and `chat_template`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Self

from llama_adapter.conversation import Message

Span = tuple[int, int]
"""First character and the one after the last."""


class Kind(Enum):
    """What a piece of a prompt is; see the head of `templates`."""

    TEMPLATE = auto()
    CONTENT = auto()
    GAP = auto()
    ANSWER = auto()
    END = auto()
    PLACEHOLDER = auto()


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt of one kind."""

    kind: Kind
    text: str


class Rendered(str):
    """A prompt's text, and where in it answers, placeholders and untrusted texts are."""

    answers: tuple[Span, ...]
    """Each answer that is scored, with its end-of-turn token."""
    placeholders: tuple[Span, ...]
    """Each image's placeholder, in the order of the images."""
    openings: tuple[int, ...]
    """Where the prompt ends that each answer was given to; what the model writes follows."""
    said: tuple[Span, ...]
    """What users, experts and the assistant said: it holds no special token."""
    continues: bool
    """Whether it follows another text, so that no bos token opens it."""

    __slots__ = ("answers", "continues", "openings", "placeholders", "said")

    def __new__(
        cls,
        text: str,
        *,
        answers: Sequence[Span] = (),
        openings: Sequence[int] = (),
        placeholders: Sequence[Span] = (),
        said: Sequence[Span] = (),
        continues: bool = False,
    ) -> Self:
        rendered = super().__new__(cls, text)
        rendered.answers = tuple(answers)
        rendered.openings = tuple(openings)
        rendered.placeholders = tuple(placeholders)
        rendered.said = tuple(said)
        rendered.continues = continues
        return rendered

    def with_spaces(self, places: Sequence[int]) -> Rendered:
        """The same with a space before each of these characters, given in order."""
        borders = [0, *places, len(self)]
        text = " ".join(self[a:b] for a, b in pairwise(borders))

        def moved(spans: Sequence[Span]) -> list[Span]:
            return [(a + bisect_left(places, a), b + bisect_left(places, b)) for a, b in spans]

        return Rendered(
            text,
            answers=moved(self.answers),
            openings=[at + bisect_left(places, at) for at in self.openings],
            placeholders=moved(self.placeholders),
            said=moved(self.said),
            continues=self.continues,
        )


def placeholder_pieces(
    message: Message, placeholder_text: str | None, *, after: str
) -> list[Piece]:
    """One for each image of the message, where images have placeholders at all."""
    if placeholder_text is None or not message.images:
        return []
    pieces: list[Piece] = []
    for _ in message.images:
        pieces += [Piece(Kind.PLACEHOLDER, placeholder_text), Piece(Kind.TEMPLATE, " ")]
    return [*pieces[:-1], *([Piece(Kind.TEMPLATE, after)] if after else [])]
