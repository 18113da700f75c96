"""Conversations: the value that crosses all layers, made of standard library types only.

A conversation is what was said (messages) and what is known in addition (context): texts of
experts, a passage, the "Input" of an Alpaca record. Images are references; nothing is read here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from llama_adapter.errors import PromptError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")

_ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """Where the pixels of an image are to be had; `processing.load_image` reads it."""

    source: Any
    """A path, encoded bytes, a decoded PIL image, a function that makes one, a tuple of them (the
    frames of a video), or None where the image is handed in apart."""
    name: str = "image"
    """What messages about this image call it."""
    key: str = ""
    """Where it is known without reading the image: equal keys mean equal pixels."""
    note: str = ""
    """What a reader of an answer about it should know, such as that a video is damaged."""

    @classmethod
    def of(cls, source: Any, *, name: str | None = None) -> Self:
        """A reference to a path, encoded bytes, a `data:` URL, a PIL image or a list of frames."""
        if isinstance(source, cls):
            return source
        if isinstance(source, list | tuple):
            return cls(source=tuple(source), name=name or f"{len(source)} frames")
        if isinstance(source, Path):
            return cls(source=source, name=name or str(source))
        if isinstance(source, str):
            return cls._of_text(source, name=name)
        if isinstance(source, bytes | bytearray | memoryview):
            return cls(source=bytes(source), name=name or "image bytes")
        return cls(source=source, name=name or str(getattr(source, "filename", "")) or "image")

    @classmethod
    def _of_text(cls, text: str, *, name: str | None) -> Self:
        scheme, separator, rest = text.partition(":")
        if scheme == "data" and separator:
            header, _, payload = rest.partition(",")
            if not header.endswith(";base64"):
                raise PromptError(f"image data URL must be base64, found header {header[:60]!r}")
            try:
                data = base64.b64decode(payload, validate=True)
            except (binascii.Error, ValueError) as error:
                raise PromptError(f"image data URL is not valid base64: {error}") from error
            return cls(source=data, name=name or "image data URL")
        if rest.startswith("//") and scheme in {"http", "https"}:
            raise PromptError(f"image URL {text[:80]!r} is remote; pass a file, bytes or data URL")
        path = rest.removeprefix("//") if scheme == "file" and separator else text
        return cls(source=Path(path), name=name or path)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who said what, looking at which images."""

    role: Role
    text: str
    images: tuple[ImageRef, ...] = ()
    scored: bool = True
    """Whether training scores it, where it is the assistant's (OpenAI's `weight`)."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"message role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.text, str):
            raise PromptError(f"message text must be a string, got {type(self.text).__name__}")
        _check_text(self.text, what="message text")
        if self.images and self.role != "user":
            raise PromptError(f"only user messages may hold images, got one from {self.role!r}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, an optional system message first, then user and assistant in turn."""

    messages: tuple[Message, ...]
    context: str | None = None
    """Text known in addition to the conversation, such as what experts report about the image."""

    def __post_init__(self) -> None:
        if not self.turns:
            raise PromptError("conversation has no user message")
        _check_text(self.context or "", what="context")
        for index, message in enumerate(self.turns):
            expected = "user" if index % 2 == 0 else "assistant"
            if message.role != expected:
                raise PromptError(
                    f"message {index + 1} after the system message must be from {expected!r}, "
                    f"got {message.role!r}"
                )
            if message.role == "user" and not message.text.strip():
                raise PromptError(f"user message {index // 2 + 1} is empty")

    @property
    def system(self) -> str | None:
        """Text of the leading system message, where there is one."""
        first = self.messages[0] if self.messages else None
        return first.text if first is not None and first.role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """User and assistant messages, without the system message."""
        return self.messages[1:] if self.system is not None else self.messages

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Every image of every message, in order."""
        return tuple(image for message in self.messages for image in message.images)

    @property
    def awaits_answer(self) -> bool:
        """Whether the last word is the user's."""
        return self.messages[-1].role == "user"

    @classmethod
    def ask(
        cls,
        question: str,
        *,
        images: Iterable[Any] = (),
        context: str | None = None,
        answer: str | None = None,
    ) -> Self:
        """One question, and its answer where it is known."""
        refs = tuple(ImageRef.of(image) for image in images)
        asked = (Message(role="user", text=question, images=refs),)
        answered = () if answer is None else (Message(role="assistant", text=answer),)
        return cls(messages=asked + answered, context=context)

    def user(self, text: str, *, images: Iterable[Any] = ()) -> Self:
        """The conversation with one more question."""
        refs = tuple(ImageRef.of(image) for image in images)
        message = Message(role="user", text=text, images=refs)
        return replace(self, messages=(*self.messages, message))

    def assistant(self, text: str) -> Self:
        """The conversation with one more answer."""
        return replace(self, messages=(*self.messages, Message(role="assistant", text=text)))

    def with_context(self, context: str | None) -> Self:
        """The same messages with another context."""
        return replace(self, context=context)

    def with_images(self, images: Iterable[Any]) -> Self:
        """The conversation with images shown with its first question."""
        refs = tuple(ImageRef.of(image) for image in images)
        first = self.turns[0]
        shown = replace(first, images=first.images + refs)
        return replace(self, messages=tuple(shown if m is first else m for m in self.messages))

    def map_images(self, change: Callable[[ImageRef], ImageRef]) -> Self:
        """The conversation with every image replaced by what a function makes of it."""
        messages = tuple(
            replace(message, images=tuple(map(change, message.images))) for message in self.messages
        )
        return replace(self, messages=messages)

    def with_sources(self, images: Iterable[Any]) -> Self:
        """The conversation with images in the places that were left open for them."""
        sources = iter(images)
        return self.map_images(
            lambda ref: ImageRef.of(next(sources)) if ref.source is None else ref
        )

    @classmethod
    def from_messages(
        cls, messages: Sequence[Mapping[str, Any]], *, context: str | None = None
    ) -> Self:
        """Read the message format of Hugging Face and OpenAI.

        A content is a string or a list of parts: `{"type": "text", "text": ...}`,
        `{"type": "image", "image" | "url" | "path" | "base64": ...}` or
        `{"type": "image_url", "image_url": {"url": ...}}`.
        """
        return cls(messages=tuple(_read_message(m) for m in messages), context=context)


