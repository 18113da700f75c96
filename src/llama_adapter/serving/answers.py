"""What clients get: OpenAI's objects, whole or as events, from an engine's increments."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_adapter.generation.requests import Increment, TokenLogprob, Usage
from llama_adapter.serving.tokens import token_bytes

DONE = b"data: [DONE]\n\n"


def event(content: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, part: Increment) -> None:
        """Take what has been added."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish = part.finish or self.finish


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """Objects of `/v1/chat/completions`."""

    model: str
    tokenizer: Any
    logprobs: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def first(self, answers: int) -> Iterable[bytes]:
        """Events before any token."""
        for index in range(answers):
            delta = {"role": "assistant", "content": ""}
            yield self._event([{"index": index, "delta": delta, "finish_reason": None}])

    def next(self, part: Increment) -> Iterable[bytes]:
        """Events of an increment."""
        if not (part.text or part.finish or (self.logprobs and part.tokens)):
            return
        delta = {"content": part.text} if part.text or part.tokens else {}
        choice: dict[str, Any] = {
            "index": part.choice,
            "delta": delta,
            "finish_reason": part.finish,
        }
        if self.logprobs:
            choice["logprobs"] = self._logprobs(part.tokens)
        yield self._event([choice])

    def last(self, _choices: Sequence[Choice], usage: Usage) -> Iterable[bytes]:
        """Events after the last token."""
        if self.include_usage:
            yield self._event([], usage=usage_object(usage))
        yield DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer where nobody asked for events."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.tokens) if self.logprobs else None,
                    "finish_reason": choice.finish,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage_object(usage),
        }

    def _event(self, choices: list[dict[str, Any]], usage: Any = None) -> bytes:
        content = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return event(content | ({"usage": usage} if self.include_usage else {}))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._token(found.token, found.logprob)
            | {"top_logprobs": [self._token(*other) for other in found.top]}
            for found in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        written = token_bytes(self.tokenizer, token)
        # JSON has no infinity; nothing is likelier to be meant by -9999, OpenAI's own value
        return {
            "token": written.decode(errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(written),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionFormat:
    """Objects of `/v1/completions`."""

    model: str
    tokenizer: Any
    logprobs: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def first(self, _answers: int) -> Iterable[bytes]:
        """Events before any token."""
        return ()

    def next(self, part: Increment) -> Iterable[bytes]:
        """Events of an increment."""
        if part.text or part.finish or (self.logprobs and part.tokens):
            choice = self._choice(part.choice, part.text, part.tokens, part.finish)
            yield event(self._object([choice]))

    def last(self, _choices: Sequence[Choice], usage: Usage) -> Iterable[bytes]:
        """Events after the last token."""
        if self.include_usage:
            yield event(self._object([]) | {"usage": usage_object(usage)})
        yield DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer where nobody asked for events."""
        found = [self._choice(i, c.text, c.tokens, c.finish) for i, c in enumerate(choices)]
        return self._object(found) | {"usage": usage_object(usage)}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        found = self._logprobs(tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [self._text(found.token) for found in tokens],
            "token_logprobs": [max(found.logprob, -9999.0) for found in tokens],
            "top_logprobs": [
                {self._text(token): max(logprob, -9999.0) for token, logprob in found.top}
                for found in tokens
            ],
        }

    def _text(self, token: int) -> str:
        return token_bytes(self.tokenizer, token).decode(errors="replace")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsesFormat:
    """Objects of `/v1/responses`: one message with one text."""

    model: str
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    message_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    numbers: list[int] = field(default_factory=list)
    """One for each event so far."""

    def first(self, _answers: int) -> Iterable[bytes]:
        """Events before any token."""
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        item = self._item("", "in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=self._part(""))

    def next(self, part: Increment) -> Iterable[bytes]:
        """Events of an increment."""
        if part.text:
            yield self._event(
                "response.output_text.delta", **self._place, delta=part.text, logprobs=[]
            )

    def last(self, choices: Sequence[Choice], usage: Usage) -> Iterable[bytes]:
        """Events after the last token."""
        [choice] = choices
        text, place = choice.text, self._place
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._part(text))
        whole = self.whole(choices, usage)
        item = whole["output"][0]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer where nobody asked for events."""
        [choice] = choices
        status = "incomplete" if choice.finish == "length" else "completed"
        why = {"reason": "max_output_tokens"} if choice.finish == "length" else None
        return self._response(status) | {
            "incomplete_details": why,
            "output": [self._item(choice.text, status)],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **content: Any) -> bytes:
        self.numbers.append(len(self.numbers))
        return event({"type": kind, "sequence_number": self.numbers[-1], **content}, kind)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.message_id,
            "status": status,
            "role": "assistant",
            "content": [self._part(text)],
        }

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": False,
            "store": False,
            "temperature": None,
            "tool_choice": "none",
            "tools": [],
            "top_p": None,
            "usage": None,
        }


Format = ChatFormat | CompletionFormat | ResponsesFormat
