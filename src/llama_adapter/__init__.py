"""Turn a frozen text LLM into a visual chat assistant (LLaMA-Adapter V1 and V2).

Importing this package is cheap: torch and transformers are imported with the first class that
needs them. After it, transformers' Auto classes and pipelines know our models.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from llama_adapter.conversation import Conversation, ImageRef, Message
from llama_adapter.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EvaluationError,
    ExpertError,
    ImageError,
    LlamaAdapterError,
    MissingDependencyError,
    PromptError,
    QueueFullError,
    ServingError,
    TrainingError,
    UnavailableError,
    UnsupportedModelError,
    VideoError,
)
from llama_adapter.registration import register

if TYPE_CHECKING:
    from llama_adapter.config import AdapterConfig
    from llama_adapter.model.configuration import LlamaAdapterConfig
    from llama_adapter.model.modeling import LlamaAdapterForConditionalGeneration
    from llama_adapter.processing.images import load_image
    from llama_adapter.processing.processor import LlamaAdapterProcessor

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "DataError",
    "EvaluationError",
    "ExpertError",
    "ImageError",
    "ImageRef",
    "LlamaAdapterConfig",
    "LlamaAdapterError",
    "LlamaAdapterForConditionalGeneration",
    "LlamaAdapterProcessor",
    "Message",
    "MissingDependencyError",
    "PromptError",
    "QueueFullError",
    "ServingError",
    "TrainingError",
    "UnavailableError",
    "UnsupportedModelError",
    "VideoError",
    "__version__",
    "load_image",
]

_HOMES = {
    "AdapterConfig": "llama_adapter.config",
    "LlamaAdapterConfig": "llama_adapter.model.configuration",
    "LlamaAdapterForConditionalGeneration": "llama_adapter.model.modeling",
    "LlamaAdapterProcessor": "llama_adapter.processing.processor",
    "load_image": "llama_adapter.processing.images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register(sys.modules[__name__])
