"""Talking with an adapted model: one-shot answers, multi-turn sessions, streaming."""

from llama_adapter.generation.chat import Answer, ChatSession, GenerationSettings

__all__ = ["Answer", "ChatSession", "GenerationSettings"]
