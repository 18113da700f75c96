"""Answers of an adapted model: `answer` has them whole, in a stream, or how likely they are."""

from llama_adapter.generation.settings import GenerationSettings

__all__ = ["GenerationSettings"]
