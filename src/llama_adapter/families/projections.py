"""Keys and values of prompts, as an attention module's own forward makes them.

The general way runs the module on the prompts, unrotated, up to where it hands keys and values to
the attention registry. Where its plain projections give the same, they are the fast way.

Shapes: E prompt entries, M prompts, G key/value heads, D head size, d hidden size.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.probing import capture_keys_values
from llama_adapter.families.structure import Attention, KeysValues, is_linear

RELATIVE_TOLERANCE = 1e-3
"""Of the largest number compared; the same products in another order differ by far less."""


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
"""The fast ways; each is taken only where it gives what the module itself gives."""


PROMPTS, ALL_SEEN = "<prompts>", "<all seen>"
"""Arguments made for each run: the prompts once more, and a mask that hides none of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptProjection:
    """How an attention module makes keys and values of prompts."""

    layout: _Layout | None
    """Its plain projections; None where the module itself is run."""
    inputs: dict[str, Any]
    """What its forward is given besides the prompts."""

    def __call__(self, attention: Attention, x_EMd: Tensor) -> KeysValues:
        """Keys and values [E, G, M, D] of prompts, not rotated.

        Learned bias and scale apply, LoRA does not; a key norm applies where the family has one.
        """
        if self.layout is not None:
            return self.layout.project(attention, x_EMd)
        return run_attention(attention, x_EMd, self.inputs)

    def linears(self, attention: Attention) -> list[nn.Module]:
        """The linears that prompts pass, without LoRA."""
        if self.layout is not None:
            return [getattr(attention, name) for name in self.layout.linears]
        return [module for module in attention.modules() if is_linear(module)]


def projection_of(
    attention: Attention, inputs: dict[str, Any], *, x_22d: Tensor, name: str
) -> PromptProjection | None:
    """How a module makes keys and values, tried on two entries of two prompts.

    None for one that makes none of its own but reuses those of another layer.
    Raises UnsupportedModelError that begins with `name` where the module cannot be run on prompts.
    """
    with torch.no_grad():
        try:
            own = run_attention(attention, x_22d, inputs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name} does not run on prompts alone ({type(error).__name__}: {error})"
            ) from error
        if own[0].shape[0] != 2 or own[0].shape[2] != 2 or not _depends(own[0]):
            return None
        for layout in LAYOUTS:
            if hasattr(attention, layout.linears[0]) and _gives(layout, attention, x_22d, own):
                return PromptProjection(layout=layout, inputs=inputs)
    return PromptProjection(layout=None, inputs=inputs)


def _depends(keys: Tensor) -> bool:
    return keys.is_meta or not torch.equal(keys[0], keys[1])


def _gives(layout: _Layout, attention: Attention, x: Tensor, own: KeysValues) -> bool:
    try:
        plain = layout.project(attention, x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return (
        max(relative_difference(a, b) for a, b in zip(plain, own, strict=True))
        <= RELATIVE_TOLERANCE
    )


def relative_difference(ours: Tensor, own: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where shapes differ."""
    if ours.shape != own.shape:
        return float("inf")
    if ours.is_meta:
        return 0.0
    largest = own.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.float() - own.float()).abs().max() / largest)


def run_attention(attention: Attention, x_EMd: Tensor, inputs: dict[str, Any]) -> KeysValues:
    """Keys and values that a module's forward hands to the attention registry for prompts."""
    others = {name: _made(value, x_EMd) for name, value in inputs.items()}
    forward: Callable[..., Any] = cast(nn.Module, type(attention)).forward
    with _without_lora(attention):
        # the class's function: what hangs on the instance has run for this pass already
        reached = capture_keys_values(lambda: forward(attention, x_EMd, **others))
    if reached is None:
        raise TypeError(f"{type(attention).__name__} hands no keys to the attention registry")
    return reached


def _made(value: Any, x_EMd: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(x_EMd.device)
    if isinstance(value, tuple | list):
        return type(value)(_made(part, x_EMd) for part in value)
    if isinstance(value, dict | UserDict):  # a copy: modules leave keys and values in it
        made = {key: _made(part, x_EMd) for key, part in value.items()}
        return made if isinstance(value, dict) else type(value)(made)
    if isinstance(value, str) and value == ALL_SEEN:
        length = x_EMd.shape[1]
        return x_EMd.new_zeros(1, 1, length, length)
    return x_EMd if isinstance(value, str) and value == PROMPTS else value


@contextmanager
def _without_lora(attention: Attention) -> Iterator[None]:
    """Inside, adapted linears compute without LoRA, as prompts pass them."""
    adapted = [m for m in attention.modules() if hasattr(m, "without_lora")]
    before = [module.__dict__.get("forward") for module in adapted]
    for module in adapted:
        module.__dict__["forward"] = module.without_lora
    try:
        yield
    finally:
        for module, forward in zip(adapted, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _project(linear: nn.Module, x: Tensor) -> Tensor:
    weight = cast(Tensor, linear.weight)
    if weight.is_floating_point():
        x = x.to(weight.dtype)
    # an adapted linear says itself how prompts pass it
    project: Callable[[Tensor], Tensor] = getattr(linear, "without_lora", linear)
    return project(x)
