"""An adapter as a directory that vLLM serves with the plugin `llama-adapter-vllm`.

config.json                 the base's, with the plugin's architecture and what the plugin reads
model*.safetensors          the base with linears and norms merged
llama_adapter.safetensors   keys and gated values of static prompts, gates, visual projection,
                            and the merged LoRA that visual prompts bypass
vision/                     the vision encoder
processor/                  the adapter's processor
chat_template.jinja         the adapter's prompts
llama_adapter_export.json   sizes of all files, checksum of `llama_adapter.safetensors`
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_adapter.checkpoints import merging
from llama_adapter.checkpoints.directories import (
    EXPORT_MARKER,
    adapter_sources,
    mark_export,
    output_directory,
)
from llama_adapter.checkpoints.stock_template import stock_template
from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json_object
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.gated_attention import LateFusionPrompt, StaticPrompt
from llama_adapter.model.peft_base import PEFT_FOLDER
from llama_adapter.model.scaled_linear import ScaledLinear
from llama_adapter.processing.processor import LlamaAdapterProcessor

FORMAT_VERSION = 1
"""Version of the directory's format, which the plugin checks."""
FAMILIES = ("llama", "mistral")
"""Bases whose model in vLLM the plugin extends."""
TENSORS = "llama_adapter.safetensors"

