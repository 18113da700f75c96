"""Linears and norms of a decoder that compute each row of a batch as its own adapter would.

Row a of every table is adapter a's, in float32; row 0 leaves the frozen module as it is.

Shapes: A adapters and the base, C outputs, N inputs, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from llama_adapter.families.offloading import execution_device
from llama_adapter.model.groups import AdapterModule
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear
from llama_adapter.model.stack.reads import Selection


class StackedModule(nn.Module):
    """A frozen module with one row of tables for each adapter."""

    def __init__(self, base_layer: nn.Module, selection: Selection, capacity: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.capacity = capacity
        self.device = execution_device(base_layer)
        self._tables: dict[str, Tensor] = {}
        self._merged: tuple[int, nn.Module] | None = None

    def write(self, adapter: int, module: AdapterModule | None) -> None:
        """Take an adapter's values, or the base's where it has no module here."""
        self.selection.forget()
        for name, table in self._tables.items():
            table[adapter] = self.neutral(name)
        for name, value in {} if module is None else dict(self.values_of(module)).items():
            self._fit(name, value)
            _corner(self._tables[name][adapter], value.shape).copy_(value)

    def merge(self, adapter: int, module: AdapterModule | None) -> None:
        """Let a plain module compute passes of this adapter alone, where there is one."""
        plain = None if module is None else module.merged()
        self._merged = None if plain is None else (adapter, plain.eval())

    def unmerge(self) -> None:
        self._merged = None

    def plain(self) -> nn.Module | None:
        """The module that computes all rows of this pass, where they have the same adapter."""
        only = self.selection.only
        if only is None:
            return None
        if only == 0:
            return self.base_layer
        if self._merged is not None and self._merged[0] == only:
            return self._merged[1]
        return None

    def _fit(self, name: str, value: Tensor) -> None:
        """Make a table, or widen one to a larger LoRA rank."""
        table = self._tables.get(name)
        shape = (self.capacity + 1, *value.shape)
        if table is not None:
            shape = tuple(map(max, table.shape, shape))
            if shape == table.shape:
                return
        wider = torch.empty(shape, device=self.device)
        wider[:] = self.neutral(name)
        if table is not None:
            _corner(wider, table.shape).copy_(table)
        self._tables[name] = wider

    def neutral(self, name: str) -> Tensor | float:
        """What a table holds for the base."""
        raise NotImplementedError

    def values_of(self, module: Any) -> Iterator[tuple[str, Tensor]]:
        """What an adapter's module writes into the tables."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.selection.forget()
        self._tables = {name: fn(table) for name, table in self._tables.items()}
        return self


def _corner(x: Tensor, shape: torch.Size) -> Tensor:
    """The part of x from its first element on that has this shape."""
    return x[tuple(slice(size) for size in shape)]


class StackedLinear(StackedModule):
    """`s ⊙ (W x + b₀ + b)` or `W (s ⊙ x) + b₀ + b`, plus LoRA, by each row's adapter."""

    base_layer: nn.Linear
    _NEUTRAL: ClassVar = {"scale": 1.0, "input_scale": 1.0}

    def __init__(self, base_layer: nn.Linear, selection: Selection, capacity: int) -> None:
        super().__init__(base_layer, selection, capacity)
        self.in_features = int(base_layer.in_features)
        self.out_features = int(base_layer.out_features)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a linear for its dtype or device."""
        return self.base_layer.weight

    def neutral(self, name: str) -> float:
        return self._NEUTRAL.get(name, 0.0)

    def values_of(self, module: ScaledLinear) -> Iterator[tuple[str, Tensor]]:
        scale, bias = module.scale, module.adapter_bias
        is_output = module.scale_side == "output"
        if scale is not None:
            yield ("scale" if is_output else "input_scale"), scale.detach()
        if bias is not None:
            yield "offset", (scale * bias if is_output and scale is not None else bias).detach()
        if module.lora_down is not None and module.lora_up is not None:
            yield "lora_down", module.lora_down.detach()
            yield "lora_up", module.lora_up.detach()

    def forward(self, x: Tensor) -> Tensor:
        plain = self.plain()
        if plain is not None:
            return cast(Tensor, plain(x))
        y = self.without_lora(x)
        return y + self._lora(x).to(y.dtype) if "lora_down" in self._tables else y

    def without_lora(self, x: Tensor) -> Tensor:
        """The same linear without LoRA, as prompts see it (released V2)."""
        if self.selection.only == 0:
            return self.base_layer(x)
        rows_of, tables = self.selection.rows_of, self._tables
        if (input_scale := tables.get("input_scale")) is not None:
            x = (rows_of(input_scale, x) * x).to(x.dtype)
        y = self.base_layer(x)
        scale, offset = tables.get("scale"), tables.get("offset")
        if scale is not None and offset is not None:
            return torch.addcmul(rows_of(offset, y), rows_of(scale, y), y).to(y.dtype)
        if scale is not None:
            return (rows_of(scale, y) * y).to(y.dtype)
        return y if offset is None else (y + rows_of(offset, y)).to(y.dtype)

    def _lora(self, x: Tensor) -> Tensor:
        down, up, only = self._tables["lora_down"], self._tables["lora_up"], self.selection.only
        x = x.to(down.dtype)
        if only is not None:
            return F.linear(F.linear(x, down[only]), up[only])
        down, up = (self.selection.gathered(table, len(x)) for table in (down, up))
        x_B1 = x if x.ndim == 3 else x.unsqueeze(1)
        low_rank = x_B1 @ down.transpose(1, 2)
        return (low_rank @ up.transpose(1, 2)).view(*x.shape[:-1], -1)


class StackedNorm(StackedModule):
    """A norm whose weights are those of each row's adapter."""

    def __init__(self, learned: LearnedNorm, selection: Selection, capacity: int) -> None:
        super().__init__(learned.base_layer, selection, capacity)
        # the family's own module, in float32 as the learned weights are; in a tuple, not a child
        self._family = (learned.norm,)
        self._rms_epsilon = learned.rms_epsilon
        self._base = {
            name: parameter.detach().float().clone()
            for name, parameter in learned.base_layer.named_parameters()
        }

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base_layer.weight)

    def neutral(self, name: str) -> Tensor:
        return self._base[name]

    def values_of(self, module: LearnedNorm) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in module.norm.named_parameters():
            yield name, parameter.detach()

    def forward(self, x: Tensor) -> Tensor:
        plain = self.plain()
        if plain is not None:
            return cast(Tensor, plain(x))
        rows_of = self.selection.rows_of
        weights = {name: rows_of(table, x) for name, table in self._tables.items()}
        if self._rms_epsilon is not None:
            normed = F.rms_norm(x, (x.shape[-1],), None, self._rms_epsilon)
            return (weights["weight"] * normed).to(x.dtype)
        return self._by_family(x, weights)

    def _by_family(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        [family] = self._family
        if isinstance(family, nn.LayerNorm):
            normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, family.eps)
            normed = normed * weights["weight"]
            bias = weights.get("bias")
            return (normed if bias is None else normed + bias).to(x.dtype)
        return cast(Tensor, functional_call(family, dict(weights), (x,))).to(x.dtype)
