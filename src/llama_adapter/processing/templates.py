"""Prompt templates: a conversation becomes one text, and we know what every character is.

A template lays a conversation out as pieces, each of one kind:

    TEMPLATE   wording of the template, trusted: its special tokens count
    CONTENT    what users and experts wrote, untrusted
    ANSWER     what the assistant said, untrusted and scored in training
    END        the end-of-turn token after an answer, trusted and scored
    SLOT       the placeholder where an image is read, trusted

Untrusted pieces cannot forge a turn: special tokens and turn markers in them are broken up with
a space before the pieces are joined. Positions are kept, never searched for afterwards.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from itertools import pairwise
from string import Formatter
from typing import Any, Self

import jinja2

from llama_adapter.conversation import Conversation, Message
from llama_adapter.errors import ConfigError, PromptError
from llama_adapter.pretrained import explain
from llama_adapter.processing.jinja import compile_template
from llama_adapter.processing.markers import any_of, break_up, marker_expressions, special_tokens

Span = tuple[int, int]
"""First character and the one after the last."""


class Kind(Enum):
    """What a piece of a prompt is; see the head of this module."""

    TEMPLATE = auto()
    CONTENT = auto()
    ANSWER = auto()
    END = auto()
    SLOT = auto()


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt of one kind."""

    kind: Kind
    text: str


class Rendered(str):
    """A prompt's text, and where in it the answers, the image slots and untrusted texts are."""

    answers: tuple[Span, ...]
    """Each answer with its end-of-turn token."""
    slots: tuple[Span, ...]
    """Each image's placeholder, in the order of the images."""
    said: tuple[Span, ...]
    """What users, experts and the assistant said: no special token stands there."""

    __slots__ = ("answers", "said", "slots")

    def __new__(
        cls,
        text: str,
        *,
        answers: Sequence[Span] = (),
        slots: Sequence[Span] = (),
        said: Sequence[Span] = (),
    ) -> Self:
        rendered = super().__new__(cls, text)
        rendered.answers = tuple(answers)
        rendered.slots = tuple(slots)
        rendered.said = tuple(said)
        return rendered

    def with_spaces(self, places: Sequence[int]) -> Rendered:
        """The same with a space before each of these characters, given in order."""
        borders = [0, *places, len(self)]
        text = " ".join(self[a:b] for a, b in pairwise(borders))

        def moved(spans: Sequence[Span]) -> list[Span]:
            return [(a + bisect_left(places, a), b + bisect_left(places, b)) for a, b in spans]

        return Rendered(
            text, answers=moved(self.answers), slots=moved(self.slots), said=moved(self.said)
        )


class PromptRenderer:
    """Renders conversations in one template for one tokenizer."""

    def __init__(self, template: str, *, tokenizer: Any, slot_text: str | None = None) -> None:
        if template not in TEMPLATES:
            raise ConfigError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
        self._template = TEMPLATES[template]
        self._tokenizer = tokenizer
        self._slot_text = slot_text
        self._specials = re.compile(any_of(special_tokens(tokenizer)))

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        """What untrusted text must not contain."""
        markers = self._template.markers_for(self._tokenizer, self._specials)
        return re.compile("|".join((self._specials.pattern, *markers)))

    @property
    def stop_strings(self) -> list[str]:
        """Text that ends an answer, where that is not the tokenizer's eos_token."""
        end = getattr(self._template, "end", None)
        return [] if end is None else [end]

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> Rendered:
        """One text for the conversation.

        `add_generation_prompt` opens the assistant's turn at the end; by default where the last
        word is the user's. `continue_final_message` leaves the last answer open, to be continued.
        """
        if continue_final_message and conversation.awaits_answer:
            raise PromptError("continue_final_message needs a last message from the assistant")
        if add_generation_prompt is None:
            add_generation_prompt = conversation.awaits_answer
        pieces = self._template.lay_out(
            conversation,
            tokenizer=self._tokenizer,
            specials=self._specials,
            slot_text=self._slot_text,
            opens_answer=add_generation_prompt and conversation.awaits_answer,
        )
        if continue_final_message:
            last = max(i for i, piece in enumerate(pieces) if piece.kind is Kind.ANSWER)
            pieces = pieces[: last + 1]
        return self._join(pieces)

    def _join(self, pieces: Sequence[Piece]) -> Rendered:
        parts: list[str] = []
        length = 0
        answers: list[Span] = []
        slots: list[Span] = []
        said: list[Span] = []
        for index, piece in enumerate(pieces):
            text = piece.text
            is_said = piece.kind in {Kind.CONTENT, Kind.ANSWER}
            if text and is_said:
                before = "".join(parts[-8:])
                after = "".join(p.text for p in pieces[index + 1 : index + 8])
                text = break_up(text, self._forbidden, before=before, after=after)
            start, length = length, length + len(text)
            parts.append(text)
            if is_said:
                said.append((start, length))
            match piece.kind:
                case Kind.ANSWER:
                    answers.append((start, length))
                case Kind.END:
                    answers[-1] = (answers[-1][0], length)
                case Kind.SLOT:
                    slots.append((start, length))
        return Rendered("".join(parts), answers=answers, slots=slots, said=said)


