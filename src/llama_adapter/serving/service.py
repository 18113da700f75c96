"""From a request that has been read to an engine and back: prompts, models, limits, increments."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llama_adapter.conversation import Conversation, ImageRef, Message
from llama_adapter.errors import (
    ConfigError,
    LlamaAdapterError,
    PromptError,
    QueueFullError,
    ServingError,
    UnavailableError,
)
from llama_adapter.files import can_be_path
from llama_adapter.generation.requests import (
    EncodedPrompt,
    Engine,
    Generation,
    GenerationRequest,
    Increment,
    Sampling,
    encode_prompt,
)
from llama_adapter.serving.errors import ENDING, TOO_LATE, ApiError
from llama_adapter.serving.experts import ServedExperts
from llama_adapter.serving.limits import Limits
from llama_adapter.serving.media import Media
from llama_adapter.serving.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
)

_LETTERS_A_TOKEN = 16
"""No tokenizer makes fewer tokens of ordinary text."""


class Waker:
    """Wakes readers on the event loop, all that a step of the engine has news for with one call."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[asyncio.Event] = []
        self._lock = threading.Lock()

    def notify(self, event: asyncio.Event) -> None:
        """For any thread: set the event soon."""
        with self._lock:
            self._due.append(event)
            is_first = len(self._due) == 1
        if is_first:
            with suppress(RuntimeError):  # the loop has ended: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for event in due:
            event.set()


