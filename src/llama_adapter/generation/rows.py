"""Keys and values of several answers at once: a fixed number of rows of a fixed length.

A row keeps what it holds after its answer has ended, so that a prompt that begins alike need not
be read again. Busy rows lie at the front, in one block, for a pass to run over them.

Shapes: R rows, S tokens, G key/value heads, D head size, B rows of a pass, T tokens of a pass,
P tokens that a pass may look at.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(eq=False, slots=True)
class Row:
    """What one row of the cache holds."""

    owner: Hashable = None
    """Whose linears made it; rows of different adapters have nothing in common."""
    content: list[Hashable] = field(default_factory=list)
    """Of each token in the cache, what it was made of: its id and the image that it read."""
    used_at: int = 0
    """When it was last used, in steps."""
    answer: Any = None
    """Who uses it; None where it is free."""

    def common(self, owner: Hashable, content: Sequence[Hashable]) -> int:
        """How many tokens it holds of those that a prompt begins with."""
        if owner != self.owner:
            return 0
        pairs = zip(self.content, content, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.content), len(content))
        )


class Window:
    """Which rows and places a pass reads and writes."""

    first: int
    span: int
    row_B1: Tensor
    place_BT: Tensor

    def set(self, *, first: int, starts: Sequence[int], counts: Sequence[int], length: int) -> None:
        """Rows from `first` on, with so many new tokens each behind so many that are there.

        What fills a row up to the longest goes into a place behind all others, `length`.
        """
        self.first = first
        self.span = max(map(sum, zip(starts, counts, strict=True)))
        start_B1 = torch.tensor(starts).unsqueeze(1)
        offset_T = torch.arange(max(counts))
        self.row_B1 = torch.arange(first, first + len(starts)).unsqueeze(1)
        self.place_BT = start_B1 + offset_T
        if min(counts) < max(counts):
            is_new_BT = offset_T < torch.tensor(counts).unsqueeze(1)
            self.place_BT = self.place_BT.where(is_new_BT, length)

    def mask_B1TP(self, window: int | None = None) -> Tensor:
        """Where each token may look: up to its own place, or at the last `window` of them."""
        place_P = torch.arange(self.span)
        place_BT1 = self.place_BT.unsqueeze(-1)
        mask_BTP = place_P <= place_BT1
        if window is not None:
            mask_BTP &= place_P > place_BT1 - window
            # what only fills a row up must look at something too
            mask_BTP |= place_BT1 >= self.span
        return mask_BTP.unsqueeze(1)


class RowLayer(CacheLayerMixin):
    """One layer's keys and values, [R, S + 1, G, D]."""

    is_sliding = False

    def __init__(self, window: Window, rows: int, length: int) -> None:
        super().__init__()
        self._window, self._rows, self._length = window, rows, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            new.new_zeros(self._rows, self._length + 1, new.shape[1], new.shape[3])
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a pass; returns all that its rows hold."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._window
        rows = slice(window.first, window.first + len(key_states))
        found = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            assert held is not None
            held[window.row_B1, window.place_BT] = new.transpose(1, 2)
            found.append(held[rows, : window.span].transpose(1, 2))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self._window.span, 0

    def get_seq_length(self) -> int:
        return 0  # rows differ: positions are always given

    def get_max_length(self) -> int:
        return self._length


class RowCache(Cache):
    """The rows: what each holds, and transformers' cache of all layers."""

    def __init__(self, *, num_layers: int, rows: int, length: int) -> None:
        self.length = length
        self.window = Window()
        self.rows = [Row() for _ in range(rows)]
        super().__init__(layers=[RowLayer(self.window, rows, length) for _ in range(num_layers)])

    def aim(self, *, first: int, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Say which rows the next pass is about; see `Window.set`."""
        self.window.set(first=first, starts=starts, counts=counts, length=self.length)

    def claim(
        self, target: int, *, owner: Hashable, content: Sequence[Hashable]
    ) -> tuple[Row, int]:
        """Make the row at `target`, the first free one, begin as `content` does, as far as known.

        Of the row that holds most of it a free one is taken over, unless it holds much else; then,
        and of a busy one, what it has is copied into the row that was not used for longest.
        Returns the row and how many tokens it holds.
        """
        rows = self.rows
        commons = [row.common(owner, content) for row in rows]
        best = max(range(len(rows)), key=lambda i: (commons[i], i >= target))
        count = commons[best]
        free = range(target, len(rows))
        oldest = min(free, key=lambda i: (bool(rows[i].content), rows[i].used_at))
        if best == oldest or (best >= target and 2 * count >= len(rows[best].content) > 0):
            del rows[best].content[count:]
            chosen = best
        else:
            rows[oldest].content = []
            if count:
                self.copy(best, oldest, count)
            chosen = oldest
        self.swap(chosen, target)
        rows[target].owner = owner
        return rows[target], count

    def swap(self, a: int, b: int) -> None:
        """Let two rows change places."""
        if a == b:
            return
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
        length = max(len(self.rows[a].content), len(self.rows[b].content))
        for held in self._tensors():
            kept = held[a, :length].clone()
            held[a, :length] = held[b, :length]
            held[b, :length] = kept

    def copy(self, source: int, target: int, count: int) -> None:
        """Let a row begin with so many tokens of another."""
        self.rows[target].owner = self.rows[source].owner
        self.rows[target].content = self.rows[source].content[:count]
        for held in self._tensors():
            held[target, :count] = held[source, :count]

    def _tensors(self) -> list[Tensor]:
        return [
            held
            for layer in self.layers
            if layer.is_initialized
            for held in (layer.keys, layer.values)
        ]
