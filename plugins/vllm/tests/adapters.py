"""Adapter directories of every kind that the plugin serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.config import AdapterConfig
from llama_adapter.miniature.bundled import DECODER, VISION, bundled_adapter, toy_processor
from llama_adapter.model.references import resolve_reference
from llama_adapter.processing.processor import LlamaAdapterProcessor
from PIL import Image, ImageDraw
from tests.checkpoints.conftest import World
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast


def scene(number: int, *, side: int = 64) -> Image.Image:
    """A shape that differs from number to number."""
    image = Image.new("RGB", (side, side), "white")
    x, y, size = side // 10 + 28 * (number % 2), side // 10 + 28 * (number // 2 % 2), side // 3
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if number % 3 else draw.rectangle
    shape((x, y, x + size, y + size), fill=("red", "green", "blue")[number % 3])
    return image


def randomized(out: Path, values: dict[str, Any]) -> Path:
    """An adapter on the toy base whose every weight matters; nothing was trained."""
    config = AdapterConfig.from_dict(values)
    model = LlamaAdapterForConditionalGeneration.from_base(
        resolve_reference(DECODER),
        resolve_reference(VISION) if config.is_multimodal else None,
        LlamaAdapterConfig(adapter=config),
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.adapter.named_parameters():
            strength = 1.0 if name.endswith("gate") else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)
    model.save_pretrained(out)
    toy_processor(config).save_pretrained(out)
    return out


def randomized_v1(out: Path) -> Path:
    return randomized(out, LlamaAdapterConfig.preset("v1").adapter_config.to_dict())


def lora_alone(out: Path) -> Path:
    values = LlamaAdapterConfig.preset("v1", prompt_length=0).adapter_config.to_dict()
    return randomized(out, {**values, "lora_rank": 4})


def own_placeholders_with_lora(out: Path) -> Path:
    """The settings of the shipped v2, with LoRA that its prompts bypass."""
    shipped = LlamaAdapterConfig.from_pretrained(str(bundled_adapter("v2")))
    return randomized(out, {**shipped.adapter_config.to_dict(), "lora_rank": 4})


def merged_chat(out: Path) -> Path:
    settings = LlamaAdapterConfig.preset("v2-chat", prompt_length=0)
    return randomized(out, settings.adapter_config.to_dict())


def all_tokens(out: Path) -> Path:
    """The settings of the shipped v2, but every token attends to the image."""
    shipped = LlamaAdapterConfig.from_pretrained(str(bundled_adapter("v2")))
    values = shipped.adapter_config.to_dict()
    return randomized(out, {**values, "visual_scope": "all", "placeholder_attention": "all"})


def released(kind: str, out: Path) -> Path:
    """A file in the authors' format, imported, with a tokenizer of a few letters.

    Values are random; heads are 32 wide, the narrowest that vLLM computes on a CPU.
    """
    world = World(root=out.parent, dim=128, heads=4, kv_heads=4, layers=4, prompt_layers=3)
    import_released(
        world.save_released(kind),
        base=world.base(),
        vision=world.save_clip() if "multimodal" in kind else None,
        out=out,
        overrides=Overrides(prompt_length=world.prompt_length, projector_heads=4),
    )
    model = LlamaAdapterForConditionalGeneration.from_pretrained(out)
    images = None
    if model.vision is not None:
        side = model.vision.config.image_size
        crop = {"height": side, "width": side}
        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
    LlamaAdapterProcessor(
        images,
        _words(model.language_model.config.vocab_size),
        template="alpaca",
        channel_order=model.adapter_config.channel_order,
    ).save_pretrained(out)
    return out


def _words(size: int) -> PreTrainedTokenizerFast:
    """One token for each letter, and for each remaining id a word."""
    letters = [chr(code) for code in range(33, 33 + size - 4)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", " ", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
