"""Prompt templates: a conversation becomes one text, and we know what every character is.

A template lays a conversation out as pieces, each of one kind:

    TEMPLATE     wording of the template, trusted: its special tokens count
    CONTENT      what users and experts wrote, untrusted
    GAP          white space before an answer, which the model writes: scored with it
    ANSWER       what the assistant said, untrusted and scored in training
    END          the end-of-turn token after an answer, trusted and scored
    PLACEHOLDER  the tokens where an image is read, trusted

Untrusted pieces cannot forge a turn: special tokens and turn markers in them are broken up with
a space before the pieces are joined. Positions are kept, never searched for afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

from llama_adapter.config import not_one_of
from llama_adapter.conversation import Conversation
from llama_adapter.errors import ConfigError, PromptError
from llama_adapter.processing.chat_template import ChatTemplate
from llama_adapter.processing.markers import any_of, escape, normalized, special_tokens
from llama_adapter.processing.pieces import Kind, Piece, Rendered, Span, placeholder_pieces

CHAT = "chat"
"""The name of the chat template that comes with a tokenizer."""


class PromptRenderer:
    """Renders conversations in one template for one tokenizer."""

    def __init__(
        self,
        template: str,
        *,
        tokenizer: Any,
        placeholder_text: str | None = None,
        chat_switches: Mapping[str, Any] | None = None,
    ) -> None:
        if template not in TEMPLATES:
            raise ConfigError(not_one_of("template", template, TEMPLATES))
        self._tokenizer = tokenizer
        self._placeholder_text = placeholder_text
        self._specials = special_tokens(tokenizer)
        made = TEMPLATES[template]
        self.template: LineTemplate | ChatTemplate = (
            made if isinstance(made, LineTemplate) else made(tokenizer, switches=chat_switches)
        )

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        """What untrusted text must not contain."""
        return re.compile("|".join((any_of(self._specials), *self.template.markers())))

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends an answer, and generation with it; the first ends the last one of a talk."""
        if isinstance(self.template, ChatTemplate):
            return self.template.ends
        return (self.template.end_for(self._tokenizer),)

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
        pieces = self._lay_out(
            conversation, opens_answer=add_generation_prompt and conversation.awaits_answer
        )
        if continue_final_message:
            last = max(i for i, piece in enumerate(pieces) if piece.kind is Kind.ANSWER)
            pieces = pieces[: last + 1]
        return self._join(pieces)

    def looks_rendered(self, text: str) -> bool:
        """Whether a text opens a turn as the template does and ends as a prompt or a talk does."""
        opened, closes = self._marks
        return bool(opened) and opened in text and text.strip().endswith(closes)

    def begins(self, text: str) -> bool:
        """Whether a text is laid out in the template from its first question on."""
        opened, closes = self._marks
        before, found, _ = text.partition(opened) if opened else (text, "", "")
        # what follows an answer goes on with its end, and then perhaps with a question
        return bool(found) and not any(end in before for end in closes)

    def whole(self, text: str, end: str) -> Rendered:
        """A text by itself, in no template, with what ends it."""
        kept = escape(text, self._forbidden, after=end)
        return Rendered(kept + end, said=[(0, len(kept))])

    @cached_property
    def _marks(self) -> tuple[str, tuple[str, ...]]:
        """What opens the first question, and what ends a prompt or an answer."""
        pieces = self._lay_out(Conversation.ask("x"), opens_answer=True)
        question = next(i for i, piece in enumerate(pieces) if piece.kind is Kind.CONTENT)
        before = "".join(piece.text for piece in pieces[:question])
        after = "".join(piece.text for piece in pieces[question + 1 :])
        closes = {after.strip().rpartition("\n")[2], *self.ends} - {""}
        return before.strip().rpartition("\n")[2], tuple(sorted(closes))

    def _lay_out(self, conversation: Conversation, *, opens_answer: bool) -> list[Piece]:
        if isinstance(self.template, ChatTemplate):
            return self.template.lay_out(
                conversation, placeholder_text=self._placeholder_text, opens_answer=opens_answer
            )
        return self.template.lay_out(
            conversation,
            end=self.template.end_for(self._tokenizer),
            placeholder_text=self._placeholder_text,
            opens_answer=opens_answer,
        )

    def _join(self, pieces: Sequence[Piece]) -> Rendered:
        parts: list[str] = []
        length = 0
        answers: list[Span] = []
        openings: list[int] = []
        placeholders: list[Span] = []
        said: list[Span] = []
        for index, piece in enumerate(pieces):
            text = piece.text
            is_said = piece.kind in {Kind.CONTENT, Kind.ANSWER}
            if text and is_said:
                before = "".join(parts[-8:])
                after = "".join(_trusted_after(pieces, index))
                as_read = normalized(text, tokenizer=self._tokenizer)
                broken = escape(as_read, self._forbidden, before=before, after=after)
                # texts in which nothing is to be broken keep their spelling
                text = text if broken == as_read else broken
                text = escape(text, self._forbidden, before=before, after=after)
            start, length = length, length + len(text)
            parts.append(text)
            if is_said:
                said.append((start, length))
            match piece.kind:
                case Kind.ANSWER:
                    answers.append((start, length))
                    follows_gap = index and pieces[index - 1].kind is Kind.GAP
                    openings.append(start - len(parts[-2]) if follows_gap else start)
                case Kind.END:
                    answers[-1] = (answers[-1][0], length)
                case Kind.PLACEHOLDER:
                    placeholders.append((start, length))
        return Rendered(
            "".join(parts), answers=answers, openings=openings, placeholders=placeholders, said=said
        )


