"""The adapted model. Sees tensors, never text or pictures as files."""

from llama_adapter.model.adapted import (
    LlamaAdapterForConditionalGeneration,
    answer_loss,
    scored_positions,
)
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.gated_attention import VisualPrompts
from llama_adapter.model.groups import Group

__all__ = [
    "Group",
    "LlamaAdapterConfig",
    "LlamaAdapterForConditionalGeneration",
    "VisualPrompts",
    "answer_loss",
    "scored_positions",
]