@dataclass(frozen=True, kw_only=True, slots=True)
class LineTemplate:
    """A template of headed sections, the same for every tokenizer."""

    with_context: str
    """The first question with a context; fields `system`, `question`, `context`."""
    without_context: str
    """The first question alone; fields `system`, `question`."""
    later: str
    """Every further question; field `question`."""
    respond: str
    """What opens the answer."""
    before_answer: str
    """What parts the opening from the answer; not part of a prompt that awaits an answer."""
    system_with_context: str | None
    """Replaced by the conversation's own; None: the template has no place for one."""
    system_without_context: str | None
    markers: str
    """A regular expression for what untrusted text must not contain."""
    end: str | None = None
    """What ends an answer, and generation with it; None: the tokenizer's eos_token."""
    after_slots: str = " "
    """What parts placeholders of pictures from a context that follows them."""

    def lay_out(
        self,
        conversation: Conversation,
        *,
        tokenizer: Any,
        specials: re.Pattern[str],  # noqa: ARG002  (templates share one signature)
        slot_text: str | None,
        opens_answer: bool,
    ) -> list[Piece]:
        """The pieces of the conversation."""
        end = self.end or tokenizer.eos_token
        if end is None:
            raise ConfigError(
                "this template ends answers with the tokenizer's eos_token; it has none"
            )
        pieces: list[Piece] = []
        for index, message in enumerate(conversation.turns):
            if message.role == "assistant":
                opening = Piece(Kind.TEMPLATE, self.respond + self.before_answer)
                pieces += [opening, Piece(Kind.ANSWER, message.text), Piece(Kind.END, end)]
            elif index == 0:
                pieces += self._first(conversation, slot_text)
            else:
                slots = slot_pieces(message, slot_text, after=" ")
                question = [*slots, Piece(Kind.CONTENT, message.text)]
                pieces += _fill(self.later, {"question": question})
        if opens_answer:
            pieces.append(Piece(Kind.TEMPLATE, self.respond))
        return pieces

    def markers_for(self, tokenizer: Any, specials: re.Pattern[str]) -> list[str]:  # noqa: ARG002
        """Regular expressions for what untrusted text must not contain, besides special tokens."""
        return [self.markers]

    def _first(self, conversation: Conversation, slot_text: str | None) -> Iterator[Piece]:
        first = conversation.turns[0]
        texts = [conversation.context]
        if self.system_with_context is None:
            texts.insert(0, conversation.system)
        context = "\n".join(text for text in texts if text)
        slots = slot_pieces(first, slot_text, after=self.after_slots if context else "")
        has_context = bool(context or slots)
        default = self.system_with_context if has_context else self.system_without_context
        if conversation.system is not None:
            system = Piece(Kind.CONTENT, conversation.system)
        else:
            system = Piece(Kind.TEMPLATE, default or "")
        fields = {
            "system": [system],
            "question": [Piece(Kind.CONTENT, first.text)],
            "context": [*slots, Piece(Kind.CONTENT, context)],
        }
        return _fill(self.with_context if has_context else self.without_context, fields)


def _fill(pattern: str, fields: dict[str, list[Piece]]) -> Iterator[Piece]:
    for literal, field, _, _ in Formatter().parse(pattern):
        if literal:
            yield Piece(Kind.TEMPLATE, literal)
        if field is not None:
            yield from fields[field]


def slot_pieces(message: Message, slot_text: str | None, *, after: str) -> list[Piece]:
    """A slot for each image of the message, where images have slots at all."""
    if slot_text is None or not message.images:
        return []
    pieces: list[Piece] = []
    for _ in message.images:
        pieces += [Piece(Kind.SLOT, slot_text), Piece(Kind.TEMPLATE, " ")]
    return [*pieces[:-1], *([Piece(Kind.TEMPLATE, after)] if after else [])]


