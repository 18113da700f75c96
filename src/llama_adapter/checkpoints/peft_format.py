"""What peft has, too: static prompts as its `AdaptionPrompt`, LoRA as its LoRA.

peft has one gate per layer where an adapter has one per head, and no tanh around it. A gate that is
the same in all heads is written as the number it amounts to; one read from peft is given to every
head, which then learn apart.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llama_adapter.checkpoints.directories import adapter_sources, mark_export, output_directory
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, import_extra
from llama_adapter.files import read_json_object
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.gated_attention import StaticPrompt
from llama_adapter.model.peft_base import CONFIG, FILE_PREFIX, PEFT_FOLDER, WEIGHTS
from llama_adapter.model.references import load_language_model, resolve_reference
from llama_adapter.model.scaled_linear import ScaledLinear
from llama_adapter.model.tensor_files import read_tensors

PROMPTS = "ADAPTION_PROMPT"
FAMILIES = ("llama", "mistral")
"""Bases on which peft computes `AdaptionPrompt` as we compute static prompts; not GPT-2."""
_NAME = re.compile(r"base_model\.model\.(?:.*\.)?layers\.(\d+)\.self_attn\.adaption_(prompt|gate)")


def export_peft(directory: Path, *, out: Path, overwrite: bool = False) -> str:
    """Write a directory of `PeftModel.from_pretrained`, whole or not at all; returns peft's type.

    Raises CheckpointError naming what of the adapter peft has no counterpart for.
    """
    peft = import_extra("peft", extra="train", purpose="--format peft")
    content = LlamaAdapterConfig.from_pretrained(str(directory))
    config = content.adapter_config
    _refuse_others(directory, config)
    with output_directory(
        out, overwrite=overwrite, sources=adapter_sources(directory, content.base)
    ) as stage:
        model = LlamaAdapterForConditionalGeneration.from_pretrained(str(directory))
        base, rank = model.language_model, config.lora_rank
        values = _lora(model) if rank else _prompts(directory, model)
        options: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": resolve_reference(
                content.base["name_or_path"], directory=directory
            ),
            "inference_mode": True,
        }
        if rank:  # peft multiplies the factors by alpha / rank
            targets = sorted({name.split(".")[-3] for name in values})
            theirs = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options)
        else:
            layers = len(config.prompt_layer_indices(base.config.num_hidden_layers))
            theirs = peft.AdaptionPromptConfig(
                adapter_len=config.prompt_length,
                adapter_layers=layers,
                target_modules="self_attn",
                **options,
            )
        theirs.save_pretrained(stage)
        held = {f"{FILE_PREFIX}{name}": tensor.contiguous() for name, tensor in values.items()}
        save_file(held, stage / WEIGHTS, metadata={"format": "pt"})
        mark_export(stage, kind="peft")
    return str(theirs.peft_type.value)


def _refuse_others(directory: Path, config: AdapterConfig) -> None:
    has_prompts = config.prompt_length > 0 and config.prompt_layers != 0
    for reason, is_there in (
        (f"the peft adapter in {PEFT_FOLDER} under it", (directory / PEFT_FOLDER).is_dir()),
        ("visual prompts", config.is_multimodal),
        ("biases", config.bias_targets != "none"),
        ("scales", config.scale_targets != "none"),
        ("norms", config.train_norms),
        ("LoRA that its prompts bypass", bool(has_prompts and config.lora_rank)),
    ):
        if is_there:
            raise CheckpointError(
                f"{directory} has {reason}, which no adapter of peft holds; what merges can be "
                "exported with --format merged --partial"
            )


def _prompts(
    directory: Path, model: LlamaAdapterForConditionalGeneration
) -> dict[str, torch.Tensor]:
    """Prompts and one gate per layer, by peft's names inside the base."""
    family = model.language_model.config.model_type
    if family not in FAMILIES:
        raise CheckpointError(
            f"{directory} has a base of family {family!r}; peft computes static prompts as we do "
            f"on {' and '.join(FAMILIES)} only"
        )
    values: dict[str, torch.Tensor] = {}
    for attention, prompt in model.adapter.prompts():
        assert isinstance(prompt, StaticPrompt)
        where = f"model.layers.{prompt.layer_index}.self_attn"
        gates_H = prompt.gate_values_H().detach()
        if gates_H.max() - gates_H.min() > 1e-6:
            raise CheckpointError(
                f"{directory}: layer {prompt.layer_index} has gates from {gates_H.min():.4g} to "
                f"{gates_H.max():.4g}, peft has one for all heads of a layer"
            )
        _refuse_output_bias(attention, where)
        values[f"{where}.adaption_prompt"] = prompt.prompt.detach().unsqueeze(0)
        values[f"{where}.adaption_gate"] = gates_H[:1].clone()
    return values


