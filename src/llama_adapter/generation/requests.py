"""What an engine is asked, what it delivers, and what each engine promises.

A request is made outside the engine: `encode_prompt` reads, tokenizes and resizes, so that what is
wrong with a prompt is found before it waits for a row. The engine delivers increments to the
request's `Generation`, which any thread may read.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import ConfigError, PromptError, UnavailableError
from llama_adapter.processing.prompts import frames_of

Finish = Literal["stop", "length", "deadline", "cancelled"]
State = Literal["starting", "ready", "draining", "dead"]

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the answers of one request are drawn; ConfigError names the field that is wrong."""

    temperature: float = 0.0
    """0: the likeliest token every time."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are left out."""
    seed: int | None = None
    """Makes sampled answers repeatable, whatever runs in other rows."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to the template's own; they are not part of it."""
    max_tokens: int = 256
    n: int = 1
    """Answers to one prompt."""
    logprobs: bool = False
    """Whether each token comes with its log-probability before temperature and the other cuts."""
    top_logprobs: int = 0
    """With `logprobs`: how many of the likeliest tokens come with theirs."""
    json_schema: str | None = None
    """A JSON schema, as JSON text, that the answer follows."""
    grammar: str | None = None
    """A grammar in GBNF that the answer follows."""

    def __post_init__(self) -> None:
        is_valid: dict[str, tuple[bool, str]] = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 and finite"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "stop": (all(self.stop), "texts that are not empty"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "n": (self.n >= 1, "at least 1"),
            "top_logprobs": (
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS * self.logprobs,
                f"from 0 to {MAX_TOP_LOGPROBS}, and 0 without logprobs",
            ),
            "grammar": (None in (self.grammar, self.json_schema), "left out with json_schema"),
        }
        for name, (holds, expected) in is_valid.items():
            if not holds:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """What the vision encoder reads for one set of visual prompts."""

    key: str
    """Equal keys mean equal values."""
    pixel_values: Any = field(repr=False)
    """A tensor (3, H, W), or (F, 3, H, W) of several frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    input_ids: tuple[int, ...]
    placeholders: tuple[int, ...] = ()
    """For each token which of `images` it is a placeholder of, -1 for none."""
    images: tuple[EncodedImage, ...] = ()
    """One for each image; with `visual_scope` "all" one of all frames, which every token reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt, of which an engine makes `sampling.n` answers."""

    prompt: EncodedPrompt
    adapter: str | None = None
    """Which loaded adapter answers; None: the base."""
    sampling: Sampling = field(default_factory=Sampling)
    deadline: float | None = None
    """When all its answers end wherever they are, by `time.monotonic`."""
    encoded_by: Any = field(default=None, repr=False)
    """The processor that made the prompt, which the adapter must still have; None: any."""

    def check_processor(self, current: Any) -> None:
        """UnavailableError where another adapter has the name by now."""
        if self.encoded_by is not None and self.encoded_by is not current:
            raise UnavailableError(f"adapter {self.adapter!r} has just been exchanged")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token and how likely it was; NaN where nobody asked."""

    token: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place and their log-probabilities, the likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Increment:
    """What has been added to one of a request's answers."""

    choice: int = 0
    """Which answer, from 0."""
    text: str = ""
    """Text that no later token changes; may be empty while a stop text could be beginning."""
    tokens: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    """Why the answer ends, in its last increment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request has cost so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those whose keys and values were there already."""
    completion_tokens: int = 0


