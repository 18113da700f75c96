"""Replaces the 180 MB: a tiny llama with a chat template, a tiny DINOv2, an adapter on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

PLACEHOLDERS = "ÀÁÂÃ"


@pytest.fixture(scope="session")
def tiny_photos(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Any) -> Path:
    """A folder with `home` as `get photos` leaves it, and `adapter`."""
    from transformers import (
        BitImageProcessorPil,
        Dinov2Config,
        Dinov2Model,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
    from llama_adapter.config import AdapterConfig
    from llama_adapter.photos.get import RECORD
    from llama_adapter.processing.processor import LlamaAdapterProcessor

    folder = tmp_path_factory.mktemp("photos")
    base, vision = (folder / "home" / "photos" / name for name in ("base", "vision"))
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(bytes_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    ).half().save_pretrained(base)
    bytes_tokenizer.save_pretrained(base)
    Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
    ).save_pretrained(vision)
    images = BitImageProcessorPil(
        size={"height": 28, "width": 28}, do_center_crop=False, do_convert_rgb=True
    )
    images.save_pretrained(vision)
    for model in (base, vision):
        (model / RECORD).write_text("{}\n")
    config = AdapterConfig(
        prompt_length=2,
        prompt_layers=1,
        visual_layers=1,
        visual_scope="placeholders",
        placeholder_attention="own",
        visual_prompt_length=len(PLACEHOLDERS.encode()),
        projector="query_transformer",
        projector_width=16,
        projector_blocks=1,
        projector_heads=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ADAPTER_HOME", str(folder / "home"))
        model = LlamaAdapterForConditionalGeneration.from_base(
            str(base), str(vision), LlamaAdapterConfig(adapter=config), dtype=torch.float32
        )
        model.save_pretrained(folder / "adapter")
        LlamaAdapterProcessor(
            images,
            bytes_tokenizer,
            template="chat",
            visual_scope="placeholders",
            placeholder_text=PLACEHOLDERS,
        ).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def photos_model(tiny_photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model is MODEL `photos`; its adapter's directory."""
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", str(tiny_photos / "home"))
    monkeypatch.setattr("llama_adapter.photos.bundled.ADAPTER", tiny_photos / "adapter")
    return tiny_photos / "adapter"
