"""The text of an answer while its tokens come, in pieces that no later token changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_adapter.generation.answer import text_before
from llama_adapter.processing.processor import LlamaAdapterProcessor

_WINDOW, _OVERLAP = 16, 4
"""Tokens that are decoded together, and at least how many of them the next window begins with: how
a token reads depends on those just before it."""
_MOST_BYTES = 4
"""Of a character, each of which may be a token."""
_INCOMPLETE = "\ufffd"
"""What a decoder writes for a part of a character's bytes."""


class TextStream:
    """Turns tokens into text, a few at a time, up to the first of several ends."""

    def __init__(self, processor: LlamaAdapterProcessor, stop: Sequence[str]) -> None:
        self._processor = processor
        self._ends = (*processor.ends, *stop)
        self._longest = max(map(len, self._ends), default=0)
        self._window: list[int] = []
        self._before, self._overlap = "", 0
        """The text before the window, and how much of the window's is in there too."""
        self._text = ""
        self._shown = ""
        self.is_ended = False
        """Whether the text holds an end."""

    def push(self, token: int) -> str:
        """Take a token; returns the text that it settles, which may be none."""
        self._window.append(token)
        window = self._decode(self._window)
        if window.endswith(_INCOMPLETE):
            return ""
        start = max(len(self._text) - self._longest, 0)
        self._text = self._before + window[self._overlap :]
        self.is_ended = any(end in self._text[start:] for end in self._ends)
        if len(self._window) >= _WINDOW:
            self._begin_window()
        return self._show(self._settled())

    def _begin_window(self) -> None:
        """Go on with the last tokens alone, from where a character begins."""
        for count in range(_OVERLAP, _OVERLAP + _MOST_BYTES):
            kept = self._decode(self._window[-count:])
            if _INCOMPLETE not in kept:
                self._window = self._window[-count:]
                self._before, self._overlap = self._text, len(kept)
                return

    def _decode(self, tokens: Sequence[int]) -> str:
        # of the library itself: transformers' wrapper takes five times as long
        backend: Any = self._processor.tokenizer.backend_tokenizer
        return str(backend.decode(list(tokens), skip_special_tokens=True))

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
        text = text_before(self._text, self._ends) if self.is_ended else self._text
        held = max((_overlap(text, end) for end in self._ends), default=0)
        return text[: len(text) - held].strip()


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of a text may begin an end."""
    tail = text[-len(end) :]
    return next((n for n in range(min(len(end), len(tail)), 0, -1) if tail.endswith(end[:n])), 0)
