"""Keys and values of prompts, by an attention module's own frozen projections.

Shapes: E prompt entries, M prompts, G key/value heads, D head size, d hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.model.scaled_linear import FoldedLinear, ScaledLinear

KeysValues = tuple[Tensor, Tensor]

Attention = Any
"""A decoder's attention module; which attributes it has differs from family to family."""


def project_prompt(attention: Attention, x_EMd: Tensor) -> KeysValues:
    """Keys and values [E, G, M, D] of prompts by the module's own projections, not rotated.

    Learned bias and scale apply, LoRA does not; a key norm applies where the family has one.
    Raises UnsupportedModelError for an attention module whose projections are unknown.
    """
    entries, length, _ = x_EMd.shape
    if hasattr(attention, "k_proj"):
        keys = _project(attention.k_proj, x_EMd)
        values = _project(attention.v_proj, x_EMd)
        head_size = int(attention.head_dim)
        norm = getattr(attention, "k_norm", None)
        weight = getattr(norm, "weight", None)
        if norm is not None and weight is not None and weight.shape[0] != head_size:
            keys, norm = norm(keys), None  # olmo2 normalises all heads together
        keys = keys.view(entries, length, -1, head_size)
        if norm is not None:
            keys = norm(keys)
        return keys.transpose(1, 2), values.view(entries, length, -1, head_size).transpose(1, 2)
    if hasattr(attention, "qkv_proj"):  # phi3: queries, keys, values side by side
        head_size = int(attention.head_dim)
        size = int(attention.num_key_value_heads) * head_size
        fused = _project(attention.qkv_proj, x_EMd)
        keys, values = fused[..., -2 * size : -size], fused[..., -size:]
        keys = keys.reshape(entries, length, -1, head_size).transpose(1, 2)
        return keys, values.reshape(entries, length, -1, head_size).transpose(1, 2)
    if hasattr(attention, "query_key_value"):  # gpt_neox: interleaved head by head
        fused = _project(attention.query_key_value, x_EMd)
        size = 3 * int(attention.head_size)
        _, keys, values = fused.view(entries, length, -1, size).transpose(1, 2).chunk(3, dim=-1)
        return keys, values
    raise UnsupportedModelError(
        f"{type(attention).__name__} has none of k_proj, qkv_proj, query_key_value: "
        "keys and values of prompts cannot be made"
    )


def prompt_linears(attention: Attention) -> list[nn.Module]:
    """The linears that `project_prompt` uses, which prompts pass without LoRA."""
    if hasattr(attention, "k_proj"):
        return [attention.k_proj, attention.v_proj]
    return [attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.query_key_value]


def _project(linear: nn.Linear | ScaledLinear, x: Tensor) -> Tensor:
    if isinstance(linear, FoldedLinear):
        linear = linear.learned
    if linear.weight.is_floating_point():
        x = x.to(linear.weight.dtype)
    return linear.without_lora(x) if isinstance(linear, ScaledLinear) else linear(x)