def _trusted_after(pieces: Sequence[Piece], index: int) -> Iterator[str]:
    """Texts of the template behind a piece, up to what a prompt cannot know of yet."""
    for piece in pieces[index + 1 :]:
        if piece.kind in {Kind.GAP, Kind.ANSWER, Kind.CONTENT}:
            return
        yield piece.text


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
    marker: str
    """A regular expression for what untrusted text must not contain."""
    end: str | None = None
    """What ends an answer, and generation with it; None: the tokenizer's eos_token."""
    after_placeholders: str = " "
    """What separates placeholders of images from a context that follows them."""

    def lay_out(
        self,
        conversation: Conversation,
        *,
        end: str,
        placeholder_text: str | None,
        opens_answer: bool,
    ) -> list[Piece]:
        """The pieces of the conversation; `end` follows each answer."""
        pieces: list[Piece] = []
        for index, message in enumerate(conversation.turns):
            if message.role == "assistant":
                pieces.append(Piece(Kind.TEMPLATE, self.respond))
                pieces.append(Piece(Kind.GAP, self.before_answer))
                pieces += [Piece(Kind.ANSWER, message.text), Piece(Kind.END, end)]
            elif index == 0:
                pieces += self._first(conversation, placeholder_text)
            else:
                placeholders = placeholder_pieces(message, placeholder_text, after=" ")
                question = [*placeholders, Piece(Kind.CONTENT, message.text)]
                pieces += _fill(self.later, {"question": question})
        if opens_answer:
            pieces.append(Piece(Kind.TEMPLATE, self.respond))
        return pieces

    def end_for(self, tokenizer: Any) -> str:
        """What ends an answer with this tokenizer."""
        end: str | None = self.end or tokenizer.eos_token
        if end is None:
            raise ConfigError(
                "this template ends answers with the tokenizer's eos_token; it has none"
            )
        return end

    def markers(self) -> list[str]:
        """Regular expressions of what untrusted text must not contain besides special tokens."""
        return [self.marker]

    def _first(self, conversation: Conversation, placeholder_text: str | None) -> Iterator[Piece]:
        first = conversation.turns[0]
        texts = [conversation.context]
        if self.system_with_context is None:
            texts.insert(0, conversation.system)
        context = "\n".join(text for text in texts if text)
        placeholders = placeholder_pieces(
            first, placeholder_text, after=self.after_placeholders if context else ""
        )
        has_context = bool(context or placeholders)
        default = self.system_with_context if has_context else self.system_without_context
        if conversation.system is not None:
            system = Piece(Kind.CONTENT, conversation.system)
        else:
            system = Piece(Kind.TEMPLATE, default or "")
        fields = {
            "system": [system],
            "question": [Piece(Kind.CONTENT, first.text)],
            "context": [*placeholders, Piece(Kind.CONTENT, context)],
        }
        return _fill(self.with_context if has_context else self.without_context, fields)


def _fill(pattern: str, fields: dict[str, list[Piece]]) -> Iterator[Piece]:
    for literal, field, _, _ in Formatter().parse(pattern):
        if literal:
            yield Piece(Kind.TEMPLATE, literal)
        if field is not None:
            yield from fields[field]


# at most 64 signs between, so that the time to look is bounded
_HEADINGS = r"(?i:###(?=\W{0,64}+(?:instruction|input|response)\b))"

_HUMAN_ASSISTANT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

TEMPLATES: dict[str, LineTemplate | type[ChatTemplate]] = {
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
        marker=_HEADINGS,
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
        marker="###",
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
        marker=_HEADINGS,
        # an image is a text of its own; the bases know the word for what comes after one
        after_placeholders=" text : ",
    ),
    CHAT: ChatTemplate,
}
"""Every template by the name that an adapter's configuration gives it."""
