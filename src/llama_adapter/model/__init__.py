"""The adapted model. It takes tensors, never text or images as files."""

from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.groups import Group
from llama_adapter.model.loss import answer_loss, answer_mask
from llama_adapter.model.modeling import LlamaAdapterForConditionalGeneration
from llama_adapter.model.routing import VisualPrompts

__all__ = [
    "Group",
    "LlamaAdapterConfig",
    "LlamaAdapterForConditionalGeneration",
    "VisualPrompts",
    "answer_loss",
    "answer_mask",
]
