"""What the package carries: two frozen bases, and adapters trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from llama_adapter.config import AdapterConfig
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.references import (
    load_language_model,
    resolve_reference,
)
from llama_adapter.pretrained import load_pretrained
from llama_adapter.processing.image_processors import load_image_processor
from llama_adapter.processing.processor import LlamaAdapterProcessor

DECODER = "package:llama_adapter/miniature/bases/decoder"
VISION = "package:llama_adapter/miniature/bases/vision"
ADAPTERS = "package:llama_adapter/miniature/adapters"
RECIPES = Path(__file__).parent / "recipes"
"""How the adapters are trained; `recipes/` of the repository links to them."""
PLACEHOLDERS = tuple(f"<|slot_{i}|>" for i in range(16))
PLACEHOLDER_TEXT = "".join(PLACEHOLDERS)
"""What is where an image is read, in scope `placeholders`: the tokenizer's reserved tokens."""


def load_decoder() -> PreTrainedModel:
    """The frozen toy decoder, in float32."""
    return load_language_model(DECODER, dtype=torch.float32)


def toy_processor(config: AdapterConfig) -> LlamaAdapterProcessor:
    """The processor of a toy adapter: the toy template, and placeholders if the config has them."""
    return LlamaAdapterProcessor(
        load_image_processor(resolve_reference(VISION)),
        load_pretrained(AutoTokenizer, resolve_reference(DECODER), what="tokenizer"),
        template="toy",
        visual_scope=config.visual_scope,
        placeholder_text=PLACEHOLDER_TEXT if config.visual_scope == "placeholders" else None,
    )


def bundled_adapter(name: str) -> Path:
    """Directory of a shipped adapter: `v2` or `caption`."""
    return Path(resolve_reference(f"{ADAPTERS}/{name}"))


def load_bundled(
    name: str = "v2", **loaded: Any
) -> tuple[LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor]:
    """A shipped adapter on its bases, with its processor, ready to answer."""
    directory = bundled_adapter(name)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(directory, **loaded)
    return model, LlamaAdapterProcessor.from_pretrained(directory)
