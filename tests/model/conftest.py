"""Tiny real models with adapters; every test builds its own, for adapters change modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration

VOCABULARY = 97


def make_base(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A real four-layer Llama with grouped queries."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def make_vision_encoder(kind: str = "siglip", seed: int = 1) -> Any:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if kind == "clip":
        config = CLIPVisionConfig(**settings, projection_dim=24)
        return CLIPVisionModelWithProjection(config).eval()
    return SiglipVisionModel(SiglipVisionConfig(**settings)).eval()


def stir_adapter(model: Any, seed: int = 3, size: float = 0.2) -> None:
    """Random values in every trainable, so that nothing is zero by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.fixture
def base() -> Callable[..., LlamaForCausalLM]:
    return make_base


@pytest.fixture
def tower() -> Callable[..., Any]:
    return make_vision_encoder


@pytest.fixture
def stir() -> Callable[..., None]:
    return stir_adapter


@pytest.fixture
def build() -> Callable[..., LlamaAdapterForConditionalGeneration]:
    def make(
        preset: str = "v2",
        *,
        language_model: Any = None,
        vision: str | None = "siglip",
        stirred: bool = True,
        **overrides: Any,
    ) -> LlamaAdapterForConditionalGeneration:
        if preset == "v2":
            overrides = {"visual_prompt_length": 6, **overrides}
        small = {"prompt_length": 5, "projector_width": 32, "projector_heads": 4}
        config = LlamaAdapterConfig.preset(preset, **{**small, **overrides})
        model = LlamaAdapterForConditionalGeneration.from_base(
            make_base() if language_model is None else language_model,
            make_vision_encoder(vision) if vision and config.adapter_config.is_multimodal else None,
            config,
            seed=0,
        )
        if stirred:
            stir_adapter(model)
        return model

    return make


@pytest.fixture
def ids() -> Tensor:
    """Three rows of seven tokens."""
    return torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pictures() -> Tensor:
    """One picture a row."""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(6))
