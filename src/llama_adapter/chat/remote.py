"""A chat session with a server that speaks OpenAI's protocol, such as `llama-adapter serve`."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llama_adapter.chat.answers import ChatAnswer
from llama_adapter.errors import ConfigError, ImageError, PromptError, ServingError
from llama_adapter.files import read_bytes
from llama_adapter.generation import GenerationSettings
from llama_adapter.processing.images import MAX_FILE_BYTES, load_image
from llama_adapter.processing.video import is_video

KEY_VARIABLE = "LLAMA_ADAPTER_API_KEY"
"""Where the command line takes a server's key from."""
_SECONDS_OF_SILENCE = 300


class RemoteSession:
    """One conversation with one model of a server; it remembers turns and images itself."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        experts: Sequence[str] | None = None,
        settings: GenerationSettings | None = None,
        seed: int | None = None,
    ) -> None:
        """Set up; `url` is the server's address, with or without `/v1`.

        `experts` are names of the server's experts; None: those that it asks by itself.
        """
        if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).hostname:
            raise ConfigError(f"--url must be an http or https address, got {url[:200]!r}")
        self.model = model
        self.last_answer: ChatAnswer | None = None
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        settings = settings or GenerationSettings()
        self._options: dict[str, Any] = {
            "model": model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if experts is not None:
            self._options["experts"] = list(experts)
        self._messages: list[dict[str, Any]] = []

    def ask(self, question: str, *, images: Sequence[Any] = ()) -> ChatAnswer:
        """The whole answer to a question, which may come with images and videos."""
        for _ in self.stream(question, images=images):
            pass
        assert self.last_answer is not None
        return self.last_answer

    def stream(self, question: str, *, images: Sequence[Any] = ()) -> Iterator[str]:
        """The answer piece by piece; `last_answer` holds all of it at the end."""
        started = time.perf_counter()
        parts = [*map(_part, images), {"type": "text", "text": question}]
        asked = {"role": "user", "content": parts if images else question}
        text, tokens = "", 0
        for event in self._events({**self._options, "messages": [*self._messages, asked]}):
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    text += piece
                    yield piece
        self.last_answer = ChatAnswer(
            text=text, tokens=tokens, seconds=time.perf_counter() - started, contexts=()
        )
        self._messages += [asked, {"role": "assistant", "content": text}]

    def reset(self) -> None:
        """Forget every turn and image."""
        self._messages, self.last_answer = [], None

    def _events(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What the server sends; PromptError for a question that it refuses."""
        request = urllib.request.Request(  # noqa: S310 (checked above)
            self._url, json.dumps(body).encode(), self._headers
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS_OF_SILENCE) as response:  # noqa: S310
                for line in response:
                    content = line.strip().removeprefix(b"data: ")
                    if content == b"[DONE]":
                        return
                    if content == line.strip():
                        continue
                    event = json.loads(content)
                    if "error" in event:
                        raise ServingError(f"{self._url}: {event['error'].get('message')}")
                    yield event
            raise ServingError(f"{self._url}: the connection ended before the answer did")
        except urllib.error.HTTPError as error:
            kind = PromptError if error.code == 400 else ServingError
            hint = (
                f"; `chat` takes it from the environment variable {KEY_VARIABLE}"
                if error.code == 401
                else ""
            )
            raise kind(f"{self._url}: {_reason(error)}{hint}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServingError(f"{self._url}: {_failure(error)}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, or the status."""
    try:
        return str(json.loads(error.read(1 << 16))["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"status {error.code}"


def _failure(error: Exception) -> str:
    """Why a connection came to nothing."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ConnectionRefusedError):
        return "no server listens there; `llama-adapter serve MODEL` starts one"
    return str(getattr(reason, "strerror", None) or reason)


def _part(source: Path) -> dict[str, Any]:
    """An image or video as a part of a message, in the bytes of its file."""
    content = read_bytes(source, error=ImageError, limit=MAX_FILE_BYTES, name=f"image {source}")
    kind = "video" if is_video(source) else "image"
    if kind == "image":
        load_image(content, name=str(source))  # whatever cannot be read is not sent
    mime = mimetypes.guess_type(source.name)[0] or f"{kind}/*"
    url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