def _refuse_output_bias(attention: Any, name: str) -> None:
    if getattr(attention.o_proj, "bias", None) is not None:
        raise CheckpointError(f"the base's {name}.o_proj has a bias, which peft would add twice")


def _lora(model: LlamaAdapterForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The factors by peft's names inside the base."""
    names = {id(module): name for name, module in model.language_model.named_modules()}
    values = {}
    for target in model.adapter.targets:
        module = target.module
        if isinstance(module, ScaledLinear) and module.lora_down is not None:
            assert module.lora_up is not None
            name = names[id(module)]
            values[f"{name}.lora_A.weight"] = module.lora_down.detach()
            values[f"{name}.lora_B.weight"] = module.lora_up.detach()
    return values


def has_peft_prompts(directory: Path) -> bool:
    """Whether a directory holds an `AdaptionPrompt` of peft."""
    path = directory / CONFIG
    if not path.is_file():
        return False
    try:
        return bool(read_json_object(path, error=CheckpointError).get("peft_type") == PROMPTS)
    except CheckpointError:  # the reader of what it may be instead says so
        return False


def import_peft(directory: Path, *, base: Path, out: Path, overwrite: bool = False) -> int:
    """Write peft's `AdaptionPrompt` as an adapter directory; returns the number of layers.

    Raises CheckpointError for other adapters of peft, and for files that are damaged.
    """
    said = read_json_object(directory / CONFIG, error=CheckpointError)
    if said["peft_type"] != PROMPTS:
        raise CheckpointError(
            f"{directory / CONFIG} has peft_type {said['peft_type']!r}, expected {PROMPTS!r}; an "
            "adapter can be trained on a base with another one on it"
        )
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(directory / WEIGHTS).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{directory / WEIGHTS} has tensor {name}, expected none but "
                                  "adaption_prompt and adaption_gate")  # fmt: skip
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    with output_directory(out, overwrite=overwrite, sources=(directory, base)) as stage:
        language_model = load_language_model(str(base.resolve()))
        config = _config(directory, said, found, language_model)
        model = LlamaAdapterForConditionalGeneration.from_base(
            language_model, config=LlamaAdapterConfig(adapter=config)
        )
        with torch.no_grad():
            for attention, prompt in model.adapter.prompts():
                assert isinstance(prompt, StaticPrompt)
                _refuse_output_bias(attention, f"layers.{prompt.layer_index}.self_attn")
                prompt.prompt.copy_(found[prompt.layer_index]["prompt"].squeeze(0))
                prompt.gate.copy_(found[prompt.layer_index]["gate"].expand_as(prompt.gate))
        model.save_pretrained(stage)
    return len(found)


def _config(
    directory: Path,
    said: dict[str, Any],
    found: dict[int, dict[str, torch.Tensor]],
    base: PreTrainedModel,
) -> AdapterConfig:
    """The settings, after everything that the file must have was found in it."""
    length, layers = said.get("adapter_len"), said.get("adapter_layers")
    size, depth = base.config.hidden_size, base.config.num_hidden_layers
    if base.config.model_type not in FAMILIES:
        raise CheckpointError(
            f"the base is of family {base.config.model_type!r}; peft computes AdaptionPrompt as we "
            f"do on {' and '.join(FAMILIES)} only"
        )
    expected = {"prompt": (1, length, size), "gate": (1,)}
    last = range(depth - layers, depth) if isinstance(layers, int) else range(0)
    shapes = {i: {n: tuple(t.shape) for n, t in held.items()} for i, held in found.items()}
    if not last or shapes != dict.fromkeys(last, expected):
        raise CheckpointError(
            f"{directory / WEIGHTS} does not hold adaption_prompt {list(expected['prompt'])} and "
            f"adaption_gate [1] of the last {layers} of the base's {depth} layers"
        )
    return AdapterConfig.preset("v1", prompt_length=length, prompt_layers=layers, gate="raw")
