"""An adapter merged into its base as a stock Hugging Face checkpoint (`llama-adapter export`)."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llama_adapter.checkpoints.bases import REFERENCE, describe_stored
from llama_adapter.checkpoints.directories import adapter_sources, mark_export, output_directory
from llama_adapter.checkpoints.extras import EXTRAS_NAME
from llama_adapter.checkpoints.stock_template import stock_template
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, UnsupportedModelError
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.adapter import Adapter
from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME, LlamaAdapterConfig
from llama_adapter.model.equivalence import EQUIVALENCE_NAME
from llama_adapter.model.groups import Role
from llama_adapter.model.peft_base import PEFT_FOLDER
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME, write_tensors
from llama_adapter.model.references import resolve_reference
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear
from llama_adapter.processing.processor import PROCESSOR_FILE, LlamaAdapterProcessor
from llama_adapter.uploads import CARD

MERGED = (Role.BIAS, Role.SCALE, Role.NORM)
"""What becomes part of the base's weights, always."""

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
    merged: int
    """Linears and norms merged into the base."""
    kept: tuple[str, ...]
    """What could not be merged and stays as a smaller adapter."""
    stop: tuple[str, ...] = ()
    """Stop strings that every request must name, since no single token ends an answer."""
    problem: str | None = None
    """Why the checkpoint has its base's chat template, not the adapter's prompts."""


def export_merged(
    directory: Path, *, out: Path, partial: bool = False, overwrite: bool = False
) -> MergeReport:
    """Write a stock checkpoint at `out` that equals the adapted model; whole or not at all.

    Its chat template writes the adapter's prompts, where one can.
    With `partial` linears and norms are merged into `out`/base and what remains (prompts, the
    visual projection, LoRA that prompts bypass) becomes an adapter on it.
    Raises CheckpointError naming what cannot be merged without `partial`.
    """
    content = LlamaAdapterConfig.from_pretrained(str(directory))
    kept = unmergeable(content.adapter_config)
    refuse_unmergeable(directory, content, partial=partial)
    sources = adapter_sources(directory, content.base, content.vision)
    with output_directory(out, overwrite=overwrite, sources=sources) as stage:
        model = LlamaAdapterForConditionalGeneration.from_pretrained(str(directory))
        rest = _remaining_state(model)
        if rest and not kept:
            raise CheckpointError(
                f"{directory} cannot become a stock checkpoint: {next(iter(rest))} cannot be merged"
            )
        merged, biases = merge_into_base(model)
        if biases and not partial:
            family = model.language_model.config.model_type
            raise CheckpointError(
                f"{directory} cannot become a stock checkpoint: a {family} "
                f"configuration has no flag for {len(biases)} learned biases, first "
                f"{next(iter(biases))} (--partial keeps them as a smaller adapter)"
            )
        if biases:
            kept.append("the biases, for which the base's configuration has no flag")
        target = stage / REFERENCE if kept else stage
        model.language_model.save_pretrained(target)
        source = Path(resolve_reference(content.base["name_or_path"], directory=directory))
        _copy_tokenizer(source, target)
        mark_export(stage, kind="merged")
        report = MergeReport(out=out, merged=merged, kept=tuple(kept))
        if kept:
            _write_rest(stage, directory, content, model.adapter_config, {**rest, **biases})
        else:
            report = replace(report, **_write_template(stage, directory))
    return report


def refuse_unmergeable(
    directory: Path, content: LlamaAdapterConfig, *, partial: bool = False
) -> None:
    """CheckpointError for what no weights can express; with `partial` only what we cannot keep."""
    if (directory / PEFT_FOLDER).is_dir():
        raise CheckpointError(
            f"{directory} cannot be merged: its base has the peft adapter in "
            f"{directory / PEFT_FOLDER} on it, which cannot be merged together with ours"
        )
    kept = unmergeable(content.adapter_config)
    if kept and not partial:
        raise CheckpointError(
            f"{directory} cannot become a stock checkpoint: {' and '.join(kept)} cannot be merged "
            "into weights (--format merged --partial merges the linears and norms and keeps the "
            "rest as a smaller adapter, which our own programs load)"
        )


def unmergeable(config: AdapterConfig) -> list[str]:
    """What of an adapter no weight of a stock checkpoint can express."""
    kept = []
    if config.prompt_length and config.prompt_layers != 0:
        last = config.prompt_layers
        kept.append("the static prompts" + (f" of the last {last} layers" if last else ""))
    if config.is_multimodal:
        kept.append("the visual prompts")
    if kept and config.lora_rank:
        kept.append("the LoRA of key and value projections, which prompts bypass")
    return kept


