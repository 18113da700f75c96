"""One answer of a request, from the queue to its last token, and what each of its tokens reads."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llama_adapter.generation.requests import Generation, GenerationRequest
from llama_adapter.generation.rows import Row
from llama_adapter.generation.sampling import Drawer
from llama_adapter.generation.text import TextStream
from llama_adapter.model.stack import RowReads, StackedAdapter
from llama_adapter.processing.processor import LlamaAdapterProcessor

_BASE = "base"
"""Who owns rows without an adapter."""


@dataclass(eq=False, slots=True)
class ReadyImage:
    """An image in the stack's bank."""

    entry: int
    users: int = 0
    used_at: int = 0


@dataclass(eq=False, kw_only=True)
class PendingAnswer:
    """One answer of a request, from the queue to its last token."""

    generation: Generation
    choice: int
    adapter: StackedAdapter | None
    processor: LlamaAdapterProcessor
    stop_ids: frozenset[int]
    drawer: Drawer
    text: TextStream
    grammar: Future[Any] | None = None
    siblings: list[PendingAnswer] = field(default_factory=list)
    """Further answers to the same prompt, which begin once it is read."""
    images: list[ReadyImage] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """What tells this prompt's images from others; none where the adapter reads text alone."""
    content: list[Hashable] = field(default_factory=list)
    """What each token of the prompt is made of; see `Row.content`."""
    ordinals: list[int] = field(default_factory=list)
    """How many placeholders of its image precede each token that is one."""
    tokens: list[int] = field(default_factory=list)
    row: Row | None = None
    admitted_at: int = 0
    """In which step it got its row."""
    error: Exception | None = None

    @property
    def request(self) -> GenerationRequest:
        return self.generation.request

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt.input_ids

    @property
    def owner(self) -> Hashable:
        return self.adapter or _BASE

    @property
    def is_running(self) -> bool:
        return self.row is not None and self.row.answer is self

    @property
    def is_prefilling(self) -> bool:
        return not self.tokens

    def chunk(self, most: int) -> list[int]:
        """The tokens of its next pass."""
        assert self.row is not None
        done = len(self.row.content)
        return list(self.prompt[done : done + most]) if self.is_prefilling else self.tokens[-1:]

    def reads(self, start: int, stop: int) -> RowReads:
        """What the tokens from `start` to `stop` read."""
        if self.adapter is None:
            return RowReads()
        config, index = self.adapter.config, self.adapter.index
        is_late = config.fusion == "late"
        if not self.images:
            return RowReads(adapter=index)
        if config.visual_scope == "all":
            return RowReads(adapter=index, image=self.images[0].entry, is_late=is_late)
        images = self.request.prompt.placeholders[start:stop]
        if max(images, default=-1) < 0:
            return RowReads(adapter=index)
        return RowReads(
            adapter=index,
            images=[0 if image < 0 else self.images[image].entry for image in images],
            ordinals=self.ordinals[start:stop] if config.placeholder_attention == "own" else None,
            is_late=is_late,
        )

    def content_of(self, token: int) -> Hashable:
        """What a token behind the prompt is made of."""
        reads_all = self.adapter is not None and self.adapter.config.visual_scope == "all"
        return (token, self.keys[0]) if reads_all and self.keys else token

    def read_prompt(self) -> None:
        """Find out what each token of the prompt is made of."""
        prompt = self.request.prompt
        self.content = list(self.prompt)
        if not prompt.images or self.adapter is None or self.adapter.adapter.projection is None:
            return
        frames, placeholders = num_frames(self.request), prompt.placeholders
        self.keys = keys = [f"{image.key} {frames}" for image in prompt.images]
        self.ordinals = _ordinals(placeholders)
        if self.adapter.config.visual_scope == "all":
            self.content = [(token, keys[0]) for token in self.prompt]
            return
        for place, image in enumerate(placeholders):
            if image >= 0:
                self.content[place] = (self.prompt[place], keys[image], self.ordinals[place])


def _ordinals(placeholders: Sequence[int]) -> list[int]:
    found: list[int] = []
    for place, image in enumerate(placeholders):
        goes_on = place > 0 and image >= 0 and placeholders[place - 1] == image
        found.append(found[-1] + 1 if goes_on else 0)
    return found


def num_frames(request: GenerationRequest) -> int:
    """Frames of each image: stills next to a video are shown as often as it has frames."""
    shapes = [image.pixel_values.shape for image in request.prompt.images]
    return max((shape[0] if len(shape) == 4 else 1 for shape in shapes), default=1)
