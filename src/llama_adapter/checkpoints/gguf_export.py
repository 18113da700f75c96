"""An adapter merged into its base as a GGUF file, which llama.cpp and its relatives load.

model.gguf                  weights with biases, tokenizer, and the adapter's prompts as a template
llama_adapter_export.json   says that we wrote it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.checkpoints import merging
from llama_adapter.checkpoints.directories import adapter_sources, mark_export, output_directory
from llama_adapter.checkpoints.gguf_tokenizer import Vocabulary
from llama_adapter.checkpoints.meta_base import rotary_permutation
from llama_adapter.checkpoints.stock_template import stock_template
from llama_adapter.errors import CheckpointError, import_extra
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.processing.processor import LlamaAdapterProcessor

NAME = "model.gguf"
FAMILIES = ("llama", "mistral", "qwen2")
"""Bases that compute what llama.cpp's `llama` does, whose loader takes a bias in every linear.

Its loaders of other families would ignore some of the biases without a word.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufReport:
    """What an export did."""

    file: Path
    merged: int
    """Linears and norms merged into the base."""
    stop: tuple[str, ...]
    """Stop strings that every request must name, since no single token ends an answer."""


def export_gguf(directory: Path, *, out: Path, overwrite: bool = False) -> GgufReport:
    """Write `out`/model.gguf, which equals the adapted model; whole or not at all.

    Raises CheckpointError naming what does not merge and what llama.cpp does not compute.
    """
    gguf = import_extra("gguf", extra="gguf", purpose="--format gguf")
    content = LlamaAdapterConfig.from_pretrained(str(directory))
    merging.refuse_unmergeable(directory, content)
    sources = adapter_sources(directory, content.base)
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    template = stock_template(processor)
    with output_directory(out, overwrite=overwrite, sources=sources) as stage:
        model = LlamaAdapterForConditionalGeneration.from_pretrained(str(directory))
        base = model.language_model
        _check_base(directory, base.config)
        vocabulary = Vocabulary.of(processor, size=base.config.vocab_size)
        merged, biases = merging.merge_into_base(model)
        writer = gguf.GGUFWriter(stage / NAME, "llama")
        writer.add_name(out.name)
        _add_shapes(writer, base)
        vocabulary.write(writer)
        writer.add_chat_template(template)
        for name, tensor in _tensors(base, biases):
            _add(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        mark_export(stage, kind="gguf")
    return GgufReport(file=out / NAME, merged=merged, stop=tuple(processor.stop_strings))


def _check_base(directory: Path, config: Any) -> None:
    """Refuse what llama.cpp's `llama` would compute otherwise."""
    rope = config.rope_parameters["rope_type"] if config.model_type in FAMILIES else ""
    for field, found, expected in (
        ("model_type", config.model_type, FAMILIES),
        ("hidden_act", getattr(config, "hidden_act", None), ("silu",)),
        ("rope_type", rope, ("default", "linear", "llama3")),
    ):
        if found not in expected:
            raise CheckpointError(
                f"{directory} cannot become a GGUF file: its base has {field} {found!r}, "
                f"expected {' or '.join(expected)}"
            )


def _add_shapes(writer: Any, base: PreTrainedModel) -> None:
    import gguf

    config = base.config
    head_size = _head_size(config)
    # llama.cpp attends to all tokens; within a window that is the same
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    kinds = gguf.LlamaFileType
    halves = {torch.float16: kinds.MOSTLY_F16, torch.bfloat16: kinds.MOSTLY_BF16}
    writer.add_file_type(halves.get(base.dtype, kinds.ALL_F32))


def _tensors(base: PreTrainedModel, biases: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All tensors by GGUF's names; query and key rows in the order of interleaved rotation."""
    import gguf

    config = base.config
    head_size = _head_size(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = base.state_dict()
    for name, bias in biases.items():  # by the names of adapter files
        stored[f"model.{name.replace('.attention.', '.self_attn.')}"] = bias
    for name, tensor in stored.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(f"the base's tensor {name} has no counterpart in a GGUF file")
        if ".q_proj." in name or ".k_proj." in name:
            tensor = tensor[torch.argsort(rotary_permutation(len(tensor), head_size))]
        yield found, tensor
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _slowing(config.rope_parameters, head_size)


def _slowing(rope: dict[str, Any], head_size: int) -> Tensor:
    """By how much Llama 3 divides each rotary frequency."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    frequencies = rope["rope_theta"] ** -exponents
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).float()


def _head_size(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    """Matrices in the base's type; vectors, which llama.cpp adds and multiplies, in float32."""
    import gguf

    if tensor.ndim > 1 and tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.numpy())
        return
    values = tensor.float().numpy()
    if tensor.ndim > 1 and tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)