@torch.no_grad()
def merge_into_base(
    model: LlamaAdapterForConditionalGeneration, *, keep_bypassed: bool = True
) -> tuple[int, dict[str, Tensor]]:
    """Merge in place and take the adapter off.

    LoRA that prompts bypass is left out, since a stock model would show it to them; without
    `keep_bypassed` it is merged too, and the caller takes care of the prompts.
    Returns how many modules were merged, and by their names in adapter files the biases that the
    family's configuration has no place for.
    """
    base = model.language_model
    _refuse_shared(model.adapter)
    config, holders = _bias_holders(base, model.adapter_config)
    names = {id(module): name for name, module in base.named_modules()}
    bypassed = _bypassed(model.adapter) if keep_bypassed else set()
    unplaceable: dict[str, Tensor] = {}
    merged = 0
    for target in model.adapter.targets:
        module = target.module
        if isinstance(module, ScaledLinear):
            if target.attribute in bypassed:
                module.lora_down = module.lora_up = None  # stays in the adapter
            bias = _merge_linear(module, target.name)
            if bias is not None and names[id(module)] in holders:
                dtype = module.base_layer.weight.dtype
                module.base_layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
            elif bias is not None:
                unplaceable[f"{target.name}.bias"] = bias
            merged += 1
        elif isinstance(module, LearnedNorm):
            learned = module.norm.parameters()
            for own, new in zip(module.base_layer.parameters(), learned, strict=True):
                own.copy_(new)
            merged += 1
    model.disable_adapters()
    for name in holders:  # linears for which the flags announce a bias that nobody learned
        linear = base.get_submodule(name)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
    base.config = config
    return merged, unplaceable


def _merge_linear(module: ScaledLinear, name: str) -> Tensor | None:
    """Merge into the frozen weight; returns the bias that goes with it."""
    linear = module.base_layer
    if type(linear) not in (nn.Linear, Conv1D):
        raise UnsupportedModelError(
            f"{name} is a {type(linear).__name__}: a quantized base cannot be merged"
        )
    weight, bias = module.merged_weights()
    linear.weight.copy_(weight.T if isinstance(linear, Conv1D) else weight)
    return bias


def _refuse_shared(adapter: Adapter) -> None:
    """Refuse linears that share a weight: each has learned a scale of its own."""
    names: dict[int, str] = {}
    for target in adapter.targets:
        if isinstance(target.module, ScaledLinear):
            other = names.setdefault(id(target.module.weight), target.name)
            if other != target.name:
                raise UnsupportedModelError(
                    f"{other} and {target.name} share a weight of the base and have learned apart: "
                    "they cannot be merged"
                )


def _bias_holders(base: PreTrainedModel, adapter: AdapterConfig) -> tuple[Any, set[str]]:
    """A configuration that announces biases where it can, and the linears that have one then."""
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    targets = adapter.bias_targets
    for flag, ending in (("attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj")),
                         ("mlp_bias", ("gate_proj", "up_proj", "down_proj"))):  # fmt: skip
        is_wanted = targets == "all" or any(name in ending for name in targets)
        if hasattr(text, flag) and is_wanted:
            setattr(text, flag, True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.bias is not None
    }


def _remaining_state(model: LlamaAdapterForConditionalGeneration) -> dict[str, Tensor]:
    """What of the adapter is not merged, by its names in adapter files."""
    bypassed = _bypassed(model.adapter)
    low_rank = {target.name for target in model.adapter.targets if target.attribute in bypassed}
    return {
        f"{name}.{tensor.name}": tensor.parameter.detach().clone()
        for name, module in model.adapter.modules()
        for tensor in module.trainables()
        if tensor.role not in MERGED and (tensor.role != Role.LORA or name in low_rank)
    }


def _bypassed(adapter: Adapter) -> set[str]:
    """Attributes, such as `k_proj`, of the linears whose LoRA prompts bypass; it stays unmerged."""
    linears = {
        id(linear)
        for attention, prompt in adapter.prompts()
        for linear in prompt.project.linears(attention)
    }
    return {target.attribute for target in adapter.targets if id(target.module) in linears}


def _write_rest(
    stage: Path,
    directory: Path,
    content: LlamaAdapterConfig,
    config: AdapterConfig,
    rest: dict[str, Tensor],
) -> None:
    """The smaller adapter on the merged base."""
    low_rank = sorted({n.split(".")[-2] for n in rest if n.endswith(".lora_up")})
    biases = [n for n in rest if n.startswith("layers.") and n.endswith(".bias")]
    biased = sorted({n.split(".")[-2] for n in biases})
    smaller = AdapterConfig.from_dict(
        {
            **config.to_dict(),
            "bias_targets": biased or "none",
            "scale_targets": "none",
            "train_norms": False,
            "lora_rank": config.lora_rank if low_rank else 0,
            "lora_targets": low_rank or "all",
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
    write_tensors(stage / ADAPTER_WEIGHTS_NAME, rest, config=smaller)


def _copy_rest(source: Path, target: Path) -> None:
    """Processor and tokenizer files of an adapter directory."""
    ours = {
        ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EXTRAS_NAME, EQUIVALENCE_NAME, CARD,
        "config.json",
    }  # fmt: skip
    for path in source.iterdir():
        if path.is_file() and path.name not in ours and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _write_template(stage: Path, directory: Path) -> dict[str, Any]:
    """The adapter's prompts as the checkpoint's chat template; what the report says of them."""
    if not (directory / PROCESSOR_FILE).is_file():
        return {"problem": f"{directory} has no {PROCESSOR_FILE}"}
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    try:
        template = stock_template(processor)
    except CheckpointError as error:
        return {"problem": str(error)}
    processor.tokenizer.save_pretrained(stage)
    (stage / "chat_template.jinja").write_text(template)
    return {"stop": tuple(processor.stop_strings)}


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