_ARCHITECTURES = {
    "text": "LlamaAdapterTextForCausalLM",
    "placeholders": "LlamaAdapterPlaceholdersForConditionalGeneration",
    "cross_attention": "LlamaAdapterCrossAttentionForConditionalGeneration",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmReport:
    """What an export did."""

    out: Path
    merged: int
    """Linears and norms merged into the base."""
    mode: str
    """How images are read: `text` (none are), `placeholders` or `cross_attention`."""
    stop: tuple[str, ...]
    """Stop strings that every request must name, since no single token ends an answer."""


def export_vllm(directory: Path, *, out: Path, overwrite: bool = False) -> VllmReport:
    """Write a directory for vLLM that equals the adapted model; whole or not at all.

    Raises CheckpointError naming what of the adapter the plugin does not compute.
    """
    content = LlamaAdapterConfig.from_pretrained(str(directory))
    mode = _mode(directory, content)
    sources = adapter_sources(directory, content.base, content.vision)
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    template = stock_template(processor)
    with output_directory(out, overwrite=overwrite, sources=sources) as stage:
        model = LlamaAdapterForConditionalGeneration.from_pretrained(str(directory))
        family = model.language_model.config.model_type
        if family not in FAMILIES:
            raise CheckpointError(
                f"{directory} has a base of family {family!r}; the vLLM plugin extends "
                f"{' and '.join(FAMILIES)}"
            )
        tensors = _tensors(model)
        merged, unplaceable = merging.merge_into_base(model, keep_bypassed=False)
        if unplaceable:
            raise CheckpointError(
                f"{directory}: a {family} configuration has no flag for {len(unplaceable)} learned "
                f"biases, first {next(iter(unplaceable))}"
            )
        model.language_model.save_pretrained(stage)
        save_file(tensors, stage / TENSORS, metadata={"format": "pt"})
        _index(stage, tensors)
        if mode != "text":
            assert model.vision is not None
            model.vision.save_pretrained(stage / "vision")
        processor.save_pretrained(stage / "processor")
        processor.tokenizer.save_pretrained(stage)
        (stage / "chat_template.jinja").write_text(template)
        _describe(stage, content=content, mode=mode, processor=processor)
        mark_export(stage, kind="vllm")
        _seal(stage)
    return VllmReport(out=out, merged=merged, mode=mode, stop=tuple(processor.stop_strings))


def _mode(directory: Path, content: LlamaAdapterConfig) -> str:
    """How the plugin computes the adapter; CheckpointError where it does not."""
    config = content.adapter_config
    refusal = None
    if (directory / PEFT_FOLDER).is_dir():
        refusal = f"its base has the peft adapter in {directory / PEFT_FOLDER} on it"
    elif not config.is_multimodal:
        return "text"
    elif config.visual_scope == "placeholders" and config.placeholder_attention != "own":
        refusal = "its placeholders attend to all visual prompts (own ones are served)"
    elif config.frame_rule == "concat":
        refusal = "frame_rule 'concat' makes a different number of visual prompts for each image"
    if refusal is not None:
        raise CheckpointError(f"{directory} cannot be served by the vLLM plugin: {refusal}")
    return "placeholders" if config.placeholder_attention == "own" else "cross_attention"


@torch.no_grad()
def _tensors(model: LlamaAdapterForConditionalGeneration) -> dict[str, Tensor]:
    """What is not merged, by the plugin's names."""
    dtype = model.dtype
    tensors: dict[str, Tensor] = {}
    for attention, prompt in model.adapter.prompts():
        prefix = f"model.layers.{prompt.layer_index}.self_attn"
        if isinstance(prompt, StaticPrompt):
            keys, values = prompt.keys_values(attention, prompt.prompt.unsqueeze(0).to(dtype))
            tensors[f"{prefix}.prompt_keys"] = keys[0].contiguous()
            tensors[f"{prefix}.prompt_values"] = values[0].contiguous()
        if isinstance(prompt, LateFusionPrompt):
            tensors[f"{prefix}.prompt"] = prompt.prompt.detach().clone()
        if prompt.reads_images:
            tensors[f"{prefix}.visual_gate"] = prompt.gate_values_H().float()
            linears = prompt.project.linears(attention)
            for name, linear in zip(("key", "value"), linears, strict=True):
                if not isinstance(linear, ScaledLinear):
                    continue
                up, down = linear.lora_up, linear.lora_down
                if up is not None and down is not None:
                    heads = model.language_model.config.num_key_value_heads
                    tensors[f"{prefix}.{name}_lora_up"] = up.unflatten(0, (heads, -1))
                    tensors[f"{prefix}.{name}_lora_down"] = down
    if model.visual is not None:
        for name, tensor in model.visual.state_dict().items():
            tensors[f"visual.{name}"] = tensor.contiguous()
    return tensors


def _index(stage: Path, tensors: dict[str, Tensor]) -> None:
    """Name our file in the index of a base in several files, which lists what is read."""
    path = stage / "model.safetensors.index.json"
    if path.exists():
        index = read_json_object(path, error=CheckpointError)
        index["weight_map"] |= dict.fromkeys(tensors, TENSORS)
        path.write_text(json.dumps(index, indent=2) + "\n")


def _describe(
    stage: Path, *, content: LlamaAdapterConfig, mode: str, processor: LlamaAdapterProcessor
) -> None:
    """The plugin's part of `config.json`, and what ends an answer."""
    path = stage / "config.json"
    config = read_json_object(path, error=CheckpointError)
    placeholder = processor.placeholder_text if mode == "placeholders" else None
    ids = processor.tokenizer(placeholder or "", add_special_tokens=False)["input_ids"]
    config |= {
        "architectures": [_ARCHITECTURES[mode]],
        "llama_adapter": {
            "format_version": FORMAT_VERSION,
            "adapter": content.adapter_config.to_dict(),
            "mode": mode,
            "placeholder_text": placeholder,
            "placeholder_ids": ids if placeholder else [],
        },
    }
    if mode == "cross_attention":
        config["is_encoder_decoder"] = True  # how vLLM knows cross-attention
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = stage / "generation_config.json"
    known = read_json_object(path, error=CheckpointError) if path.exists() else {}
    end: Any = processor.stop_options.get("eos_token_id")
    path.write_text(json.dumps({**known, "eos_token_id": end}, indent=2) + "\n")


def _seal(stage: Path) -> None:
    """Sizes and checksums, for the plugin to find a truncated export before it loads one."""
    path = stage / EXPORT_MARKER
    marker = read_json_object(path, error=CheckpointError)
    files = sorted(p for p in stage.rglob("*") if p.is_file() and p != path)
    with (stage / TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    marker |= {
        "format_version": FORMAT_VERSION,
        "sizes": {p.relative_to(stage).as_posix(): p.stat().st_size for p in files},
        "sha256": {TENSORS: digest},
    }
    path.write_text(json.dumps(marker, indent=1) + "\n")
