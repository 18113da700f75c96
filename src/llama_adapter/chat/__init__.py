"""Talking with an adapted model: multi-turn sessions with images, experts and streaming."""

from llama_adapter.chat.session import ChatAnswer, ChatSession

__all__ = ["ChatAnswer", "ChatSession"]
