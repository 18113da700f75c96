"""Back to the authors' file format (`llama-adapter export --format released`)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from llama_adapter.checkpoints.directories import adapter_sources, mark_export, output_directory
from llama_adapter.checkpoints.extras import EXTRAS_NAME, Origin, read_extras, read_origin
from llama_adapter.checkpoints.layout import BaseShape, Entry, layout
from llama_adapter.checkpoints.released import Kind
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError
from llama_adapter.files import write_atomically
from llama_adapter.model.configuration import read_adapter_config
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.references import resolve_reference
from llama_adapter.model.tensor_files import read_tensors
from llama_adapter.pretrained import load_pretrained

RELEASED_NAME = "adapter.pth"
SIZES_NAME = "meta.json"
"""Next to it: what its tensors do not say, for importing it again."""

_FEATURES = "visual.projector.feature_proj.weight"


def export_released(directory: Path, *, out: Path, overwrite: bool = False) -> Path:
    """Write an adapter as a file in the authors' format; returns the file.

    An imported adapter that was not trained on gives its source's tensors back bit for bit, with
    their names, order and dtypes.
    Raises CheckpointError for an adapter whose settings no released kind can express.
    """
    content = read_adapter_config(directory)
    config = AdapterConfig.from_dict(content["adapter"])
    origin = read_origin(directory)
    extras = read_extras(directory) if origin else {}
    kind = origin.kind if origin else _kind_of(config, directory)
    ours = read_tensors(directory / ADAPTER_WEIGHTS_NAME)
    feature_size = ours[_FEATURES].shape[1] if _FEATURES in ours else None
    entries = layout(kind, config, _base_shape(content, directory), feature_size=feature_size)
    _check_complete(directory, entries, ours)
    official = {entry.official: entry.to_official(ours) for entry in entries}
    official = _as_in_source(directory, official, origin, extras)
    is_wrapped = origin.is_wrapped if origin else kind is not Kind.V1
    file_config = origin.config if origin else _file_config(kind, config)
    wrapped: dict[str, Any] = {"model": official} if is_wrapped else dict(official)
    if file_config is not None:
        wrapped["config"] = file_config
    sources = adapter_sources(directory, content["base"], content.get("vision"))
    with output_directory(out, overwrite=overwrite, sources=sources) as stage:
        mark_export(stage, kind="released")
        # in memory first: an error of the disk then is one of Python's
        buffer = io.BytesIO()
        torch.save(wrapped, buffer)
        write_atomically(stage / RELEASED_NAME, buffer.getvalue())
        (stage / SIZES_NAME).write_text(json.dumps(_unsaid_sizes(config), indent=1) + "\n")
    return out / RELEASED_NAME


def _unsaid_sizes(config: AdapterConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {"adapter_len": config.prompt_length}
    if config.is_multimodal:
        sizes["visual"] = {"v_num_heads": config.projector_heads}
    return sizes


def _check_complete(directory: Path, entries: list[Entry], ours: Mapping[str, Tensor]) -> None:
    """CheckpointError unless the adapter has just the tensors of its kind, in shape."""
    expected = {name: entry.our_shape for entry in entries for name in entry.ours}
    path = directory / ADAPTER_WEIGHTS_NAME
    for name in sorted(expected.keys() | ours.keys()):
        found = tuple(ours[name].shape) if name in ours else None
        if found != expected.get(name):
            raise CheckpointError(
                f"{path}: tensor {name} has shape {found and list(found)}, expected "
                f"{list(expected[name]) if name in expected else 'none of that name'}"
            )


def _as_in_source(
    directory: Path, official: dict[str, Tensor], origin: Origin | None, extras: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The source's tensors, order and dtypes: what it lacked and nothing changed is left out."""
    if origin is None:
        return {name: tensor.contiguous() for name, tensor in official.items()}
    lacking = [name for name in origin.absent if name not in extras or name not in official]
    lacking += [n for n in origin.dtypes if n not in extras and n not in official]
    if lacking:
        raise CheckpointError(f"{directory / EXTRAS_NAME} lacks tensor {lacking[0]}")
    for name in origin.absent:
        if torch.equal(official[name], extras[name].float()):
            del official[name]
    everything = {**{n: extras[n] for n in origin.dtypes if n in extras}, **official}
    order = [n for n in origin.dtypes if n in everything]
    order += [n for n in everything if n not in origin.dtypes]
    dtypes = {name: getattr(torch, dtype) for name, dtype in origin.dtypes.items()}
    return {
        name: everything[name].to(dtypes.get(name, torch.float32)).contiguous() for name in order
    }


def _base_shape(content: dict[str, Any], directory: Path) -> BaseShape:
    reference = (content["base"] or {}).get("name_or_path", "")
    path = resolve_reference(reference, directory=directory)
    config = load_pretrained(AutoConfig, path, what="base")
    return BaseShape.of(config.get_text_config())


def _kind_of(config: AdapterConfig, directory: Path) -> Kind:
    """The released kind whose settings these are; CheckpointError if there is none."""
    plain = config.bias_targets == "none" and config.scale_targets == "none"
    presets = {
        Kind.V1: ("released-v1", ("prompt_length", "prompt_layers", "gate")),
        Kind.V2_CHAT: ("released-v2-chat", ("prompt_length", "prompt_layers")),
        Kind.V2_BIAS: ("released-v2-bias", (*_OPEN_IN_V2, "gate_scale")),
        Kind.V2_LORA_BIAS: ("released-v2-lora-bias", (*_OPEN_IN_V2, "gate_scale", "lora_rank")),
    }
    differences = {}
    for kind, (name, free) in presets.items():
        values = config.to_dict()
        expected = AdapterConfig.preset(name).to_dict()
        if config.fusion == "none":  # nothing visual matters then
            free = (*free, *_VISUAL)
        different = [k for k in values if k not in free and values[k] != expected[k]]
        if not different and not (kind is Kind.V1 and not plain):
            return kind
        differences[kind] = different
    kind, different = min(differences.items(), key=lambda item: len(item[1]))
    raise CheckpointError(
        f"{directory} is none of the released kinds: closest is {kind}, but "
        f"{', '.join(f'{name} is {getattr(config, name)!r}' for name in different[:3])}"
    )


_OPEN_IN_V2 = (
    "prompt_length",
    "prompt_layers",
    "visual_prompt_length",
    "projector_width",
    "projector_blocks",
    "projector_heads",
    "projector_mlp_ratio",
    "caption_instruction",
    "frame_rule",
)
_VISUAL = (
    *_OPEN_IN_V2[2:],
    "visual_layers",
    "visual_scope",
    "placeholder_attention",
    "projector",
    "vision_feature",
    "vision_tokens",
    "channel_order",
)


def _file_config(kind: Kind, config: AdapterConfig) -> dict[str, Any] | None:
    if kind not in (Kind.V2_BIAS, Kind.V2_LORA_BIAS):
        return None
    return {
        "w_bias": config.bias_targets != "none",
        "w_lora": config.lora_rank > 0,
        "lora_rank": config.lora_rank or 16,
    }
