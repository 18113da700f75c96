"""The text of an answer while its tokens come, in pieces that no later token changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from llama_adapter.generation.answer import text_before
from llama_adapter.processing.processor import LlamaAdapterProcessor


class TextStream:
    """Turns tokens into text, each decoded once, up to the first of several ends."""

    def __init__(self, processor: LlamaAdapterProcessor, stop: Sequence[str]) -> None:
        self._processor = processor
        self._ends = (*processor.ends, *stop)
        self._longest = max(map(len, self._ends), default=0)
        self._decode = DecodeStream(skip_special_tokens=True)
        self._text = ""
        self._shown = ""
        self.is_ended = False
        """Whether the text holds an end."""

    def push(self, token: int) -> str:
        """Take a token; returns the text that it settles, which may be none."""
        tokenizer: Any = self._processor.tokenizer
        added = self._decode.step(tokenizer.backend_tokenizer, token)
        if not added:
            return ""
        self._text += added
        tail = self._text[-len(added) - self._longest :]
        self.is_ended = any(end in tail for end in self._ends)
        return self._show(self._settled())

    def finish(self, tokens: Sequence[int]) -> str:
        """What is left of an answer of these tokens, as `generation.answer` gives it."""
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return self._show(self._processor.without_end(text_before(text, self._ends)))

    def _show(self, text: str) -> str:
        added = text[len(self._shown) :]
        self._shown += added
        return added

    def _settled(self) -> str:
        """All but white space at either side, and what may begin an end."""
        text = text_before(self._text, self._ends)
        held = max((_overlap(text, end) for end in self._ends), default=0)
        return text[: len(text) - held].strip()


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of a text may begin an end."""
    tail = text[-len(end) :]
    return next((n for n in range(min(len(end), len(tail)), 0, -1) if tail.endswith(end[:n])), 0)
