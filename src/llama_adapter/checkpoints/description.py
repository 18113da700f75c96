"""What an adapter is and how large, from file headers and shapes alone (`llama-adapter info`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llama_adapter.checkpoints.bases import load_from_config
from llama_adapter.checkpoints.extras import read_origin
from llama_adapter.config import PRESETS, AdapterConfig, did_you_mean
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.model.adapter import PROJECTION, Adapter
from llama_adapter.model.configuration import read_adapter_config
from llama_adapter.model.fingerprints import describe_rule
from llama_adapter.model.gated_attention import LateFusionPrompt, StaticPrompt, VisualPrompt
from llama_adapter.model.groups import Group, Role
from llama_adapter.model.loading import check_sizes
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.projection import VisualProjection
from llama_adapter.model.references import resolve_reference
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear
from llama_adapter.model.tensor_files import read_header, stored_tensors
from llama_adapter.pretrained import load_pretrained

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "llama-65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Bases of published adapters, for sizes without weights."""

VIT_L_14 = (1024, 768)
"""Width of CLIP ViT-L/14's tokens, before and after its projection."""

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes per number of a base, by how it is loaded."""

ROLES: dict[str, tuple[Group, Role]] = {
    name: (module.group, role)
    for module in (StaticPrompt, VisualPrompt, LateFusionPrompt, ScaledLinear)
    for name, role in module.tensors.values()
}
"""Group and role of a tensor by the last part of its name in files, as its module says."""


def describe_directory(directory: Path) -> dict[str, Any]:
    """An adapter directory: kind, base, vision, fusion, layers, sizes; reads no base weights.

    Raises CheckpointError for a directory that is damaged.
    """
    stored = read_adapter_config(directory)
    config = AdapterConfig.from_dict(stored["adapter"])
    path = directory / ADAPTER_WEIGHTS_NAME
    sizes = tensor_sizes(path)
    base_config = _base_config(stored["base"], directory)
    return {
        "kind": _kind(directory, config),
        "format_version": stored["format_version"],
        "fusion": config.fusion,
        **_sizes(sizes, None if base_config is None else _count(base_config)),
        "file": {"name": path.name, "bytes": path.stat().st_size, "tensors": len(sizes)},
        "layers": {
            "base": int((stored["base"] or {}).get("num_hidden_layers", 0)),
            "static": _layers_with(sizes, "prompt"),
            "visual": _layers_with(sizes, "visual_gate"),
        },
        "base": _brief(stored["base"]),
        "vision": _brief(stored["vision"]),
        "adapter": config.to_dict(),
        "base_is_known_by": describe_rule(stored["base"]),
        "notes": [*_notes(stored["base"], base_config), *_without_prompts(stored, config, sizes)],
    }


def describe_shape(name: str, *, preset: str = "v2") -> dict[str, Any]:
    """What a preset would train on a base of a known shape; no weights are made or read.

    Images go through CLIP ViT-L/14, as in the paper. Raises ConfigError for an unknown name.
    """
    key = name if name in SHAPES else f"llama-{name}"
    if key not in SHAPES:
        raise ConfigError(
            f"unknown shape {name!r}{did_you_mean(name, SHAPES)}; known: {', '.join(SHAPES)}"
        )
    config = AdapterConfig.preset(preset)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[key]))
        base_parameters = sum(p.numel() for p in model.parameters())
        adapter = Adapter(
            model, config, feature_size=VIT_L_14[config.vision_feature == "projected"]
        )
    sizes = {n: p.numel() for n, p in adapter.named_parameters()}
    return {
        "shape": key,
        "preset": preset,
        "fusion": config.fusion,
        **_sizes(sizes, base_parameters),
        "layers": {
            "base": adapter.num_layers,
            "static": list(config.prompt_layer_indices(adapter.num_layers)),
            "visual": list(config.visual_layer_indices()),
        },
    }


def tensor_sizes(path: Path) -> dict[str, int]:
    """How many values each tensor of a safetensors file holds; reads its header alone."""
    return {name: math.prod(stored.shape) for name, stored in read_header(path).tensors.items()}


def _sizes(sizes: Mapping[str, int], base_parameters: int | None) -> dict[str, Any]:
    total = sum(sizes.values())
    known = {name: group_and_role(name, sizes) for name in sizes}
    vision = sum(size for name, size in sizes.items() if known[name][0] is Group.VISION)
    parts = {role.value: 0 for role in (Role.PROJECTION, *Role)}
    for name, size in sizes.items():
        parts[known[name][1].value] += size
    memory = {"adapter (float32)": 4 * total}
    percent = None
    if base_parameters is not None:
        percent = round(100 * total / base_parameters, 4)
        memory |= {f"base ({d})": int(base_parameters * size) for d, size in BYTES.items()}
    return {
        "trainable": {
            "vision": vision,
            "language": total - vision,
            "total": total,
            "percent_of_base": percent,
        },
        "parts": {part: size for part, size in parts.items() if size},
        "base_parameters": base_parameters,
        "memory_bytes": memory,
    }


def group_and_role(name: str, names: Collection[str]) -> tuple[Group, Role]:
    """Of a tensor in a file that has these names."""
    module, _, last = name.rpartition(".")
    if name.startswith(f"{PROJECTION}."):
        return VisualProjection.group, Role.PROJECTION
    # a norm has a weight, which no other module besides the projection has
    if f"{module}.weight" in names or last not in ROLES:
        return LearnedNorm.group, Role.NORM
    return ROLES[last]


def _layers_with(names: Mapping[str, int], what: str) -> list[int]:
    parts = [name.split(".") for name in names if name.endswith(f".{what}")]
    return sorted(int(part) for found in parts for part in found if part.isdecimal())


def _without_prompts(
    stored: Mapping[str, Any], config: AdapterConfig, sizes: Mapping[str, int]
) -> list[str]:
    """Says which layers can have no prompts, where every layer that can has some."""
    if config.prompt_layers is not None or not config.prompt_length:
        return []
    with_prompts = {*_layers_with(sizes, "prompt"), *_layers_with(sizes, "visual_gate")}
    count = int((stored["base"] or {}).get("num_hidden_layers", 0))
    without = sorted(set(range(count)) - with_prompts)
    if not without:
        return []
    return [
        f"layers {', '.join(map(str, without))} have no prompts: they reuse the keys and values of "
        "other layers, or have no softmax attention"
    ]


def _kind(directory: Path, config: AdapterConfig) -> str:
    """The released kind it was imported from, the preset it equals, or `custom`."""
    origin = read_origin(directory)
    if origin is not None:
        return f"released {origin.kind}"
    for name in PRESETS:
        if AdapterConfig.preset(name) == config:
            return name
    return "custom"


def _brief(reference: dict[str, Any] | None) -> dict[str, Any] | None:
    """A reference without what is long and for comparisons alone."""
    if reference is None:
        return None
    return {k: v for k, v in reference.items() if k not in ("weights", "config")}


def _base_config(base: Mapping[str, Any] | None, directory: Path) -> Any:
    """The base's configuration if it is on this machine."""
    name = (base or {}).get("name_or_path", "")
    if not name:
        return None
    try:
        path = resolve_reference(name, directory=directory)
        config = load_pretrained(AutoConfig, path, what="config of the base", local_files_only=True)
        stored = stored_tensors(Path(path)) if Path(path).is_dir() else None
        if stored is not None:
            check_sizes(config, stored, what=f"base {name!r}")
        return config
    except CheckpointError:
        return None


def _count(config: Any) -> int:
    with torch.device("meta"):
        model = load_from_config(config, what="base")
    return sum(parameter.numel() for parameter in model.parameters())


def _notes(base: Mapping[str, Any] | None, config: Any) -> list[str]:
    if not (base or {}).get("name_or_path"):
        return ["the base is not named: pass it already loaded"]
    if config is None:
        return ["the base is not on this machine"]
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if experts and experts > 1:
        return [
            f"mixture of {experts} experts: attention linears and norms are adapted, "
            "the experts are left alone"
        ]
    return []
