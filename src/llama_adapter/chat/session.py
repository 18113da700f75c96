"""A chat session: turns, images, expert context, and answers whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llama_adapter.chat.answers import ChatAnswer
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.experts.base import Expert, Report
from llama_adapter.experts.pool import ExpertPool
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import stream
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.images import load_image
from llama_adapter.processing.processor import LlamaAdapterProcessor


class ChatSession:
    """One conversation with one model; it remembers turns, images and context.

    Experts look at images when they arrive, and those that search do so for every question;
    their reports and the given `context` precede the conversation for as long as it lasts, cut to
    the pool's budget for each question.
    """

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        experts: ExpertPool | Sequence[Expert] = (),
        context: str | None = None,
        settings: GenerationSettings | None = None,
        seed: int | None = None,
    ) -> None:
        """Start; with a `seed` sampled answers to the same questions are the same."""
        self.model = model
        self.processor = processor
        if not isinstance(experts, ExpertPool):
            experts = ExpertPool(experts, processor=processor)
        self.pool = experts
        self.settings = settings or GenerationSettings()
        self.conversation: Conversation | None = None
        self._given_context = context
        self._seed = seed
        self._reports: tuple[Report, ...] = ()
        self.last_answer: ChatAnswer | None = None

    def ask(self, question: str, *, images: Sequence[Any] = ()) -> ChatAnswer:
        """The whole answer to a question, which may come with images.

        Raises PromptError for an empty or too long prompt and ImageError for a bad image;
        the session is then as it was before.
        """
        for _ in self.stream(question, images=images):
            pass
        assert self.last_answer is not None
        return self.last_answer

    def stream(self, question: str, *, images: Sequence[Any] = ()) -> Iterator[str]:
        """The answer piece by piece; `last_answer` holds all of it at the end."""
        started = time.perf_counter()
        conversation, told, reports = self._ask(question, images)
        seed = None if self._seed is None else self._seed + len(conversation.turns) // 2
        answer = yield from stream(
            self.model, self.processor, conversation, self.settings, seed=seed
        )
        self.last_answer = ChatAnswer(
            text=answer.text,
            tokens=len(answer.tokens),
            seconds=time.perf_counter() - started,
            contexts=told,
            notes=tuple(f"{ref.name}: {ref.note}" for ref in conversation.images if ref.note),
        )
        self.conversation = conversation.assistant(answer.text)
        self._reports = reports

    def reset(self) -> None:
        """Forget every turn, image and report."""
        self.conversation, self._reports, self.last_answer = None, (), None

    def _ask(
        self, question: str, images: Sequence[Any]
    ) -> tuple[Conversation, tuple[Report, ...], tuple[Report, ...]]:
        """The conversation with the question, what experts say in it, and all their reports."""
        loaded = [_load(image) for image in images]
        if self.conversation is None:
            shown = 0
            conversation = Conversation.ask(question, images=loaded)
        else:
            shown = len(self.conversation.images)
            conversation = self.conversation.user(question, images=loaded)
        return self.pool.inform(
            conversation.with_context(self._given_context), earlier=self._reports, seen=shown
        )


def _load(image: Any) -> ImageRef:
    """The image, decoded once for all turns to come; frames of a video are decoded already."""
    ref = ImageRef.of(image)
    return ref if isinstance(ref.source, tuple) else replace(ref, source=load_image(ref))
