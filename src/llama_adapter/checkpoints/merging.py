"""An adapter folded into its base as a stock Hugging Face checkpoint (`llama-adapter export`)."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_adapter.checkpoints.bases import REFERENCE, describe_stored
from llama_adapter.checkpoints.directories import staged_directory
from llama_adapter.checkpoints.importing import EXTRAS_NAME
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, UnsupportedModelError
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME, LlamaAdapterConfig
from llama_adapter.model.gated_attention import AdaptionPrompt
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.references import resolve_reference
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear

_PROMPT_LINEARS = ("k_proj", "v_proj", "qkv_proj", "query_key_value")
"""Linears that make keys and values of prompts, which bypass LoRA."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What an export did."""

    out: Path
    folded: int
    """Linears and norms folded into the base."""
    kept: tuple[str, ...]
    """What could not be folded and stays as a smaller adapter."""


def export_merged(
    directory: Path, *, out: Path, partial: bool = False, overwrite: bool = False
) -> MergeReport:
    """Write a stock checkpoint at `out` that equals the adapted model; whole or not at all.

    With `partial` linears and norms are folded into `out`/base and what remains (prompts, the
    visual projection, LoRA that prompts bypass) becomes an adapter on it.
    Raises CheckpointError naming what cannot be folded without `partial`.
    """
    content = LlamaAdapterConfig.from_pretrained(str(directory))
    kept = unfoldable(content.adapter_config)
    if kept and not partial:
        raise CheckpointError(
            f"{directory} cannot become a stock checkpoint: {'; '.join(kept)} cannot be folded "
            "into weights (--partial folds the linears and norms and keeps the rest as a smaller "
            "adapter)"
        )
    with staged_directory(out, overwrite=overwrite, sources=(directory,)) as stage:
        model = LlamaAdapterForConditionalGeneration.from_pretrained(str(directory))
        target = stage / REFERENCE if kept else stage
        rest = _remaining_state(model)
        folded = _fold_into_base(model)
        base = model.language_model
        base.save_pretrained(target)
        source = Path(resolve_reference(content.base["name_or_path"], directory=directory))
        _copy_tokenizer(source, target)
        if kept:
            _write_rest(stage, directory, content, model.adapter_config, rest)
    return MergeReport(out=out, folded=folded, kept=tuple(kept))


def unfoldable(config: AdapterConfig) -> list[str]:
    """What of an adapter no weight of a stock checkpoint can express."""
    kept = []
    if config.prompt_length and config.prompt_layers != 0:
        where = "all" if config.prompt_layers is None else f"the last {config.prompt_layers}"
        kept.append(f"the static prompts of {where} layers")
    if config.sees:
        kept.append("the visual prompts")
    if kept and config.lora_rank:
        kept.append("the LoRA of key and value projections, which prompts bypass")
    return kept


@torch.no_grad()
def _fold_into_base(model: LlamaAdapterForConditionalGeneration) -> int:
    """Fold in place and take the adapter off; returns how many modules were folded."""
    has_prompts = any(True for _ in model.adapter.prompts()) or model.visual is not None
    folded = 0
    for site in model.adapter.sites:
        module = site.module
        if isinstance(module, ScaledLinear):
            keeps_lora = has_prompts and site.attribute in _PROMPT_LINEARS
            if keeps_lora:
                module.lora_down = module.lora_up = None
            _fold_linear(module, site.name)
            folded += 1
        elif isinstance(module, LearnedNorm):
            for own, learned in zip(
                module.base_layer.parameters(), module.norm.parameters(), strict=True
            ):
                own.copy_(learned)
            folded += 1
    model.disable_adapters()
    _set_bias_flags(model.language_model)
    return folded


def _fold_linear(module: ScaledLinear, name: str) -> None:
    if type(module.base_layer) is not nn.Linear:
        raise UnsupportedModelError(
            f"{name} is a {type(module.base_layer).__name__}: a quantised base cannot be merged"
        )
    weight, bias = module.folded_weights()
    base = module.base_layer
    base.weight.copy_(weight)
    if bias is not None:
        base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)


def _set_bias_flags(model: PreTrainedModel) -> None:
    """Announce the new biases in the config; linears that it announces and have none get zeros."""
    own = {name for name, _ in model.named_parameters()}
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for flag, part in (("attention_bias", "attn"), ("mlp_bias", "mlp")):
        if hasattr(text, flag):
            has_bias = any(part in name and name.endswith("_proj.bias") for name in own)
            setattr(text, flag, bool(getattr(text, flag)) or has_bias)
    with torch.device("meta"):
        expected = {name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()}
    strange = sorted(own - expected)
    if strange:
        raise CheckpointError(
            f"a {config.model_type} configuration has no flag for the learned biases "
            f"({len(strange)} in all, first {strange[0]}): no stock checkpoint can hold them"
        )
    for name in sorted(expected - own):
        linear = model.get_submodule(name.rpartition(".")[0])
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
    model.config = config


def _remaining_state(model: LlamaAdapterForConditionalGeneration) -> dict[str, Tensor]:
    """What of the adapter is not folded, by its names in adapter files."""
    state: dict[str, Tensor] = {}
    for name, module in model.adapter.modules():
        if isinstance(module, LearnedNorm):
            continue
        if isinstance(module, ScaledLinear):
            is_prompts = name.rsplit(".", 1)[1] in _PROMPT_LINEARS
            if is_prompts and module.lora_down is not None and module.lora_up is not None:
                state[f"{name}.lora_down"] = module.lora_down.detach().clone()
                state[f"{name}.lora_up"] = module.lora_up.detach().clone()
            continue
        prefix = "visual_" if isinstance(module, AdaptionPrompt) and module.prompt is None else ""
        for inner, parameter in module.trainable_parameters():
            state[f"{name}.{prefix}{inner}"] = parameter.detach().clone()
    return state


def _write_rest(
    stage: Path,
    directory: Path,
    content: LlamaAdapterConfig,
    config: AdapterConfig,
    rest: dict[str, Tensor],
) -> None:
    """The smaller adapter on the merged base."""
    targets = sorted({n.split(".")[-2] for n in rest if n.endswith(".lora_up")})
    smaller = AdapterConfig.from_dict(
        {
            **config.to_dict(),
            "bias_targets": "none",
            "scale_targets": "none",
            "train_norms": False,
            "lora_rank": config.lora_rank if targets else 0,
            "lora_targets": targets or "all",
        }
    )
    _copy_rest(directory, stage)
    vision: dict[str, Any] | None = content.vision
    if vision is not None and (directory / vision["name_or_path"]).is_dir():
        inside = directory / vision["name_or_path"]
        if inside.resolve().is_relative_to(directory.resolve()):
            shutil.copytree(inside, stage / "vision")
            vision = {**vision, "name_or_path": "vision"}
    base = describe_stored(stage / REFERENCE, reference=REFERENCE)
    LlamaAdapterConfig(adapter=smaller, base=base, vision=vision).save_pretrained(stage)
    save_file(
        {name: tensor.contiguous() for name, tensor in rest.items()},
        stage / ADAPTER_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )


def _copy_rest(source: Path, target: Path) -> None:
    """Processor and tokenizer files of an adapter directory."""
    ours = {ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EXTRAS_NAME, "config.json"}
    for path in source.iterdir():
        if path.is_file() and path.name not in ours and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
