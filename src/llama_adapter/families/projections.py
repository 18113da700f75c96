"""Keys and values of prompts, by an attention module's own frozen projections.

Shapes: E prompt entries, M prompts, G key/value heads, D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.structure import Attention

KeysValues = tuple[Tensor, Tensor]


class _Separate(Attention, Protocol):
    k_proj: nn.Module
    v_proj: nn.Module
    head_dim: int


class _SideBySide(Attention, Protocol):
    qkv_proj: nn.Module
    num_key_value_heads: int
    head_dim: int


class _Interleaved(Attention, Protocol):
    query_key_value: nn.Module
    head_size: int


def _separate(attention: _Separate, x_EMd: Tensor) -> KeysValues:
    """Most families; a key norm applies where there is one."""
    entries, length, _ = x_EMd.shape
    keys, values = _project(attention.k_proj, x_EMd), _project(attention.v_proj, x_EMd)
    head_size = int(attention.head_dim)
    norm: Any = getattr(attention, "k_norm", None)
    weight = getattr(norm, "weight", None)
    if norm is not None and weight is not None and weight.shape[0] != head_size:
        keys, norm = norm(keys), None  # olmo2 normalizes all heads together
    keys = keys.view(entries, length, -1, head_size)
    if norm is not None:
        keys = norm(keys)
    return keys.transpose(1, 2), values.view(entries, length, -1, head_size).transpose(1, 2)


def _side_by_side(attention: _SideBySide, x_EMd: Tensor) -> KeysValues:
    """phi3: all queries, all keys, all values."""
    head_size = int(attention.head_dim)
    size = int(attention.num_key_value_heads) * head_size
    fused = _project(attention.qkv_proj, x_EMd)
    keys, values = fused[..., -2 * size : -size], fused[..., -size:]
    keys = keys.unflatten(-1, (-1, head_size)).transpose(1, 2)
    return keys, values.unflatten(-1, (-1, head_size)).transpose(1, 2)


def _interleaved(attention: _Interleaved, x_EMd: Tensor) -> KeysValues:
    """gpt_neox: query, key and value head by head."""
    fused = _project(attention.query_key_value, x_EMd)
    heads = fused.unflatten(-1, (-1, 3 * int(attention.head_size))).transpose(1, 2)
    _, keys, values = heads.chunk(3, dim=-1)
    return keys, values


class _Layout(NamedTuple):
    linears: tuple[str, ...]
    """Attributes that make keys and values; the first one tells the layout from others."""
    project: Callable[[Any, Tensor], KeysValues]


LAYOUTS = (
    _Layout(("k_proj", "v_proj"), _separate),
    _Layout(("qkv_proj",), _side_by_side),
    _Layout(("query_key_value",), _interleaved),
)
"""How families make keys and values; a further one goes here."""


def _layout_of(attention: Attention) -> _Layout:
    for layout in LAYOUTS:
        if hasattr(attention, layout.linears[0]):
            return layout
    raise UnsupportedModelError(
        f"{type(attention).__name__} has none of "
        f"{', '.join(layout.linears[0] for layout in LAYOUTS)}: "
        "keys and values of prompts cannot be made"
    )


def project_prompt(attention: Attention, x_EMd: Tensor) -> KeysValues:
    """Keys and values [E, G, M, D] of prompts by the module's own projections, not rotated.

    Learned bias and scale apply, LoRA does not; a key norm applies where the family has one.
    Raises UnsupportedModelError for an attention module whose projections are unknown.
    """
    return _layout_of(attention).project(attention, x_EMd)


def prompt_linears(attention: Attention) -> list[nn.Module]:
    """The linears that `project_prompt` uses, which prompts pass without LoRA."""
    return [getattr(attention, name) for name in _layout_of(attention).linears]


def _project(linear: nn.Module, x: Tensor) -> Tensor:
    weight = cast(Tensor, linear.weight)
    if weight.is_floating_point():
        x = x.to(weight.dtype)
    # an adapted linear says itself how prompts pass it
    project: Callable[[Tensor], Tensor] = getattr(linear, "without_lora", linear)
    return project(x)
