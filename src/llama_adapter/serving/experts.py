"""Experts of a server: opened once, asked by many requests, each expert one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.conversation import Conversation
from llama_adapter.errors import ExpertError
from llama_adapter.experts import Expert, ExpertInfo, ExpertPool, Report
from llama_adapter.experts.base import Request
from llama_adapter.experts.caption import ADAPTER_INSTRUCTION, CaptionOptions, captions
from llama_adapter.generation.requests import (
    Engine,
    Generation,
    GenerationRequest,
    Sampling,
    encode_prompt,
)
from llama_adapter.model.configuration import LlamaAdapterConfig, read_adapter_config
from llama_adapter.serving.errors import ENDING, ApiError


class ServedExperts:
    """The experts that requests may name."""

    def __init__(self, pool: ExpertPool) -> None:
        """Take over a pool; its limits and cache hold for every request."""
        self._pool = pool
        self._experts = {expert.name: _OneAtATime(expert) for expert in pool.experts}

    @property
    def names(self) -> tuple[str, ...]:
        """What `experts` of a request may hold."""
        return tuple(self._experts)

    def inform(
        self, conversation: Conversation, names: Sequence[str] | None, *, processor: object
    ) -> Conversation:
        """The conversation with what the named experts, or all, say of it in its context."""
        for name in names or ():
            if name not in self._experts:
                raise ApiError(
                    400,
                    f"no expert {name[:100]!r}; there are: {', '.join(self.names)}",
                    code="unknown_expert",
                    param="experts",
                )
        chosen = dict.fromkeys(self.names if names is None else names)
        pool = ExpertPool(
            [self._experts[name] for name in chosen],
            processor=processor,  # type: ignore[arg-type]
            timeout=self._pool.timeout,
            max_tokens=self._pool.max_tokens,
            cache=self._pool.cache,
        )
        return pool.inform(conversation).conversation


class _OneAtATime:
    """An expert that other requests may be asking: a call waits for them, up to its deadline."""

    def __init__(self, expert: Expert) -> None:
        self._expert = expert
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The expert's own."""
        return self._expert.name

    @property
    def info(self) -> ExpertInfo:
        """The expert's own."""
        return self._expert.info

    def consult(self, request: Request) -> Report:
        """What the expert reports; ExpertError where others keep it busy for too long."""
        left = request.seconds_left
        if not self._lock.acquire(timeout=-1 if left is None else max(0.0, left)):
            raise ExpertError("busy with the questions of others")
        try:
            return self._expert.consult(request)
        finally:
            self._lock.release()


class EngineCaptions:
    """Captions by an adapter of the server's engine, in rows next to those of other requests."""

    name = CaptionOptions.name
    info = ExpertInfo(uses_question=False)

    def __init__(self, engine: Engine, directory: Path, options: CaptionOptions) -> None:
        """Load the adapter as `caption-expert`; ExpertError for beams, which rows do not have."""
        if options.beams > 1:
            raise ExpertError(
                f"expert {self.name!r}: a server captions in the rows of its batch, which take "
                f"beams=1, got {options.beams}"
            )
        self._engine = engine
        self._adapter = "caption-expert"
        engine.load_adapter(self._adapter, directory)
        config = LlamaAdapterConfig.from_dict(read_adapter_config(directory))
        assert isinstance(config, LlamaAdapterConfig)
        learned = config.adapter_config.caption_instruction
        self._instruction = options.instruction or learned or ADAPTER_INSTRUCTION
        self._sampling = Sampling(max_tokens=options.max_new_tokens)

    def consult(self, request: Request) -> Report:
        """One caption per image; ExpertError where they are not done in time."""
        processor = self._engine.processor(self._adapter)
        asked: list[Generation] = []
        try:
            for image in request.images:
                conversation = Conversation.ask(self._instruction, images=[image])
                asked.append(
                    self._engine.submit(
                        GenerationRequest(
                            prompt=encode_prompt(processor, conversation),
                            adapter=self._adapter,
                            sampling=self._sampling,
                            deadline=request.deadline,
                            encoded_by=processor,
                        )
                    )
                )
            return captions([_whole(generation) for generation in asked])
        finally:
            for generation in asked:  # those that are not done where one is refused
                generation.cancel()


def _whole(generation: Generation) -> str:
    parts = list(generation)
    if parts[-1].finish == "deadline":
        deadline = generation.request.deadline
        is_late = deadline is not None and time.monotonic() >= deadline
        raise ExpertError("captions took too long" if is_late else ENDING)
    return "".join(part.text for part in parts)
