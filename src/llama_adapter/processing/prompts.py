"""What users may pass as prompts and images, brought into one form each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import PromptError
from llama_adapter.processing.images import load_image
from llama_adapter.processing.pieces import Rendered
from llama_adapter.processing.video import is_video, load_video

Prompt = Conversation | Rendered | str | Sequence[Mapping[str, Any]]
"""A conversation, a prompt of `apply_chat_template`, a question, or Hugging Face messages."""


class Informant(Protocol):
    """Adds what experts say of a conversation's images; `llama_adapter.experts.ExpertPool`."""

    def inform(
        self, conversation: Conversation
    ) -> tuple[Conversation, tuple[Any, ...], tuple[Any, ...]]:
        """The conversation with their texts in its context, and the reports behind these."""
        ...


def as_conversation(prompt: Any) -> Conversation:
    """The conversation that a question, messages or a conversation mean."""
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        return Conversation.ask(prompt)
    return Conversation.from_messages(prompt)


def as_prompts(text: Any) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(text, Conversation | str):
        return [text]
    if not text:
        raise PromptError("a prompt is needed, got an empty list")
    return [text] if isinstance(text[0], Mapping) else list(text)


def images_per_prompt(images: Any, count: int) -> list[tuple[ImageRef, ...]]:
    """Images given with `count` prompts, as references for each."""
    if images is None:
        return [()] * count
    if not isinstance(images, list | tuple):
        images = [images]
    if not any(isinstance(entry, list | tuple) for entry in images) and count == 1:
        images = [images]
    if len(images) != count:
        raise PromptError(f"got {len(images)} images for {count} prompts")
    return [_refs(entry) for entry in images]


def _refs(entry: Any) -> tuple[ImageRef, ...]:
    if entry is None:
        return ()
    entries: Iterable[Any] = entry if isinstance(entry, list | tuple) else (entry,)
    return tuple(ImageRef.of(image) for image in entries)


def hand_out(conversations: Sequence[Conversation], images: Any) -> list[Conversation]:
    """The conversations with images handed in apart, each in its place."""
    given = images_per_prompt(images, len(conversations))
    return [fill_in(c, refs) for c, refs in zip(conversations, given, strict=True)]


def fill_in(conversation: Conversation, given: tuple[ImageRef, ...]) -> Conversation:
    """The conversation with images handed in apart in their places."""
    wanted = sum(ref.source is None for ref in conversation.images)
    if given and not conversation.images:
        return conversation.with_images(given)
    if wanted != len(given):
        raise PromptError(f"messages leave {wanted} images to be handed in, got {len(given)}")
    return conversation.with_sources(given) if given else conversation


def frames_of(ref: ImageRef) -> list[Image.Image]:
    """The image, or the frames of a video, as RGB."""
    if isinstance(ref.source, tuple):
        return [load_image(f, name=f"{ref.name}, frame {i}") for i, f in enumerate(ref.source)]
    if is_video(ref.source):
        video = load_video(ref.source, name=ref.name)
        if video.note:
            warnings.warn(f"{video.name}: {video.note}", stacklevel=2)
        return list(video.frames)
    return [load_image(ref)]