def _check_text(text: str, *, what: str) -> None:
    """PromptError for lone surrogates: no tokenizer takes them, and no file in UTF-8 holds them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not valid Unicode: character {error.start + 1} is the lone surrogate "
            f"{text[error.start]!r}, as bytes that are not UTF-8 become"
        ) from error


def _read_message(message: Mapping[str, Any]) -> Message:
    role = _ROLE_NAMES.get(message.get("role", ""))
    if role is None:
        raise PromptError(
            f"message role must be one of {', '.join(_ROLE_NAMES)}, got {message.get('role')!r}"
        )
    content = message.get("content")
    scored = message.get("weight") != 0
    if isinstance(content, str):
        return Message(role=role, text=content, scored=scored)
    if not isinstance(content, Sequence):
        raise PromptError(
            f"message content must be a string or a list of parts, got {type(content).__name__}"
        )
    texts: list[str] = []
    images: list[ImageRef] = []
    for part in content:
        match part:
            case str():
                texts.append(part)
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                images.append(ImageRef.of(url))
            case {"type": "image"}:
                images.append(_read_image_part(part))
            case {"type": "video", "video": (str() | Path()) as path}:
                # a video is an image of several frames; its reader tells by its name
                images.append(ImageRef.of(path))
            case _:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise PromptError(
                    f"message part must be of type text, image, image_url or video, got {kind!r}"
                )
    return Message(role=role, text="\n".join(texts), images=tuple(images), scored=scored)


def _read_image_part(part: Mapping[str, Any]) -> ImageRef:
    for key in ("image", "url", "path"):
        if part.get(key) is not None:
            return ImageRef.of(part[key])
    if part.get("base64") is not None:
        return ImageRef.of(f"data:image;base64,{part['base64']}")
    return ImageRef(source=None)