class Generation:
    """A request under way: the engine writes to it, one reader reads, anyone may cancel."""

    def __init__(
        self, request: GenerationRequest, notify: Callable[[], None] | None = None
    ) -> None:
        """Start; `notify` is called by the engine's thread whenever there is something to read."""
        self.request = request
        self.usage = Usage(prompt_tokens=len(request.prompt.input_ids))
        self._notify = notify
        self._increments: deque[Increment] = deque()
        self._changed = threading.Condition()
        self._open = set(range(request.sampling.n))
        self._error: Exception | None = None
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more: the engine frees its rows at the next step."""
        return self._is_cancelled

    @property
    def is_done(self) -> bool:
        """Whether the engine has delivered everything, or failed."""
        return not self._open

    def cancel(self) -> None:
        """End it at the next step; each answer that has not ended finishes as `cancelled`."""
        self._is_cancelled = True

    def put(self, *increments: Increment, usage: Usage | None = None) -> None:
        """For the engine: deliver increments, and what the request has cost so far."""
        with self._changed:
            self._increments.extend(increments)
            self.usage = usage or self.usage  # a reader that sees it done sees this too
            self._open -= {part.choice for part in increments if part.finish is not None}
            self._changed.notify_all()
        self._tell()

    def fail(self, error: Exception) -> None:
        """For the engine: end every answer with an error, which the reader gets."""
        with self._changed:
            self._error, self._open = error, set()
            self._changed.notify_all()
        self._tell()

    def read(self) -> list[Increment]:
        """What has arrived since the last call, without waiting; raises what the engine failed
        with once all before it is read.
        """
        with self._changed:
            found = list(self._increments)
            self._increments.clear()
            if self._error is not None and not found:
                raise self._error
            return found

    def __iter__(self) -> Iterator[Increment]:
        """Every increment until the last answer has ended."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._increments or self.is_done)
                is_last = self.is_done
            found = self.read()
            yield from found
            if is_last and (self._error is None or not found):
                return

    def _tell(self) -> None:
        if self._notify is not None:
            self._notify()


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """Whether an engine takes requests."""

    state: State
    reason: str = ""
    """Why it is dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """How busy an engine is."""

    rows: int
    """Answers it can work on at once."""
    busy_rows: int
    queued: int
    """Requests that wait for a row."""


class Engine(Protocol):
    """Answers requests of one base with many adapters; every method may be called by any thread."""

    @property
    def health(self) -> Health: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        ...

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        ...

    def processor(self, adapter: str | None) -> Any:
        """The `LlamaAdapterProcessor` that makes an adapter's prompts; ConfigError for a name that
        is not loaded. The base is asked through the first adapter's.
        """
        ...

    def submit(
        self, request: GenerationRequest, *, notify: Callable[[], None] | None = None
    ) -> Generation:
        """Queue a request; never waits.

        Raises QueueFullError at once where the queue is full, UnavailableError unless the engine
        is ready and the adapter the one that the prompt was made for, PromptError where prompt
        and answer do not fit into `context_length`, and ConfigError for what it cannot do, such as
        an adapter that is not loaded.
        """
        ...

    def load_adapter(self, name: str, directory: Path) -> None:
        """Add an adapter while others answer; the errors of loading for one that does not fit."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter; requests that use it fail or finish first."""
        ...

    def drain(self, seconds: float) -> None:
        """Take no more requests, wait at most this long for the accepted ones, and stop.

        What is not done by then finishes as `deadline`.
        """
        ...


def encode_prompt(processor: Any, conversation: Conversation) -> EncodedPrompt:
    """The conversation as the model of an adapter's processor reads it.

    Raises PromptError, ImageError or VideoError for what cannot be read.
    """
    encoded = processor.encode(conversation)
    refs = conversation.images
    if refs and processor.image_processor is None:
        raise PromptError("the prompt holds an image, but this adapter reads text alone")
    if refs and processor.visual_scope == "all":
        # one set of visual prompts a request: several images count as frames of one
        frames = tuple(frame for ref in refs for frame in frames_of(ref))
        refs = (ImageRef(source=frames, name=refs[0].name),)
    images = tuple(_encode_image(processor, ref) for ref in refs)
    if processor.visual_scope != "all" and (found := max(encoded.placeholders) + 1) != len(images):
        raise PromptError(f"the prompt has {found} image placeholders, but {len(images)} images")
    return EncodedPrompt(
        input_ids=encoded.input_ids, placeholders=encoded.placeholders, images=images
    )


def _encode_image(processor: Any, ref: ImageRef) -> EncodedImage:
    pixels = processor.pixel_values([ref])[0].contiguous()
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy())
    return EncodedImage(key=digest.hexdigest(), pixel_values=pixels)