@dataclass(kw_only=True)
class Service:
    """An engine with everything around it that requests need."""

    engine: Engine
    base_name: str
    """The `model` that means the base without an adapter."""
    limits: Limits = field(default_factory=Limits)
    media: Media = field(default_factory=Media)
    experts: ServedExperts | None = None
    adapter_folder: Path | None = None
    """Below which adapters may be loaded at run time."""

    def __post_init__(self) -> None:
        if self.base_name in self.engine.adapters:
            raise ConfigError(f"an adapter is named {self.base_name!r}, as the base without one is")
        self.threads = ThreadPoolExecutor(self.limits.prepare_threads, "prepare")
        self.fetching = ThreadPoolExecutor(self.limits.prepare_threads, "fetch")
        """Of its own, so that slow hosts hold up nobody who names none."""
        self._unfinished = 0

    async def prepare(
        self, asked: ChatRequest | CompletionRequest, adapter: str | None, *, until: float
    ) -> tuple[EncodedPrompt, Any]:
        """Make a prompt outside the event loop; what its client has left ends at its next image, or
        next packet of a video.

        Returns the processor that made it, too.
        """
        if self._unfinished >= self.limits.max_requests:
            raise QueueFullError(f"{self._unfinished} prompts are being read")
        self.check_letters(asked)
        processor, gone = self.engine.processor(adapter), threading.Event()
        if isinstance(asked, ChatRequest):
            reading = _Reading(self.media, until=lambda: 0.0 if gone.is_set() else until)
            make = partial(self.chat_prompt, asked, adapter, processor, reading)
        else:
            make = partial(self.text_prompt, asked, processor)
        pool = self.fetching if _fetches(asked) else self.threads
        future = asyncio.get_running_loop().run_in_executor(pool, make)
        self._unfinished += 1
        future.add_done_callback(self._finish)
        try:
            return await asyncio.shield(future), processor
        except asyncio.CancelledError:
            gone.set()
            raise

    def _finish(self, future: asyncio.Future[EncodedPrompt]) -> None:
        self._unfinished -= 1
        if not future.cancelled():
            future.exception()  # looked at, for a client that has gone

    def adapter(self, model: str) -> str | None:
        """The adapter that a `model` means, None for the base; ApiError 404 for an unknown one."""
        if model in self.engine.adapters:
            return model
        if model == self.base_name:
            return None
        known = ", ".join(self.models)
        raise ApiError(
            404,
            f"no model {model[:100]!r}; there are: {known}",
            code="model_not_found",
            param="model",
        )

    @property
    def models(self) -> tuple[str, ...]:
        """What `model` may be."""
        return (*self.engine.adapters, self.base_name)

    # --- prompts ------------------------------------------------------------------------------

    def chat_prompt(
        self, body: ChatRequest, adapter: str | None, processor: Any, reading: _Reading
    ) -> EncodedPrompt:
        """The prompt of a chat, with its images read and its experts asked."""
        conversation = self._conversation(body.messages, reading.load)
        if not conversation.awaits_answer:
            raise ApiError(
                400, "the last message must be the user's", code="invalid_value", param="messages"
            )
        if conversation.images and adapter is None:
            raise PromptError("the base reads text alone; choose an adapter to show it images")
        if self.experts is not None:
            conversation = self.experts.inform(conversation, body.experts, processor=processor)
        elif body.experts:
            raise ApiError(
                400, "this server has no experts", code="unknown_expert", param="experts"
            )
        return encode_prompt(processor, conversation)

    def text_prompt(self, body: CompletionRequest, processor: Any) -> EncodedPrompt:
        """The prompt of a text or of tokens that go on."""
        if isinstance(body.prompt, list):
            tokens = tuple(int(token) for token in body.prompt)
            vocabulary = len(processor.tokenizer)
            if not all(0 <= token < vocabulary for token in tokens):
                raise PromptError(f"tokens of a prompt must be from 0 to {vocabulary - 1}")
            return EncodedPrompt(input_ids=tokens, placeholders=(-1,) * len(tokens))
        encoded = processor.encode(body.prompt, rendered=True)
        if max(encoded.placeholders, default=-1) >= 0:
            raise PromptError("a text completion shows no image; use chat completions")
        return EncodedPrompt(input_ids=encoded.input_ids, placeholders=encoded.placeholders)

    def tokens(self, messages: Sequence[ChatMessage], adapter: str | None) -> tuple[int, ...]:
        """The tokens of a chat's prompt, without reading its images."""
        conversation = self._conversation(messages, _unread)
        return tuple(self.engine.processor(adapter).encode(conversation).input_ids)

    def check_letters(self, asked: ChatRequest | CompletionRequest | TokenizeRequest) -> None:
        """ApiError for a text that must have too many tokens, before it is made into them."""
        messages = getattr(asked, "messages", None)
        param, texts = "prompt", [getattr(asked, "prompt", "")]
        if messages is not None:
            param, texts = "messages", [text for message in messages for text in message.texts]
        letters = sum(map(len, texts))
        most = _LETTERS_A_TOKEN * min(self.limits.max_prompt_tokens, self.engine.context_length)
        if letters > most:
            raise ApiError(
                400,
                f"the text has {letters} letters; at most {most} may be",
                code="context_length_exceeded",
                param=param,
            )

    def _conversation(self, messages: Sequence[ChatMessage], load: _Load) -> Conversation:
        """What was said, with every image and video read."""
        parts = [p for m in messages if isinstance(m.content, list) for p in m.content]
        count = sum(part.url is not None for part in parts)
        if count > self.limits.max_images:
            raise PromptError(
                f"the messages hold {count} images and videos; "
                f"at most {self.limits.max_images} may be"
            )
        return Conversation(
            messages=tuple(
                _message(message, load, where=f"messages.{index}")
                for index, message in enumerate(messages)
            )
        )

    # --- generation ---------------------------------------------------------------------------

    def request(
        self,
        prompt: EncodedPrompt,
        adapter: str | None,
        sampling: dict[str, Any],
        *,
        started: float,
        encoded_by: Any = None,
    ) -> GenerationRequest:
        """What the engine is asked; ApiError for what is beyond the limits."""
        length, context = len(prompt.input_ids), self.engine.context_length
        room = min(context, self.limits.max_prompt_tokens + 1) - length
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {length} tokens; at most {room + length - 1} fit",
                code="context_length_exceeded",
                param="messages",
            )
        wanted = sampling.get("max_tokens")
        most = min(self.limits.max_tokens, context - length)
        if wanted is not None and wanted > most:
            message, code = (
                f"max_tokens is {wanted}; answers of this server have at most {most} tokens",
                "invalid_value",
            )
            if most < self.limits.max_tokens:
                message, code = (
                    f"max_tokens is {wanted}; after a prompt of {length} tokens at most {most} "
                    "may be generated",
                    "context_length_exceeded",
                )
            raise ApiError(400, message, code=code, param="max_tokens")
        return GenerationRequest(
            prompt=prompt,
            adapter=adapter,
            sampling=Sampling(**{**sampling, "max_tokens": wanted or most}),
            deadline=started + self.limits.request_seconds,
            encoded_by=encoded_by,
        )

    def check_answers(self, n: int) -> None:
        """ApiError for more answers to one prompt than are made."""
        if n > self.limits.max_answers:
            raise ApiError(
                400,
                f"n is {n}; at most {self.limits.max_answers} answers are made",
                code="invalid_value",
                param="n",
            )

    def load_adapter(self, name: str, directory: str) -> None:
        """Load an adapter below the folder for that."""
        if self.adapter_folder is None:
            raise ConfigError(
                "this server loads no adapters: it was started without --adapter-folder"
            )
        if name in self.models:
            raise ConfigError(f"there is a model {name!r} already")
        folder = self.adapter_folder.resolve()
        path = (folder / directory).resolve() if can_be_path(directory) else None
        if path is None or not path.is_relative_to(folder) or not path.is_dir():
            raise ConfigError(f"there is no directory {directory[:200]!r} in the adapters' folder")
        self.engine.load_adapter(name, path)


