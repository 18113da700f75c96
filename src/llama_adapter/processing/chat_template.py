"""The chat template that comes with a tokenizer, read off once and laid out by us.

The template is rendered with substitutes for all contents, so that no untrusted text passes through
it, and only for conversations that grow turn by turn: the text before, between and after the
contents is taken from there. A prompt is therefore the beginning of the talk that training uses,
whatever the template does to a last answer or to earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import jinja2

from llama_adapter.conversation import Conversation
from llama_adapter.errors import ConfigError, LlamaAdapterError, PromptError
from llama_adapter.pretrained import explain
from llama_adapter.processing.jinja import compile_template
from llama_adapter.processing.markers import any_of, marker_expressions, special_tokens
from llama_adapter.processing.pieces import Kind, Piece, placeholder_pieces

_SUBSTITUTE = "\ue000{}\ue001"
_FIND = re.compile("\ue000(\\d+)\ue001")

_PROBES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "tool"),
)
"""Conversations that show what a chat template puts around each role, first and later."""

# Exchanges after which a template is taken to go on as it did.
_SETTLED = 3


class Opening(NamedTuple):
    """The text between a question and its answer."""

    prompt: str
    """The part that a prompt of generation ends with."""
    gap: str
    """White space that the model writes before its answer."""


class ChatTemplate:
    """Lays conversations out as a tokenizer's chat template does.

    Where the template puts something else before an answer of a talk than at the end of a prompt
    (a `<think>` block, a header), one of its own switches is turned that makes both alike; where
    it has none, the longer text is used for both.
    """

    def __init__(self, tokenizer: Any, *, switches: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = compile_template(chat_template_of(tokenizer))
        self._specials = re.compile(any_of(special_tokens(tokenizer)))
        self._literals = lru_cache(maxsize=1024)(self._read_literals)
        self.switches: dict[str, Any] = dict(switches or {})
        # Refused here, not at the first use, where the template takes no question and answer.
        self._takes_parts = False
        self._takes_parts = self._has_to_take_parts()
        if switches is None:
            self.switches = self._find_switches()
            self._literals.cache_clear()
        self._takes_system = all(
            self._takes(("system", *roles)) for roles in _PROBES[1:4] if self._takes(roles)
        )
        self._ends = self._find_ends()

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends an answer: the last one of a talk, and others where that differs."""
        return tuple(dict.fromkeys(end.strip() for end in self._ends if end.strip()))

    def opening(self, index: int = 0, *, with_system: bool = False) -> Opening:
        """The text before the answer of this index; equal in prompts and conversations."""
        asked = _roles(index, with_system)
        prompted = self._literals(asked, True)[-1]
        talked = self._literals((*asked, "assistant"), False)[-2]
        gap = talked.removeprefix(prompted) if talked.startswith(prompted) else None
        if gap is not None and not gap.strip():
            return Opening(prompted, gap)
        longer = talked if gap is not None else prompted
        # a space at the end of a prompt would part it from the word that follows
        opening = longer.rstrip(" ")
        return Opening(opening, longer[len(opening) :])

    def record(self) -> dict[str, Any]:
        """What was read off the template, to be compared when an adapter is loaded.

        Not its preamble, in which some templates put the date.
        """
        turns = ""
        with suppress(PromptError):
            turns = self._literals(("user", "assistant", "user"), True)[-2]
        opening = self.opening()
        return {
            "switches": self.switches,
            "opening": opening.prompt + opening.gap,
            "ends": list(self.ends),
            "between_turns": turns,
        }

    def lay_out(
        self, conversation: Conversation, *, placeholder_text: str | None, opens_answer: bool
    ) -> list[Piece]:
        """The pieces of the conversation."""
        system = conversation.system
        with_system = system is not None and self._takes_system
        pieces = [Piece(Kind.TEMPLATE, self._literals(_roles(0, with_system), True)[0])]
        if with_system:
            between = self._literals(_roles(0, True), True)[1]
            pieces += [Piece(Kind.CONTENT, system or ""), Piece(Kind.TEMPLATE, between)]
        turns = conversation.turns
        for index, message in enumerate(turns):
            number, is_last = index // 2, index == len(turns) - 1
            if message.role == "assistant":
                pieces.append(Piece(Kind.ANSWER, message.text))
                pieces += self._after(number, with_system, is_last=is_last)
                continue
            if index == 0 and system is not None and not with_system:
                pieces += [Piece(Kind.CONTENT, system), Piece(Kind.TEMPLATE, "\n\n")]
            pieces += placeholder_pieces(message, placeholder_text, after="\n")
            if index == 0 and conversation.context:
                # Not the system turn: what an expert read off an image is not an instruction.
                pieces.append(Piece(Kind.CONTENT, conversation.context))
                pieces.append(Piece(Kind.TEMPLATE, "\n\n"))
            pieces.append(Piece(Kind.CONTENT, message.text))
            if is_last and not opens_answer:
                closing = self._literals(_roles(self._settled(number), with_system), False)[-1]
                pieces.append(Piece(Kind.TEMPLATE, closing))
            else:
                opening = self.opening(self._settled(number), with_system=with_system)
                pieces.append(Piece(Kind.TEMPLATE, opening.prompt))
                if not is_last:
                    pieces.append(Piece(Kind.GAP, opening.gap))
        return pieces

    def markers(self) -> list[str]:
        """Regular expressions of what untrusted text must not contain, apart from special tokens.

        They are read off probe conversations of every kind that the template takes.
        """
        tokenizer = self._tokenizer
        ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
        found: set[str] = set(self._ends)
        for roles in _PROBES:
            for opens_answer in (False, True):
                with suppress(PromptError):
                    head, *literals = self._literals(roles, opens_answer)
                    # a preamble ends in what opens the first turn
                    found.update((_last_sentence(head), *literals))
        return marker_expressions(found, specials=self._specials, ends=ends)

    def _after(self, number: int, with_system: bool, *, is_last: bool) -> Iterator[Piece]:
        talk = (*_roles(self._settled(number), with_system), "assistant")
        end = self._ends[0 if is_last else 1]
        literal = (
            self._literals(talk, False)[-1]
            if is_last
            else self._literals((*talk, "user"), True)[-2]
        )
        yield Piece(Kind.END, end)
        yield Piece(Kind.TEMPLATE, literal.removeprefix(end))

    def _settled(self, number: int) -> int:
        """The exchange whose surroundings this one shares; some templates number their turns."""
        if number <= _SETTLED:
            return number
        two, three = (
            self._literals(_roles(exchanges, False), True)[-3:]
            for exchanges in (_SETTLED - 1, _SETTLED)
        )
        return _SETTLED if two == three else number

    def _find_ends(self) -> tuple[str, str]:
        """What ends the last answer of a talk, and what ends an earlier one."""
        closing = self._literals(("user", "assistant"), False)[-1]
        special = re.compile(rf"\s*(?:{self._specials.pattern})")
        after = before = ""
        with suppress(PromptError):
            after = self._literals(("user", "assistant", "user"), True)[-2]
            before = self.opening().prompt
        if closing.strip():
            found = special.match(closing)
            last = found.group() if found else closing.rstrip()
            if after.startswith(last):
                return last, last
            # what closes any turn, where it is a special token
            shared = special.match(after)
            closes = shared is not None and before.startswith(shared.group())
            return last, shared.group() if closes and shared else ""
        shared = special.match(after)
        if shared and (before.startswith(shared.group()) or _is_eos(shared, self._tokenizer)):
            return shared.group(), shared.group()
        # nothing ends an answer: a model would never learn to stop
        eos = self._tokenizer.eos_token
        if eos is None:
            raise ConfigError(
                "neither the chat template nor the tokenizer, which has no eos_token, ends answers"
            )
        return eos, eos

    def _find_switches(self) -> dict[str, Any]:
        """The template's own variables under which prompts are the beginning of talks."""
        names = sorted(self._template.variables - _GIVEN - set(self._tokenizer.special_tokens_map))
        tries: Iterator[dict[str, Any]] = chain(
            [{}], ({name: False} for name in names), ({name: True} for name in names)
        )
        for self.switches in tries:
            self._literals.cache_clear()
            with suppress(LlamaAdapterError):
                if self._agrees():
                    return self.switches
        return {}

    def _agrees(self) -> bool:
        for index in (0, 1):
            asked = _roles(index, False)
            if index and not self._takes((*asked, "assistant")):
                continue
            prompted = self._literals(asked, True)[-1]
            talked = self._literals((*asked, "assistant"), False)[-2]
            if not talked.startswith(prompted) or talked.removeprefix(prompted).strip():
                return False
        return True

    def _takes(self, roles: tuple[str, ...]) -> bool:
        try:
            self._literals(roles, roles[-1] != "assistant")
        except LlamaAdapterError:
            return False
        return True

    def _has_to_take_parts(self) -> bool:
        """Whether contents have to be lists of parts, as templates of multimodal models want."""
        try:
            self._literals(("user", "assistant"), False)
        except LlamaAdapterError as refusal:
            self._takes_parts = True
            if not self._takes(("user", "assistant")):
                raise refusal from None
            return True
        return False

    def _read_literals(self, roles: tuple[str, ...], opens_answer: bool) -> list[str]:
        """What the template puts before, between and after the contents of such messages."""
        contents = [_SUBSTITUTE.format(index) for index in range(len(roles))]
        try:
            text = self._template.render(
                messages=[
                    {"role": role, "content": self._content(content)}
                    for role, content in zip(roles, contents, strict=True)
                ],
                tools=None,
                documents=None,
                add_generation_prompt=opens_answer,
                **{**self._tokenizer.special_tokens_map, **self.switches},
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the tokenizer's chat template refuses: {explain(error)}") from error
        if [int(number) for number in _FIND.findall(text)] != list(range(len(roles))):
            raise PromptError("the tokenizer's chat template drops, repeats or reorders messages")
        return _FIND.split(text)[::2]

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._takes_parts else text


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}


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


def _roles(exchanges: int, with_system: bool) -> tuple[str, ...]:
    """Whole exchanges, and one more question."""
    return (*(("system",) * with_system), *(("user", "assistant") * exchanges), "user")


def _is_eos(match: re.Match[str], tokenizer: Any) -> bool:
    return match.group().strip() == tokenizer.eos_token


def _last_sentence(text: str) -> str:
    return re.split(r"[.!?]\s|\n", text.rstrip())[-1]
