"""A chat session: turns, pictures, expert context, and answers whole or as a stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.experts.base import Expert, Report
from llama_adapter.experts.pool import ExpertPool
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.images import load_image
from llama_adapter.processing.processor import LlamaAdapterProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back for one question."""

    text: str
    tokens: int
    """New tokens, the end of turn included."""
    seconds: float
    """From the question to the last token, experts included."""
    contexts: tuple[Report, ...]
    """What each expert reported, as the model read it; those that failed say why."""
    notes: tuple[str, ...] = ()
    """What to know about the images it rests on, such as a video that is damaged."""


class ChatSession:
    """One conversation with one model; it remembers turns, pictures and context.

    Experts look at pictures when they arrive, and those that search do so for every question;
    their reports and the given `context` stand before the conversation for as long as it lasts,
    cut anew for each question to the pool's budget.
    """

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        experts: ExpertPool | Sequence[Expert] = (),
        context: str | None = None,
        settings: GenerationSettings | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        if not isinstance(experts, ExpertPool):
            experts = ExpertPool(experts, processor=processor)
        self.pool = experts
        self.settings = settings or GenerationSettings()
        self.conversation: Conversation | None = None
        self._given_context = context
        self._reports: tuple[Report, ...] = ()
        self.last_answer: Answer | None = None

    def ask(self, question: str, *, images: Sequence[Any] = ()) -> Answer:
        """The whole answer to a question, which may come with pictures.

        Raises PromptError for an empty or too long prompt and ImageError for a bad picture;
        the session then stands as it stood before.
        """
        for _ in self.stream(question, images=images):
            pass
        assert self.last_answer is not None
        return self.last_answer

    def stream(self, question: str, *, images: Sequence[Any] = ()) -> Iterator[str]:
        """The answer piece by piece; `last_answer` holds all of it at the end."""
        started = time.perf_counter()
        conversation, reports, told, inputs = self._prepare(question, images)
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        settings = self.settings.as_keywords()
        keywords = {**inputs, **settings, **self.processor.stop_options}
        worker = _Worker(self.model, keywords, streamer)
        worker.start()
        pieces = []
        try:
            for piece in streamer:
                pieces.append(piece)
                if piece:
                    yield piece
        finally:
            worker.stop()
            worker.join()
        tokens = worker.result()
        text = self.processor.without_end("".join(pieces))
        self.last_answer = Answer(
            text=text,
            tokens=int(tokens.shape[1] - inputs["input_ids"].shape[1]),
            seconds=time.perf_counter() - started,
            contexts=told,
            notes=tuple(f"{ref.name}: {ref.note}" for ref in conversation.images if ref.note),
        )
        self.conversation = conversation.assistant(text)
        self._reports = reports

    def reset(self) -> None:
        """Forget every turn, picture and report."""
        self.conversation, self._reports, self.last_answer = None, (), None

    def _prepare(self, question: str, images: Sequence[Any]) -> _Prepared:
        loaded = [_load(image) for image in images]
        context = self._given_context
        shown = 0
        if self.conversation is None:
            conversation = Conversation.ask(question, images=loaded, context=context)
        else:
            shown = len(self.conversation.images)
            conversation = self.conversation.user(question, images=loaded).with_context(context)
        conversation, told, reports = self.pool.inform(
            conversation, earlier=self._reports, seen=shown
        )
        inputs = self.processor([conversation])
        return _Prepared(conversation, reports, told, inputs.to(self.model.device))


class _Prepared(NamedTuple):
    conversation: Conversation
    reports: tuple[Report, ...]
    """All that experts have found so far."""
    told: tuple[Report, ...]
    """What of it the model reads now."""
    inputs: Any


class _Worker(threading.Thread):
    """Generates in the background, so that pieces can be shown as they come."""

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        keywords: dict[str, Any],
        streamer: TextIteratorStreamer,
    ) -> None:
        super().__init__(daemon=True)
        self._model = model
        self._keywords = keywords
        self._streamer = streamer
        self._abandoned = threading.Event()
        self._tokens: torch.Tensor | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._tokens = self._model.generate(
                **self._keywords, streamer=self._streamer, stopping_criteria=[self._must_end]
            )
        except BaseException as error:
            self._error = error
            self._streamer.end()

    def stop(self) -> None:
        """End after the current token: whoever read the pieces has gone."""
        self._abandoned.set()

    def _must_end(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        return torch.full((len(tokens),), self._abandoned.is_set(), device=tokens.device)

    def result(self) -> torch.Tensor:
        """The tokens, prompt included; raises what generation raised."""
        if self._error is not None:
            raise self._error
        assert self._tokens is not None
        return self._tokens


def _load(image: Any) -> Image.Image | ImageRef:
    ref = ImageRef.of(image)
    # the frames of a video, decoded already
    return ref if isinstance(ref.source, tuple) else load_image(ref.source, name=ref.name)
