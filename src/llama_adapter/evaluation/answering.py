"""Who may answer: a model in this process, or any OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import EvaluationError, LlamaAdapterError
from llama_adapter.evaluation.judges import import_openai, short_error
from llama_adapter.evaluation.tasks.base import Generation

if TYPE_CHECKING:
    from llama_adapter.model import LlamaAdapterForConditionalGeneration
    from llama_adapter.processing.processor import LlamaAdapterProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """An answer, or why there is none."""

    text: str | None = None
    problem: str | None = None
    has_failed: bool = False
    """Whether the problem is the answerer's, such as a dead server's, and not the record's."""
    contexts: tuple[dict[str, Any], ...] = ()
    """What experts reported, where any were asked."""


class Answerer(Protocol):
    """Answers conversations, several at a time."""

    def answer(
        self, conversations: Sequence[Conversation], generation: Generation, *, seed: int
    ) -> list[Prediction]:
        """One result for each conversation, in order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: enough to tell one model from another."""
        ...


class LocalAnswerer:
    """An adapted model in this process."""

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        directory: Path,
    ) -> None:
        self._model = model
        self._processor = processor
        self._directory = directory

    def answer(
        self, conversations: Sequence[Conversation], generation: Generation, *, seed: int
    ) -> list[Prediction]:
        """A batch at once; where one prompt spoils it, each alone."""
        from llama_adapter.generation.answer import answer_each

        found = answer_each(self._model, self._processor, conversations, generation, seed=seed)
        return [
            Prediction(problem=str(one))
            if isinstance(one, LlamaAdapterError)
            else Prediction(text=one.text)
            for one in found
        ]

    def describe(self) -> dict[str, Any]:
        """Checksums of the adapter's files, its template and its frame rule."""
        from llama_adapter.evaluation.manifest import file_checksum

        files = ("adapter_config.json", "adapter_model.safetensors")
        return {
            "kind": "local",
            "directory": str(self._directory),
            "sha256": {
                name: file_checksum(self._directory / name)
                for name in files
                if (self._directory / name).exists()
            },
            "template": self._processor.template,
            "frame_rule": self._model.adapter_config.frame_rule,
        }


class EndpointAnswerer:
    """A model behind an OpenAI-compatible endpoint; frames go as several images."""

    def __init__(self, *, url: str, model: str, timeout: float = 120.0, retries: int = 4) -> None:
        """The key comes from `OPENAI_API_KEY`."""
        self._openai = import_openai()
        self._url = url
        self._model = model
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = self._openai.OpenAI(
            base_url=url, api_key=key, timeout=timeout, max_retries=retries
        )

    def answer(
        self, conversations: Sequence[Conversation], generation: Generation, *, seed: int
    ) -> list[Prediction]:
        """All at once, each in its own request."""
        with ThreadPoolExecutor(max_workers=max(1, len(conversations))) as pool:
            return list(pool.map(lambda c: self._one(c, generation, seed), conversations))

    def _one(self, conversation: Conversation, generation: Generation, seed: int) -> Prediction:
        openai = self._openai
        try:
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=as_messages(conversation),
                max_tokens=generation.max_new_tokens,
                temperature=generation.temperature,
                seed=seed,
            )
            return Prediction(text=(reply.choices[0].message.content or "").strip())
        except LlamaAdapterError as error:
            return Prediction(problem=str(error))
        except openai.APIStatusError as error:
            if error.status_code in {401, 403, 404}:
                raise EvaluationError(f"{self._url} refuses: {short_error(error)}") from error
            return Prediction(problem=short_error(error), has_failed=True)
        except (openai.APIError, ValueError, TypeError, IndexError, AttributeError) as error:
            return Prediction(problem=short_error(error), has_failed=True)

    def describe(self) -> dict[str, Any]:
        """The address and the model's name there."""
        return {"kind": "endpoint", "url": self._url, "model": self._model}

    def close(self) -> None:
        """Close connections."""
        self._client.close()


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation in the format of OpenAI's chat completions, images as data URLs."""
    messages = []
    context = conversation.context
    for message in conversation.messages:
        text = message.text
        if context and message.role == "user":
            text, context = f"{context}\n\n{text}", None
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}}
            for ref in message.images
            for url in _data_urls(ref)
        ]
        content: Any = [*parts, {"type": "text", "text": text}] if parts else text
        messages.append({"role": message.role, "content": content})
    return messages


def _data_urls(ref: ImageRef) -> list[str]:
    from llama_adapter.processing.images import load_image

    frames = ref.source if isinstance(ref.source, tuple) else (ref,)
    urls = []
    for frame in frames:
        buffer = io.BytesIO()
        load_image(frame).save(buffer, "JPEG", quality=92)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return urls
