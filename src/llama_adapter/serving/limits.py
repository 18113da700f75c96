"""How much one client, and all clients together, may ask of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from llama_adapter.errors import ConfigError, QueueFullError
from llama_adapter.serving.errors import ApiError


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds; a request beyond one is refused with a clear error."""

    max_requests: int = 64
    """Answers asked for at once, waiting ones included; one more is a 429."""
    max_body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    """Until a request's body has arrived."""
    header_seconds: float = 10.0
    """Until a request's headers have arrived."""
    request_seconds: float = 120.0
    """Until a request is answered."""
    max_images: int = 16
    """Images and videos of one conversation."""
    max_pixels: int = 40_000_000
    """Pixels of one image, or of one frame."""
    max_request_pixels: int = 120_000_000
    """Pixels of all images and frames of one request, which are decoded at the same time."""
    max_media_bytes: int = 24 << 20
    """Bytes of one file that is fetched."""
    fetch_seconds: float = 10.0
    """For one image or video that is fetched."""
    video_frames: int = 8
    video_seconds: float = 600.0
    max_prompt_tokens: int = 1 << 18
    """Tokens of one prompt, where the base's context is not shorter anyway."""
    max_tokens: int = 1024
    """Tokens of one answer, and how many it may have where a request does not say."""
    max_answers: int = 8
    """Answers to one prompt (`n`)."""
    prepare_threads: int = 4
    """Requests whose images and prompts are read at the same time."""
    max_connections: int = 1000

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{part.name} must be above 0 and finite, got {value}")


class Admission:
    """Counts answers under way, so that the server says no before it reads what is asked."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.count = 0

    @contextmanager
    def enter(self, answers: int = 1) -> Iterator[None]:
        """Hold places within the block; QueueFullError where there are not as many."""
        if self.count + answers > self.limits.max_requests:
            raise QueueFullError(
                f"{self.count} answers are under way; at most {self.limits.max_requests} may be"
            )
        self.count += answers
        try:
            yield
        finally:
            self.count -= answers


async def read_body(scope: Any, receive: Any, limits: Limits) -> bytes:
    """A request's whole body; ApiError for one that is too long or too slow, or incomplete."""
    too_long = ApiError(
        413, f"the body has more than {limits.max_body_bytes} bytes", code="body_too_large"
    )
    if int(dict(scope["headers"]).get(b"content-length", b"0")) > limits.max_body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ApiError(400, "the body is not complete", code="incomplete_body")
                body += message.get("body", b"")
                if len(body) > limits.max_body_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(
            408, f"the body has not arrived within {limits.body_seconds:g} s", code="body_too_slow"
        ) from error
