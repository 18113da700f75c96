"""Where things are in a decoder: attention modules, linears, norms; whatever the family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from llama_adapter.errors import UnsupportedModelError

CACHE = (
    "cache"
    if any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
    else "past_key_values"
)
"""What the installed transformers calls the keys and values of earlier tokens: it renamed them in
5.24, and warns of the old name, as an input and on an output."""

KeysValues = tuple[Tensor, Tensor]
"""Of one attention module, [E, G, M, D] each."""


class Attention(Protocol):
    """A decoder's self-attention module; its projections differ from family to family."""

    layer_idx: int
    config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class VisionEncoder(Protocol):
    """A frozen vision model of transformers, such as CLIP's or SigLIP's."""

    config: Any
    visual_projection: Any
    """Of CLIP with its projection alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def family_of(language_model: PreTrainedModel) -> str:
    """The family by the names that a user may know it by."""
    return f"{language_model.config.model_type} ({type(language_model).__name__})"


def decoder_of(language_model: PreTrainedModel) -> nn.Module:
    """The decoder without its head; some families call the head itself their decoder.

    Raises UnsupportedModelError where there is none.
    """
    decoder = language_model.get_decoder()
    if isinstance(decoder, nn.Linear):
        decoder = language_model.base_model
    if not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: it has no decoder"
        )
    return decoder


def readable_name(name: str) -> str:
    """Name of a decoder module in adapter files: `attention` whatever the family calls it."""
    return re.sub(r"\.self_attn(?=\.|$)", ".attention", name)


def attention_modules(language_model: PreTrainedModel) -> list[tuple[str, Attention]]:
    """Self-attention modules of the decoder in layer order, told by their classes' names alone.

    Raises UnsupportedModelError if there is none, or several in a layer.
    """
    decoder = decoder_of(language_model)
    found = [
        (cast(int, module.layer_idx), name, module)
        for name, module in decoder.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and re.search("attention", type(module).__name__, re.IGNORECASE)
    ]
    found.sort(key=lambda item: item[0])
    if not found or len({index for index, _, _ in found}) < len(found):
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: expected at most one self-attention "
            f"module in a layer, found layers {[index for index, _, _ in found]}"
        )
    return [(name, cast(Attention, module)) for _, name, module in found]


def decoder_linears(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears inside decoder layers, by name; experts and routers of a mixture are left alone."""
    mixtures = [name for name, module in decoder.named_modules() if hasattr(module, "experts")]
    found = "-"
    for name, module in decoder.named_modules():
        in_layer = re.search(r"(^|\.)\d+\.", name) is not None
        in_mixture = any(name == m or name.startswith(m + ".") for m in mixtures)
        # inside a linear that peft has wrapped are further ones, which are its own
        if is_linear(module) and in_layer and not in_mixture and not name.startswith(found + "."):
            found = name
            yield name, module


def decoder_norms(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every norm of the decoder that has weights, gated ones and the final one too.

    Of one that contains linears, those are adapted instead.
    """
    for name, module in decoder.named_modules():
        is_norm = type(module).__name__.endswith(("Norm", "NormGated"))
        is_plain = not any(is_linear(part) for part in module.modules())
        if is_norm and is_plain and any(True for _ in module.parameters()):
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """A linear of any kind: plain, quantized, wrapped by peft or us, or transposed as in GPT-2."""
    has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return has_sizes or isinstance(module, Conv1D)


def linear_sizes(linear: Any) -> tuple[int, int]:
    """The numbers of features that go in and come out."""
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)