class ChatTemplate:
    """The chat template that comes with the tokenizer.

    It is rendered with stand-ins for all contents, so that no untrusted text passes through it
    and every content's place in the result is known.
    """

    _STAND_IN = "\ue000{}\ue001"
    _FIND = re.compile("\ue000(\\d+)\ue001")

    def lay_out(
        self,
        conversation: Conversation,
        *,
        tokenizer: Any,
        specials: re.Pattern[str],
        slot_text: str | None,
        opens_answer: bool,
    ) -> list[Piece]:
        """The pieces of the conversation."""
        roles = [message.role for message in conversation.messages]
        literals = self._literals(tokenizer, roles, opens_answer)
        pieces = [Piece(Kind.TEMPLATE, literals[0])]
        is_first = True
        for message, literal in zip(conversation.messages, literals[1:], strict=True):
            if message.role == "assistant":
                end = re.match(rf"\s*(?:{specials.pattern})", literal)
                cut = end.end() if end else 0
                pieces += [Piece(Kind.ANSWER, message.text), Piece(Kind.END, literal[:cut])]
                pieces.append(Piece(Kind.TEMPLATE, literal[cut:]))
                continue
            if message.role == "user":
                pieces += slot_pieces(message, slot_text, after="\n")
                if is_first and conversation.context:
                    # Not the system turn: what an expert read off an image is no instruction.
                    context = Piece(Kind.CONTENT, conversation.context)
                    pieces += [context, Piece(Kind.TEMPLATE, "\n\n")]
                is_first = False
            pieces += [Piece(Kind.CONTENT, message.text), Piece(Kind.TEMPLATE, literal)]
        return pieces

    def markers_for(self, tokenizer: Any, specials: re.Pattern[str]) -> list[str]:
        """Regular expressions for what untrusted text must not contain, besides special tokens.

        They are read off probe conversations of every kind that the template takes.
        """
        ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
        found: set[str] = set()
        for roles in _PROBES:
            for opens_answer in (False, True):
                with suppress(PromptError):
                    head, *literals = self._literals(tokenizer, roles, opens_answer)
                    # a preamble ends in what opens the first turn
                    found.update((_last_sentence(head), *literals))
        return marker_expressions(found, specials=specials, ends=ends)

    def _literals(self, tokenizer: Any, roles: Sequence[str], opens_answer: bool) -> list[str]:
        """What the template puts before, between and after the contents of such messages."""
        stand_ins = [
            {"role": role, "content": self._STAND_IN.format(index)}
            for index, role in enumerate(roles)
        ]
        text = self._apply(tokenizer, stand_ins, opens_answer)
        if [int(n) for n in self._FIND.findall(text)] != list(range(len(stand_ins))):
            raise PromptError("the tokenizer's chat template drops, repeats or reorders messages")
        return self._FIND.split(text)[::2]

    @staticmethod
    def _apply(tokenizer: Any, messages: list[dict[str, str]], opens_answer: bool) -> str:
        try:
            return compile_template(chat_template_of(tokenizer)).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=opens_answer,
                **tokenizer.special_tokens_map,
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the tokenizer's chat template refuses: {explain(error)}") from error


def chat_template_of(tokenizer: Any) -> str:
    """The source of the tokenizer's chat template, of several the default one."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            "template 'chat' needs a tokenizer with a chat template; this one has none: "
            "a base without one takes template 'alpaca'"
        )
    if not isinstance(template, str):
        raise ConfigError(
            f"the tokenizer's chat template must be a text, found {type(template).__name__}"
        )
    return template


_PROBES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "tool"),
)
"""Conversations that show what a chat template puts around each role, first and later."""


def _last_sentence(text: str) -> str:
    return re.split(r"[.!?]\s|\n", text.rstrip())[-1]


# at most 64 signs between, so that the time to look is bounded
_HEADINGS = r"(?i:###(?=\W{0,64}+(?:instruction|input|response)\b))"

_HUMAN_ASSISTANT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

TEMPLATES: dict[str, LineTemplate | ChatTemplate] = {
    # The wording of Stanford Alpaca, which released adapters were trained with.
    "alpaca": LineTemplate(
        with_context="{system}\n\n### Instruction:\n{question}\n\n### Input:\n{context}\n\n",
        without_context="{system}\n\n### Instruction:\n{question}\n\n",
        later="\n\n### Instruction:\n{question}\n\n",
        respond="### Response:",
        before_answer="",
        system_with_context=(
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request."
        ),
        system_without_context=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
        markers=_HEADINGS,
    ),
    # FastChat's first one, which the released 65B chat weights were trained with.
    "human-assistant": LineTemplate(
        with_context="{system}###Human: {context}\n{question}",
        without_context="{system}###Human: {question}",
        later="Human: {question}",
        respond="###Assistant:",
        before_answer=" ",
        system_with_context=_HUMAN_ASSISTANT,
        system_without_context=_HUMAN_ASSISTANT,
        markers="###",
        end="###",
    ),
    # The miniature world's, in the words of its small vocabulary.
    "toy": LineTemplate(
        with_context="### input : {context}\n### instruction : {question}\n",
        without_context="### instruction : {question}\n",
        later="\n### instruction : {question}\n",
        respond="### response :",
        before_answer=" ",
        system_with_context=None,
        system_without_context=None,
        markers=_HEADINGS,
        # a picture is a text of its own; the bases know the word for what comes after one
        after_slots=" text : ",
    ),
    "chat": ChatTemplate(),
}
"""Every template by the name that an adapter's configuration gives it."""
