"""Expert text in training: a model that has seen contexts of this kind makes better use of them.

Instructions that have pictures get what experts say of these; instructions of text alone get,
now and then, a text that has nothing to do with them, and learn to leave it aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from llama_adapter.conversation import Conversation
from llama_adapter.errors import ConfigError
from llama_adapter.experts.panel import Panel
from llama_adapter.processing.prompts import with_experts


@dataclass(frozen=True, kw_only=True)
class ExpertTextMixer:
    """Adds expert text to a fraction of samples, the same ones for the same seed."""

    fraction: float
    """Share of the samples that get text, from 0 to 1."""
    seed: int = 0
    panel: Panel | None = None
    """Who is asked about the pictures of samples that have some."""
    texts: Sequence[str] = ()
    """What samples without pictures get one of: paragraphs that experts wrote elsewhere."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"fraction of expert text must be from 0 to 1, got {self.fraction}")
        if self.fraction and self.panel is None and not self.texts:
            raise ConfigError("expert text needs experts to ask, or texts to draw from")

    def __call__(self, sample_id: str, conversation: Conversation) -> Conversation:
        """The sample's conversation, or the same with expert text before its own context.

        It follows from the seed and the id alone: neither order nor worker matters.
        """
        chance, choice = self._draw(sample_id)
        if chance >= self.fraction:
            return conversation
        if conversation.images:
            if self.panel is None:
                return conversation
            return with_experts(conversation, [self.panel])[0]
        if not self.texts:
            return conversation
        text = self.texts[choice % len(self.texts)]
        own = conversation.context
        return conversation.with_context(f"{text}\n{own}" if own else text)

    def _draw(self, sample_id: str) -> tuple[float, int]:
        """A number from 0 to 1 and a whole one, from the seed and the id."""
        digest = hashlib.sha256(f"{self.seed}/{sample_id}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64, int.from_bytes(digest[8:16])
