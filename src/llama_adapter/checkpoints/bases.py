"""The base that a released adapter is imported onto, before its weights are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llama_adapter.checkpoints.layout import BaseShape
from llama_adapter.checkpoints.meta_base import MetaBase, hugging_face_name, rotary_permutation
from llama_adapter.checkpoints.unexpected import what_directory
from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json_object
from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME
from llama_adapter.model.fingerprints import (
    fingerprints_of,
    is_never_quantized,
    is_quantized,
    places,
)
from llama_adapter.model.loading import check_sizes
from llama_adapter.model.references import (
    describe_model,
    fingerprint_of,
    load_language_model,
)
from llama_adapter.model.tensor_files import FLOATS, INDEX, SINGLE, stored_tensors
from llama_adapter.pretrained import explain, load_pretrained

REFERENCE = "base"
"""Folder of a converted base inside an adapter directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A base in either layout."""

    directory: Path
    config: Any
    """Its Hugging Face text config."""
    meta: MetaBase | None
    """Set if it must be converted."""

    @property
    def shape(self) -> BaseShape:
        return BaseShape.of(self.config)

    @classmethod
    def open(cls, directory: Path) -> Base:
        """Look at a base; CheckpointError if it is missing or not a decoder of LLaMA's kind."""
        if not directory.is_dir():
            raise CheckpointError(f"the base {directory} is not a directory")
        if MetaBase.is_at(directory):
            meta = MetaBase(directory)
            return cls(directory=directory, config=meta.config, meta=meta)
        if (directory / ADAPTER_CONFIG_NAME).is_file():
            raise CheckpointError(
                f"the base {directory} is {what_directory(directory)}; expected a model"
            )
        if not (directory / "config.json").is_file():
            raise CheckpointError(
                f"the base {directory} has neither params.json (Meta's layout) nor config.json "
                "(Hugging Face)"
            )
        config = load_pretrained(AutoConfig, directory, what="config.json of the base")
        text_config = config.get_text_config()
        for key in ("num_attention_heads", "intermediate_size", "hidden_size"):
            if not hasattr(text_config, key):
                raise CheckpointError(f"{directory}/config.json lacks {key}; is it a decoder?")
        _check_stored(directory, config)
        return cls(directory=directory.resolve(), config=text_config, meta=None)

    def why_other(self) -> str | None:
        """How this base differs from LLaMA 1, for which all released adapters were made."""
        config = self.config
        if config.model_type != "llama":
            return f"it is a {config.model_type} model"
        rope = getattr(config, "rope_parameters", None) or {}
        if config.num_attention_heads != self.shape.num_kv_heads:
            return (
                f"it has {self.shape.num_kv_heads} key heads for {config.num_attention_heads} heads"
            )
        if rope.get("rope_theta", 10000.0) != 10000.0 or rope.get("rope_type") != "default":
            return f"its rotation is {rope.get('rope_type')} with theta {rope.get('rope_theta')}"
        is_7b_or_13b = config.hidden_size in (4096, 5120)
        if is_7b_or_13b and (config.vocab_size not in (32000, 32001) or config.rms_norm_eps > 2e-6):
            return f"norm_eps {config.rms_norm_eps} and {config.vocab_size} tokens: not LLaMA 1"
        return None

    def differing(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The first of some tensors, by their names in Meta's layout, that this base has otherwise.

        Looks at the first rows or values, in the coarser of the two dtypes.
        """
        head = self.shape.head_size
        first_shard = {} if self.meta is None or not tensors else self.meta.first_shard()
        for name in (name for name in tensors if not name.endswith("rope.freqs")):
            rows = tensors[name][:head] if tensors[name].ndim else tensors[name]
            if self.meta is not None:
                own = first_shard.get(name)
            else:
                hf_name, is_rotated = hugging_face_name(name)
                found = _read_some(self.directory, [hf_name])
                if found is None:  # other files, or tied: nothing to compare with
                    continue
                own = found[hf_name][1]
                if is_rotated and len(rows) == head:
                    rows = rows[rotary_permutation(head, head)]
                rows = rows.reshape(-1)
            if own is None or not _same_start(rows, own):
                return name
        return None

    def final_norm(self) -> Tensor:
        """Weights of the final norm, which the chat checkpoint leaves as they are."""
        if self.meta is not None:
            return self.meta.read("model.norm.weight")
        found = _read_some(self.directory, ["model.norm.weight"])
        if found is None:
            model = load_language_model(str(self.directory))
            return model.get_decoder().norm.weight.detach()
        return found["model.norm.weight"][1]


def _check_stored(directory: Path, config: Any) -> None:
    """Compare a base's file headers with its configuration; CheckpointError if they disagree."""
    stored = stored_tensors(directory)
    if stored is None:  # other files, which are compared when they are loaded
        return
    check_sizes(config, stored, what=f"base {str(directory)!r}")
    if config.model_type != "llama" or getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        model = load_from_config(config, what=f"base {directory}")
    is_tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        found = stored.get(name)
        if found is None:
            raise CheckpointError(f"the base {directory} lacks tensor {name}")
        if found.shape != tuple(parameter.shape) or found.dtype not in FLOATS:
            raise CheckpointError(
                f"the base {directory}: tensor {name} has shape {list(found.shape)} and dtype "
                f"{found.dtype}, expected {list(parameter.shape)} of a floating dtype"
            )
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in stored.keys() - known:
        if not name.endswith("rotary_emb.inv_freq") and not (is_tied and name == "lm_head.weight"):
            raise CheckpointError(
                f"the base {directory} has tensor {name}, which no llama model of its config has"
            )


def load_from_config(config: Any, *, what: str) -> Any:
    """An empty model; CheckpointError where the configuration describes none."""
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as fault:  # families raise whatever they like
        raise CheckpointError(
            f"the config of the {what} makes no model: {explain(fault)}"
        ) from fault


def _same_start(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin alike, as far as both have rows and columns."""
    if one.ndim != other.ndim:
        return False
    dtypes = {one.dtype, other.dtype}
    coarse = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    dtype = next((dtype for dtype in coarse if dtype in dtypes), torch.float64)
    part = tuple(slice(min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
    return torch.equal(one[part].to(dtype), other[part].to(dtype))


def describe_stored(directory: Path, *, reference: str) -> dict[str, Any]:
    """A reference to a stored base, without loading more of it than the fingerprint samples."""
    config = load_pretrained(AutoConfig, directory, what="config of the base")
    with torch.device("meta"):
        model = load_from_config(config, what=f"base {directory}")
    described = describe_model(model)
    names = [name for name, _ in model.named_parameters()]
    samples = _read_some(directory, names)
    if samples is None or is_quantized(model):
        described = describe_model(load_language_model(str(directory)))
    else:
        first = [(n, shape, values) for n, (shape, values, _) in samples.items()]
        described["fingerprint"] = fingerprint_of(s for s in first if is_never_quantized(s[0]))
        described["weights"] = fingerprints_of(
            ((n, shape, spread) for n, (shape, _, spread) in samples.items()),
            dtype=next(iter(samples.values()))[1].dtype,
            quantized=False,
        )
    return {**described, "name_or_path": reference}


def _read_some(
    directory: Path, names: list[str]
) -> dict[str, tuple[tuple[int, ...], Tensor, Tensor]] | None:
    """Shape, first rows and sampled values of stored tensors; None if they are not safetensors
    of these names.
    """
    stored = stored_tensors(directory)  # refuses files that are damaged or do not fit their index
    if stored is None or not set(names) <= stored.keys():
        return None
    if (directory / SINGLE).exists():
        files = dict.fromkeys(names, SINGLE)
    else:
        files = read_json_object(directory / INDEX, error=CheckpointError)["weight_map"]
    found = {}
    for file_name in sorted({files[name] for name in names}):
        with safe_open(directory / file_name, framework="pt") as file:
            for name in names:
                if files[name] == file_name:
                    tensor = file.get_tensor(name)  # mapped: only what is touched is read
                    flat = tensor.reshape(-1)
                    rows = tensor if tensor.ndim < 2 else flat[:256]
                    found[name] = (tuple(tensor.shape), rows, flat[places(flat.numel())])
    return found
