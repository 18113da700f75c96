"""What a recipe will need, from the configs of its models alone: no weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llama_adapter.families.vision import vision_features
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.groups import Group
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.build import META, build
from llama_adapter.training.joint import moved_by
from llama_adapter.training.parallel import dummy_image
from llama_adapter.training.recipe import Recipe, VisionSection

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_QUANTIZED_BYTES = {"nf4": 0.53, "int8": 1.0}
_TABLES = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_embeddings?)(\.|$)")
"""What decoders call their embeddings of positions, learned or computed once."""
_TRAINED_BYTES = 16
"""Of a trained parameter: itself, its gradient and two moments of AdamW, in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Parameters and bytes of one process, before sharding."""

    base_parameters: int
    vision_parameters: int
    trained_parameters: dict[str, int]
    """By group, of those that the recipe's kinds of data move."""
    layers: int
    context: int | None
    """Positions that the base knows, where its config says."""
    positions: int | None
    """Rows of the base's table of positions; None: it computes them, and fails beyond none."""
    embedding_rows: int
    frozen_bytes: int
    trained_bytes: int
    activation_bytes: int
    """A rough figure: what the backward pass keeps of a micro-batch."""
    least_activation_bytes: int
    """Of them what no setting saves: the input of the first layer."""
    feature_bytes: int
    """Of one image in the cache of features; 0 where the recipe has none."""
    logit_bytes: int
    """If every place of the rows were scored; packed rows score half of theirs or more."""

    @property
    def total_bytes(self) -> int:
        return self.frozen_bytes + self.trained_bytes + self.activation_bytes + self.logit_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def sizes_of(
    recipe: Recipe, *, world: int = 1, processor: LlamaAdapterProcessor | None = None
) -> Sizes:
    """Build the recipe's model without weights, and count.

    With the `processor` features are counted of images as large as it makes them; without, of the
    largest that the encoder is made for.
    Raises what `build` does, for all that needs no weights.
    """
    built = build(recipe, device=META)
    model, base = built.model, built.model.language_model
    moving = moved_by(recipe.streams, recipe.optimizer)
    trained = {
        str(group): sum(p.numel() for p in model.group_parameters(group))
        for group in Group
        if group in moving
    }
    if built.lora is not None and Group.LANGUAGE in moving:
        trained["lora"] = sum(p.numel() for p in built.lora.named_parameters().values())
    learned = [p for _, p in model.adapter.named_parameters()]
    learned += built.lora.named_parameters().values() if built.lora else ()
    learned_ids = {id(p) for p in learned}
    base_count = sum(p.numel() for p in base.parameters() if id(p) not in learned_ids)
    idle_count = sum(p.numel() for p in learned) - sum(trained.values())
    vision_count = 0 if model.vision is None else _count(model.vision)
    text = base.config.get_text_config()
    per_parameter = _base_bytes(recipe, text)
    rows = max(-(-section.rows // world) for section in recipe.streams.values())
    length = max(section.row_length for section in recipe.streams.values())
    half = recipe.compute.autocast == "bfloat16" or recipe.base.dtype in ("bfloat16", "float16")
    return Sizes(
        base_parameters=base_count,
        vision_parameters=vision_count,
        trained_parameters=trained,
        layers=text.num_hidden_layers,
        context=getattr(text, "max_position_embeddings", None),
        positions=_positions(base, text),
        embedding_rows=base.get_input_embeddings().weight.shape[0],
        # what no kind of data moves is as large as what is trained, without its gradient
        frozen_bytes=int(base_count * per_parameter + (vision_count + idle_count) * 4),
        trained_bytes=_TRAINED_BYTES * sum(trained.values()),
        activation_bytes=_activations(
            text,
            tokens=rows * length,
            width=2 if half else 4,
            checkpointing=recipe.compute.gradient_checkpointing,
        ),
        # rows that are not packed may be short
        least_activation_bytes=rows
        * (8 if recipe.data.padding == "padded" else length)
        * text.hidden_size
        * 2,
        feature_bytes=_feature_bytes(model, recipe.vision, processor),
        # the logits, their float32 form, its softmax and the gradient
        logit_bytes=rows * length * text.vocab_size * (2 + 12 if half else 16),
    )


def _feature_bytes(
    model: LlamaAdapterForConditionalGeneration,
    section: VisionSection | None,
    processor: LlamaAdapterProcessor | None,
) -> int:
    if section is None or not section.cache_features or model.vision is None:
        return 0
    ids = torch.zeros(1, 1, dtype=torch.int64, device=META)
    pixels = dummy_image(model, ids)["pixel_values"]
    if processor is not None and processor.image_processor is not None:
        made = processor.image_processor([Image.new("RGB", (640, 480))], return_tensors="pt")
        if set(made) == {"pixel_values"}:
            pixels = torch.empty(made["pixel_values"].shape, device=META)
    features = vision_features(model.vision, pixels, model.adapter_config)
    return features.numel() * int(getattr(torch, section.cache_dtype).itemsize)


def _activations(text: Any, *, tokens: int, width: int, checkpointing: bool) -> int:
    """Of a decoder layer's about 10 vectors of its width, and 4 of the width inside its MLP."""
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size) or 4 * text.hidden_size
    layer = tokens * width * (10 * text.hidden_size + 4 * inner)
    if not checkpointing:
        return int(layer * text.num_hidden_layers)
    return int(layer + tokens * width * text.hidden_size * text.num_hidden_layers)


def _base_bytes(recipe: Recipe, text: Any) -> float:
    if recipe.base.quantization != "none":
        return _QUANTIZED_BYTES[recipe.base.quantization]
    name: str = recipe.base.dtype
    if name == "auto":
        name = str(getattr(text, "dtype", None) or "float32").removeprefix("torch.")
    return _BYTES.get(name, 4.0)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _positions(base: nn.Module, text: Any) -> int | None:
    """How many positions a base has whose positions are a table, in a layer or a buffer."""
    tables: Iterator[tuple[str, Tensor]] = chain(base.named_parameters(), base.named_buffers())
    found = [table.shape[0] for name, table in tables if _TABLES.search(name) and table.ndim == 2]
    known = getattr(text, "max_position_embeddings", None)
    # some tables have additional rows, such as OPT's for padding
    return min([*found, *([known] if isinstance(known, int) else [])]) if found else None
