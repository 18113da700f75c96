"""Talking with an adapted model: multi-turn sessions with images, experts and streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_adapter.chat.answers import ChatAnswer

if TYPE_CHECKING:
    from llama_adapter.chat.session import ChatSession

__all__ = ["ChatAnswer", "ChatSession"]


def __getattr__(name: str) -> Any:
    """`ChatSession` imports torch, which a session with a server does without."""
    if name == "ChatSession":
        from llama_adapter.chat.session import ChatSession

        return ChatSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