class _Load(Protocol):
    """Brings the image or video of a part."""

    def __call__(self, url: str, /, *, is_video: bool, name: str) -> ImageRef: ...


def _unread(_url: str, *, name: str, **_: bool) -> ImageRef:
    """An image that nobody looks at."""
    return ImageRef(source=None, name=name)


class _Reading:
    """The images of one request, within what they may take together."""

    def __init__(self, media: Media, *, until: Callable[[], float]) -> None:
        self._media = media
        self._until = until
        self._pixels_left = media.limits.max_request_pixels

    def load(self, url: str, *, is_video: bool, name: str) -> ImageRef:
        """The next one; ApiError for what cannot be read or is too much."""
        self._refuse_if_late()
        if self._pixels_left < 1:
            raise self._too_many(name)
        try:
            image = self._media.load(
                url,
                is_video=is_video,
                name=name,
                until=self._until,
                pixels_left=self._pixels_left,
            )
        except LlamaAdapterError as error:
            self._refuse_if_late()
            raise ApiError(400, str(error), code="invalid_image", param=name) from error
        frames = image.source if isinstance(image.source, tuple) else (image.source,)
        self._pixels_left -= sum(frame.width * frame.height for frame in frames)
        return image

    def _refuse_if_late(self) -> None:
        if time.monotonic() >= self._until():
            raise ApiError(504, TOO_LATE, code="deadline_exceeded")

    def _too_many(self, name: str) -> ApiError:
        most = self._media.limits.max_request_pixels
        return ApiError(
            400,
            f"the images of a request may have {most:,} pixels together",
            code="invalid_image",
            param=name,
        )


def _fetches(asked: ChatRequest | CompletionRequest) -> bool:
    """Whether it names something that is on another host."""
    messages = asked.messages if isinstance(asked, ChatRequest) else ()
    parts = [p for m in messages if isinstance(m.content, list) for p in m.content]
    return any(part.url is not None and part.url[:4].lower() == "http" for part in parts)


def _message(message: ChatMessage, load: _Load, *, where: str) -> Message:
    role = "system" if message.role == "developer" else message.role
    parts = message.content if isinstance(message.content, list) else []
    images = [
        load(part.url, is_video=part.video_url is not None, name=f"{where}.content.{index}")
        for index, part in enumerate(parts)
        if part.url is not None
    ]
    return Message(role=role, text="\n".join(message.texts), images=tuple(images))


class Reader:
    """Reads a generation on the event loop."""

    def __init__(self, engine: Engine, request: GenerationRequest, waker: Waker) -> None:
        self._news = asyncio.Event()
        notify = self._news
        self.generation: Generation = engine.submit(request, notify=lambda: waker.notify(notify))
        self.first_at: float | None = None
        """When the first token was there."""

    async def has_failed(self) -> bool:
        """Whether it ends without any token, once it has ended or there is one."""
        while not (self.generation.is_done or self.generation.usage.completion_tokens):
            await self._news.wait()
            self._news.clear()
        self._news.set()  # what is there is still to be read
        return not self.generation.usage.completion_tokens

    async def increments(self) -> AsyncIterator[Increment]:
        """Every increment; ApiError 504 where time is up, UnavailableError where draining is."""
        while True:
            await self._news.wait()
            self._news.clear()
            is_last = self.generation.is_done
            for part in self.generation.read():
                if part.finish == "deadline":
                    raise self._cut_off()
                if self.first_at is None and part.tokens:
                    self.first_at = time.monotonic()
                yield part
            if is_last:
                self.generation.read()  # raises what the engine has failed with
                return

    def _cut_off(self) -> ServingError:
        """Why the engine ended an answer: the request's time is up, or the time to drain is."""
        deadline = self.generation.request.deadline
        if deadline is None or time.monotonic() < deadline:
            return UnavailableError(ENDING)
        return ApiError(504, TOO_LATE, code="deadline_exceeded")


@asynccontextmanager
async def ends_when_client_leaves(receive: Any) -> AsyncIterator[None]:
    """Cancels the block when the client goes away; ApiError 499 then, which nobody reads."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError as error:
        if is_gone and task.uncancel() == 0:
            raise ApiError(499, "the client has gone", code="client_gone") from error
        raise
    finally:
        watcher.cancel()
