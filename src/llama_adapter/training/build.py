"""From a recipe to what trains: the frozen models with a fresh adapter, and the processor."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.model import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import read_adapter_config
from llama_adapter.model.peft_base import on_base
from llama_adapter.model.persistence import LORA_FOLDER
from llama_adapter.model.references import base_below, load_language_model, load_vision, locate
from llama_adapter.pretrained import explain, load_pretrained, seeded
from llama_adapter.processing.image_processors import load_image_processor
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.device import autocast_dtype
from llama_adapter.training.distributed import decoder_layers
from llama_adapter.training.lora import Lora, add_lora, continue_lora
from llama_adapter.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that is ready to train."""

    model: LlamaAdapterForConditionalGeneration
    lora: Lora | None
    """Set where the recipe, or the adapter it starts from, puts LoRA into the base."""


def load_processor(recipe: Recipe) -> LlamaAdapterProcessor:
    """The processor of a recipe's adapter; CheckpointError where a part of it is not there."""
    start = recipe.adapter.start
    if start is not None:
        if not start.is_dir():
            raise CheckpointError(f"adapter.start: {start} is not an adapter directory")
        return LlamaAdapterProcessor.from_pretrained(start)
    config = recipe.adapter.adapter_config()
    base = locate(recipe.base.model, what="base")
    if not (Path(base) / "tokenizer_config.json").is_file():
        base = base_below(base)
    tokenizer = load_pretrained(AutoTokenizer, base, what="tokenizer of")
    is_multimodal = recipe.vision is not None and config.is_multimodal
    if is_multimodal and config.placeholder_attention == "own":
        _check_placeholders(recipe, tokenizer, config.visual_prompt_length)
    return LlamaAdapterProcessor(
        load_image_processor(locate(recipe.vision.model, what="vision encoder"))
        if is_multimodal and recipe.vision is not None
        else None,
        tokenizer,
        template=recipe.prompt.template,
        visual_scope=config.visual_scope if is_multimodal else "all",
        placeholder_text=recipe.prompt.placeholder_text if is_multimodal else None,
        channel_order=config.channel_order,
    )


def _check_placeholders(recipe: Recipe, tokenizer: Any, length: int) -> None:
    text = recipe.prompt.placeholder_text or ""
    found = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if found != length:
        raise ConfigError(
            f"prompt.placeholder_text is {found} tokens, but with adapter.placeholder_attention "
            f"'own' there must be one for each of the {length} visual prompts"
        )


META = torch.device("meta")
"""Models are built there without their weights, for what their shapes alone tell."""


def build(recipe: Recipe, *, device: torch.device, on_device: bool = True) -> Built:
    """The model of a recipe, in training mode.

    With `on_device` false an unquantized base stays on the CPU, from where sharding takes it. On
    the device `META` nothing is read but configs.
    Raises ConfigError for settings that the base cannot carry, such as more layers than it has.
    """
    base = _language_model(recipe, device=device, on_device=on_device)
    vision = None if recipe.vision is None else _vision(recipe, device)
    lora = _lora(recipe, base)
    start = recipe.adapter.start
    if start is not None and device != META:
        model = LlamaAdapterForConditionalGeneration.from_pretrained(
            start, language_model=base, vision=vision
        )
    else:
        model = LlamaAdapterForConditionalGeneration.from_base(
            base, vision, LlamaAdapterConfig(adapter=_adapter_config(recipe)), seed=recipe.seed
        )
    if lora is not None:
        for factor in lora.named_parameters().values():
            factor.requires_grad_(True)  # frozen with the base just now; replicas must sync it
    if on_device and recipe.base.quantization == "none":
        model.to(device)
    model.train()
    if recipe.compute.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.compute.compile:
        # layer by layer: they are alike, so one is compiled and the others reuse it
        for layer in decoder_layers(model):
            layer.compile()
    return Built(model=model, lora=lora)


def _adapter_config(recipe: Recipe) -> AdapterConfig:
    start = recipe.adapter.start
    if start is None:
        return recipe.adapter.adapter_config()
    config = LlamaAdapterConfig.from_dict(read_adapter_config(start))
    assert isinstance(config, LlamaAdapterConfig)
    return config.adapter_config


def _lora(recipe: Recipe, base: PreTrainedModel) -> Lora | None:
    start = recipe.adapter.start
    if on_base(base) is not None:
        if recipe.lora is not None:
            raise ConfigError(
                f"lora: base.model {recipe.base.model!r} is a peft adapter, and a second one "
                "cannot be put onto its base; merge the first with merge_and_unload and save that"
            )
        return None
    if start is not None and (start / LORA_FOLDER).is_dir():
        # the adapter was trained together with these factors
        return continue_lora(base, start, section=recipe.lora, seed=recipe.seed)
    return None if recipe.lora is None else add_lora(base, recipe.lora, seed=recipe.seed)


def _language_model(recipe: Recipe, *, device: torch.device, on_device: bool) -> PreTrainedModel:
    section = recipe.base
    attention = section.attention
    if attention is None and device.type == "cpu" and autocast_dtype(recipe.compute, device):
        # the CPU's fused attention is several times slower in half types, backwards
        attention = "eager"
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if section.random_weights or device == META:
        return _random_decoder(recipe, device if on_device else torch.device("cpu"), attention)
    quantization: dict[str, Any] = {}
    if section.quantization != "none":
        quantization = {
            "quantization_config": _quantization(recipe, device),
            "device_map": {"": device},
        }
    return load_language_model(
        section.model, dtype=dtype, attn_implementation=attention, **quantization
    )


def _quantization(recipe: Recipe, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if recipe.base.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=autocast_dtype(recipe.compute, device) or torch.float32,
    )


def _random_decoder(recipe: Recipe, device: torch.device, attention: str | None) -> PreTrainedModel:
    """Random weights in the shape of the base, for measuring speed; its adapters name no base."""
    config = read_config(recipe.base.model, "base")
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if recipe.base.dtype != "auto":
        options["dtype"] = getattr(torch, recipe.base.dtype)
    with seeded(recipe.seed, device), device:
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except (ImportError, ValueError) as error:  # such as an attention that is not installed
            raise CheckpointError(
                f"cannot build the base {recipe.base.model!r}: {explain(error)}"
            ) from error
    model.config._name_or_path = ""
    return model.eval()


def _vision(recipe: Recipe, device: torch.device) -> nn.Module:
    assert recipe.vision is not None
    if not recipe.vision.random_weights and device != META:
        return load_vision(recipe.vision.model, device=device)
    config = read_config(recipe.vision.model, "vision encoder")
    with seeded(recipe.seed, device), META if device == META else nullcontext():
        model = AutoModel.from_config(config)
    model.config._name_or_path = ""
    return model.to(device)


def read_config(name: str, what: str) -> Any:
    """The config of a base or vision encoder; CheckpointError if it cannot be read."""
    path = base_below(locate(name, what=what))
    return load_pretrained(AutoConfig, path, what=f"config of the {what}")
