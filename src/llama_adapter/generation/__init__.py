"""Answers of an adapted model."""

from llama_adapter.generation.settings import GenerationSettings

__all__ = ["GenerationSettings"]
